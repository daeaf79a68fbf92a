"""Trees of tensors: their samples are counted, cut and mapped, whatever the containers are."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from ormo_rpc.data.trees import map_tensors, narrow, size, tensors


class Named(NamedTuple):
    """A pair with names."""

    inputs: Any
    targets: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """A batch with a field that its constructor does not take."""

    inputs: Any
    computed: Any = dataclasses.field(init=False, default=2)


class OfHuggingFace(UserDict[str, Any]):
    """As a tokenizer returns it."""


def rows(count: int, *shape: int) -> torch.Tensor:
    return torch.arange(count * max(1, torch.Size(shape).numel())).view(count, *shape)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pair = st.tuples(children, children)
    return st.one_of(
        pair,
        pair.map(list),
        pair.map(lambda both: Named(*both)),
        pair.map(lambda both: dict(zip("ab", both, strict=True))),
        pair.map(lambda both: OrderedDict(zip("ab", both, strict=True))),
        pair.map(lambda both: defaultdict(int, zip("ab", both, strict=True))),
    )


trees = st.recursive(st.sampled_from([None, 3, 0.5, (), rows(6), rows(6, 2), rows(6, 2, 2), torch.tensor(1.5)]), containers)


@given(trees, st.integers(0, 6), st.integers(0, 6))
def test_a_tree_is_cut_as_torch_s_own_trees_are(tree: Any, start: int, stop: int) -> None:
    expected = [
        leaf[start:stop] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf
        for leaf in tree_leaves(tree)
        if leaf is not None  # is no leaf to torch's trees of some versions
    ]
    part = narrow(tree, start, stop)
    assert type(part) is type(tree)
    found = [leaf for leaf in tree_leaves(part) if leaf is not None]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one is other
    if any(leaf.dim() for _, leaf in tensors(tree)):
        assert size(tree) == 6
        assert size(part) == max(0, stop - start)


@pytest.mark.parametrize(
    "make",
    [
        lambda tensor: Frozen(tensor),
        lambda tensor: OfHuggingFace(inputs=tensor, length=7),
        lambda tensor: MappingProxyType({"inputs": tensor}),
        lambda tensor: Named(tensor, None),
    ],
)
def test_the_kind_of_a_container_stays(make: Any) -> None:
    given = make(rows(4))
    doubled = map_tensors(lambda leaf: leaf * 2, given)
    assert type(doubled) is type(given)
    assert [leaf.tolist() for _, leaf in tensors(doubled)] == [[0, 2, 4, 6]]
    assert [leaf.tolist() for _, leaf in tensors(given)] == [[0, 1, 2, 3]]


def test_a_cut_is_a_view() -> None:
    inputs = rows(5, 2)
    narrow({"inputs": inputs}, 1, 3)["inputs"].zero_()
    assert inputs[:, 0].tolist() == [0, 0, 0, 6, 8]


def test_each_tensor_has_a_place() -> None:
    places = [place for place, _ in tensors({"x": [rows(2), Named(rows(2), 3)], "y": Frozen(rows(2))})]
    assert places == ["['x'][0]", "['x'][1].inputs", "['y'].inputs"]
    assert [place for place, _ in tensors(rows(2))] == [""]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": None, "y": 3}, r"the batch has no tensor with a dimension of samples: got dict"),
        ((torch.tensor(1.0),), r"the batch has no tensor with a dimension of samples: got tuple"),
        ("text", r"the batch has no tensor .*: got str"),
        (
            {"x": rows(4), "y": (rows(4), rows(3))},
            r"batch\['x'\] has 4 rows and batch\['y'\]\[1\] has 3, expected as many in all tensors: one a sample",
        ),
    ],
)
def test_a_tree_without_a_number_of_samples_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        size(batch)
