"""Fingerprints: equal for equal models, and a difference that names what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from ormo_rpc.models.fingerprint import SHOWN, Fingerprint


def model() -> nn.Module:
    """A frozen layer, a trained one and a batch norm, in values that are always the same."""
    made = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    for number, tensor in enumerate((*made.parameters(), *made.buffers())):
        tensor.data.fill_(number)
    made.requires_grad_(False)
    made.get_submodule("2").requires_grad_(True)
    return made


def of(change: Callable[[nn.Module], object] = lambda _: None) -> Fingerprint:
    made = model()
    change(made)
    return Fingerprint.of(made)


def difference(change: Callable[[nn.Module], object], *, buffer_values: bool = True) -> str | None:
    return of().difference(of(change), "A", "B", buffer_values=buffer_values)


def test_it_has_what_trains_what_is_frozen_and_the_buffers() -> None:
    taken = of()
    assert taken.parameters == {"2.weight": "float32 (2, 3)", "2.bias": "float32 (2,)"}
    assert [*taken.frozen] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert taken.buffers["1.num_batches_tracked"] == "int64 ()"
    # 0.bias is the second parameter: three times 1.0.
    assert taken.sha256["0.bias"] == hashlib.sha256(torch.ones(3).numpy().tobytes()).hexdigest()[:16]
    assert {*taken.sha256} == {*taken.frozen, *taken.buffers}


def test_it_crosses_as_json() -> None:
    taken = of()
    again = Fingerprint.from_dict(json.loads(json.dumps(taken.to_dict())))
    assert again == taken
    assert [*again.parameters] == [*taken.parameters]


def set_value(name: str) -> Callable[[nn.Module], object]:
    return lambda made: made.state_dict()[name].add_(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: None, None),
        (set_value("2.weight"), None),  # it is sent
        (set_value("0.weight"), "model: 0.weight: the values of A and of B differ"),
        (set_value("1.running_mean"), "model: 1.running_mean: the values of A and of B differ"),
        (set_value("1.num_batches_tracked"), "model: 1.num_batches_tracked: the values of A and of B differ"),
        (
            lambda made: made.get_submodule("0").requires_grad_(True),
            "model: parameters: A: none of them; B: 0.weight float32 (3, 2), 0.bias float32 (3,)",
        ),
        (
            lambda made: made.get_submodule("2").register_parameter("bias", nn.Parameter(torch.zeros(2).double())),
            "model: parameters: A: 2.bias float32 (2,); B: 2.bias float64 (2,)",
        ),
        (
            lambda made: made.get_submodule("1").register_buffer("extra", torch.zeros(1), persistent=False),
            "model: buffers: A: none of them; B: 1.extra float32 (1,)",
        ),
    ],
)
def test_a_difference_names_what_differs(change: Callable[[nn.Module], object], said: str | None) -> None:
    assert difference(change) == said


def test_the_values_of_buffers_may_be_left_out() -> None:
    assert difference(set_value("1.running_var"), buffer_values=False) is None
    assert difference(set_value("0.bias"), buffer_values=False) == "model: 0.bias: the values of A and of B differ"


def test_numbers_of_the_data_set_are_compared() -> None:
    taken, other = (replace(of(), data={"training samples": count}) for count in (8, 9))
    assert taken.difference(other, "A", "B", buffer_values=True) == "dataset: training samples: A: 8; B: 9"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool])
def test_values_of_any_dtype_have_a_hash(dtype: torch.dtype) -> None:
    def buffer(value: int) -> Fingerprint:
        made = nn.Linear(1, 1)
        made.register_buffer("mask", torch.tensor([[0, value]]).to(dtype).t())
        return Fingerprint.of(made)

    assert buffer(1).sha256 == buffer(1).sha256
    assert buffer(1).difference(buffer(0), "A", "B", buffer_values=True) == "model: mask: the values of A and of B differ"


def test_a_long_list_is_cut() -> None:
    long = Fingerprint(parameters={f"layer{number}.weight": "float32 (1,)" for number in range(300)})
    said = Fingerprint().difference(long, "A", "B", buffer_values=True)
    assert said is not None
    assert said.endswith(f"layer{SHOWN - 1}.weight float32 (1,) and {300 - SHOWN} more")
    assert len(said) < 300
