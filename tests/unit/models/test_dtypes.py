"""Parameters of several dtypes in one model: masters in one vector, cast copies where they are computed with."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from ormo_rpc.errors import ModelRefused
from ormo_rpc.messages import no_buffers
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.models.passes import Passes
from tests.support.dtypes import Homogeneous, Masters, Mixed

FINE = 1 + 2**-12
"""A float32 that neither 16-bit dtype has."""


def filled(model: FlatModel, value: float = FINE) -> Tensor:
    return torch.full((model.params.size,), value, dtype=model.dtype)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float32"], torch.float32),
        (["float64"], torch.float64),
        (["bfloat16"], torch.float32),
        (["float16"], torch.float32),
        (["bfloat16", "float16"], torch.float32),
        (["float16", "float64", "float32"], torch.float64),
    ],
    ids=str,
)
def test_the_vector_has_the_widest_of_float32_and_the_parameters_dtypes(dtypes: list[str], expected: torch.dtype) -> None:
    model = FlatModel(nn.Sequential(*(nn.Linear(2, 2, dtype=getattr(torch, dtype)) for dtype in dtypes)))
    assert model.dtype == model.flat_params().dtype == expected
    assert model.has_half == ("float16" in dtypes)


def test_a_parameter_of_the_vectors_dtype_is_a_view_and_another_one_a_cast_copy() -> None:
    model = FlatModel(Mixed())
    start = model.flat_params()
    for name, value in model.params.views(start).items():  # exactly, as every value of 16 bits is one of float32
        assert torch.equal(value, model.trainable[name].detach().float())
    params = filled(model)
    model.bind(params)
    inside = {
        name
        for name, each in model.trainable.items()
        if params.data_ptr() <= each.data_ptr() < params.data_ptr() + params.nbytes
    }
    assert {name for name, each in model.trainable.items() if each.dtype is torch.float32} == inside
    assert inside < model.trainable.keys()
    for name, each in model.trainable.items():
        assert torch.equal(each, torch.full_like(each, FINE)), name
    assert torch.equal(params, filled(model))


def test_cast_copies_are_made_anew_in_the_same_memory_and_so_follow_a_vector_that_is_written_over() -> None:
    model = FlatModel(Homogeneous())
    params = filled(model, 1.0)
    model.bind(params)
    addresses = [each.data_ptr() for each in model.trainable.values()]
    params.fill_(2.0)
    model.bind(params)
    assert [each.data_ptr() for each in model.trainable.values()] == addresses
    assert all((each == 2).all() for each in model.trainable.values())


def test_a_tied_parameter_stays_one_and_frozen_ones_keep_dtype_and_value() -> None:
    module = Mixed()
    model = FlatModel(module)
    assert "third.weight" not in model.trainable
    assert "frozen" not in model.trainable
    model.bind(filled(model, 3.0))
    assert module.third.weight is module.second.weight
    assert (module.frozen.dtype, module.frozen[0].item()) == (torch.float16, 0.5)


def test_gradients_have_the_parameters_dtype_and_add_up_in_the_vectors_where_they_are_collected() -> None:
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    model = FlatModel(layer)
    model.bind(torch.ones(1))
    grad = torch.zeros(1)
    model.bind_grad(grad)
    for value in (256.0, 1.0, 1.0):  # 257 and 258 need more than the 8 bits of bfloat16
        layer(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.bfloat16
        model.collect_grad()
    assert grad.tolist() == [258.0]
    layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    model.zero_grad()
    model.collect_grad()
    assert grad.tolist() == [0.0]


def test_gradients_that_were_put_elsewhere_or_are_none_or_sparse_are_collected() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.replaced = (nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(3))
            self.table = nn.Embedding(3, 2, sparse=True, dtype=torch.float16)

    net = Net()
    model = FlatModel(net)
    grad = torch.zeros(model.params.size)
    for _ in range(2):
        grad.zero_()
        model.bind_grad(grad)
        (net.used.sum() + net.table(torch.tensor([1, 1])).sum()).backward()
        net.unused.grad = None
        net.replaced.grad = torch.full((2,), 3.0, dtype=torch.bfloat16)
        model.collect_grad()
        assert grad.tolist() == [1, 1, 0, 0, 3, 3, 0, 0, 2, 2, 0, 0]


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("shift", ["float32", "float64"])
def test_gradients_are_those_of_plain_pytorch_at_the_casts_of_the_masters(half: str, shift: str) -> None:
    torch.manual_seed(0)
    module, twin = Mixed(half, shift), Mixed(half, shift)
    twin.load_state_dict(module.state_dict())
    model = FlatModel(module)
    masters = Masters(twin, lr=0.5, momentum=0.0, dtype=model.dtype)
    inputs = torch.rand(8, 1, 8, 8)
    params = model.flat_params()
    for _ in range(3):
        model.bind(params)
        grad = torch.zeros_like(params)
        model.bind_grad(grad)
        module(inputs).square().mean().backward()
        model.collect_grad()
        expected = masters.gradients(lambda: twin(inputs).square().mean().backward())
        for name, value in model.params.views(grad).items():
            assert torch.equal(value, expected[name]), name
        masters.step(expected)
        params -= 0.5 * grad


def test_the_state_dict_has_the_modules_own_dtypes_and_is_rounded_to_nearest() -> None:
    model = FlatModel(Mixed("float16"))
    params = filled(model, 1 + 2**-11)  # half way between two numbers of float16: to the one that is even
    state = model.state_dict(params, model.buffers.copy())
    module = Mixed("float16")
    assert {name: each.dtype for name, each in state.items()} == {
        name: each.dtype for name, each in module.state_dict().items()
    }
    assert (state["second.weight"] == 1.0).all()
    assert (state["head.weight"] == 1 + 2**-11).all()
    module.load_state_dict(state)


def test_the_fingerprint_has_each_parameters_own_dtype() -> None:
    found = Fingerprint.of(Mixed()).parameters
    assert found["second.weight"] == "bfloat16 (16, 16)"
    assert found["head.weight"] == "float32 (10, 16)"


@pytest.mark.parametrize("through_data", [False, True], ids=["in place", "by data"])
def test_a_pass_that_writes_to_a_cast_copy_is_refused(through_data: bool) -> None:
    module = Homogeneous()
    model = FlatModel(module)
    passes = Passes(model)
    model.bind(filled(model))
    passes.begin(no_buffers())
    passes.begin_pass()
    weight = model.trainable["net.1.weight"]
    if through_data:
        weight.data.add_(1)
    else:
        with torch.no_grad():
            weight.add_(1)
    with pytest.raises(ModelRefused, match=r"^model: net\.1\.weight: got another value from a forward pass"):
        passes.end_pass()
    model.bind(filled(model))
    passes.begin_pass()
    passes.end_pass()  # to bind again is no write


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.ReLU(), "model: got no trainable parameter, expected at least one"),
        (
            nn.Linear(2, 2, dtype=torch.complex64),
            "model: weight: got a trainable parameter of torch.complex64, expected one of float16, bfloat16, float32, float64; "
            "real pairs take the place of complex numbers",
        ),
    ],
    ids=["none", "complex"],
)
def test_a_model_without_a_dtype_that_is_trained_is_refused(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FlatModel(net)


def test_casts_that_autocast_keeps_do_not_outlive_the_parameters() -> None:
    layer = nn.Linear(4, 1, bias=False)
    model = FlatModel(layer)
    found: list[float] = []
    with torch.autocast("cpu", enabled=False):  # one that is open all the time: the inner ones keep their casts
        for value in (1.0, 2.0):
            model.bind(torch.full((4,), value))
            with torch.autocast("cpu", torch.bfloat16):
                found.append(layer(torch.ones(1, 4)).item())
    assert found == [4.0, 8.0]
