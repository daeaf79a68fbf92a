"""Tensors in the memory of a trained parameter are refused; parameters that merely have a storage in common are not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ormo_rpc.models.flat import FlatModel

Change = Callable[[Any], object]


def model(change: Change) -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    change(made)
    return made


def frozen(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def split_columns(made: Any) -> None:
    """Two weights are halves of one matrix, neither of them contiguous."""
    both = torch.randn(4, 8)
    made[0].weight, made[1].weight = nn.Parameter(both[:, :4]), nn.Parameter(both[:, 4:])


SHARED: dict[str, tuple[Change, str]] = {
    "weights": (lambda made: setattr(made[1].weight, "data", made[0].weight.data), "1.weight"),
    "transposed": (lambda made: setattr(made[1], "weight", nn.Parameter(made[0].weight.data.t())), "1.weight"),
    "frozen": (lambda made: setattr(made[1], "weight", frozen(made[0].weight.data)), "1.weight"),
    "one row": (lambda made: made[1].register_buffer("row", made[0].weight.detach()[2]), "1.row"),
    "expanded": (lambda made: made.register_buffer("row", made[0].weight.detach()[:1].expand(3, 4)), "row"),
    "other dtype": (lambda made: made.register_buffer("bits", made[0].weight.detach().view(torch.int32)), "bits"),
    "itself": (lambda made: made.register_buffer("same", made[0].weight), "same"),
}
ALLOWED: dict[str, Change] = {
    "one parameter twice": lambda made: setattr(made[1], "weight", made[0].weight),
    "one vector": lambda made: nn.utils.vector_to_parameters(torch.randn(40), made.parameters()),
    "columns": split_columns,
    "buffers": lambda made: (made.register_buffer("a", torch.zeros(4)), made.register_buffer("b", made.a[:2])),
    "frozen ones": lambda made: (made[0].requires_grad_(False), made.register_buffer("row", made[0].weight.data[0])),
    "empty": lambda made: made.register_buffer("nothing", made[0].weight.detach()[:0]),
}


@pytest.mark.parametrize("name", SHARED)
def test_memory_of_a_trained_parameter_is_refused(name: str) -> None:
    change, refused = SHARED[name]
    text = f"model: {refused}: got the memory of 0.weight, which is trained, expected memory of its own; share a parameter by"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        FlatModel(model(change))


@pytest.mark.parametrize("name", ALLOWED)
def test_what_shares_no_memory_with_a_trained_parameter_is_allowed(name: str) -> None:
    module = model(ALLOWED[name])
    before = [each.detach().clone() for each in module.parameters() if each.requires_grad]
    flat = FlatModel(module)
    flat.bind(flat.flat_params())
    for here, there in zip(flat.trainable.values(), before, strict=True):
        assert torch.equal(here, there)
