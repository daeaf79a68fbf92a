"""Buffers that come all together enter to the bit as they do one by one, and nothing enters so that would be refused then."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from ormo_rpc.compression import Encoder, PushFormat
from ormo_rpc.errors import NonFiniteGradient, PushRefused
from ormo_rpc.messages import Push
from ormo_rpc.models.buffers import ModelBuffers
from ormo_rpc.models.flat import Layout
from ormo_rpc.server.buffer_layout import PackedTensors, same_bytes
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.packed_buffers import Reported
from ormo_rpc.server.validation import validate_push
from ormo_rpc.transports.push_reader import PushReader

PARAMS = torch.zeros(3)


def norms(*momenta: float | None) -> ModelBuffers:
    """Return the buffers of batch norms with these momenta, and of one more value without a rule."""
    module = nn.Sequential(*(nn.BatchNorm1d(3 + number, momentum=each) for number, each in enumerate(momenta)))
    module.register_buffer("seen", torch.zeros(2))
    return ModelBuffers(module)


def reported(buffers: ModelBuffers, number: int, calls: int = 1) -> dict[str, Tensor]:
    """Return what a push reports of all of them."""
    generator = torch.Generator().manual_seed(number)
    drawn = {name: torch.rand(each.shape, generator=generator) for name, each in buffers.tensors.items()}
    return {name: torch.tensor(calls) if name.endswith("tracked") else value for name, value in drawn.items()}


def pushed(buffers: ModelBuffers, values: dict[str, Tensor]) -> Push:
    """Return a push whose buffers have crossed in their wire form."""
    form = PushFormat(params=Layout({"w": PARAMS}), buffers=buffers.layout, dtype=torch.float32)
    encoder = Encoder(form)
    encoder.push.fill_(0.5)
    encoder.buffers.write(values)
    grad, found = form.unpack(encoder.wire)
    return Push(worker=0, ticket=0, stamp=0, grad=grad, buffers=found)


@pytest.mark.parametrize("momenta", [(0.1, 0.1, 0.1), (0.1, 0.3), (None, None), (None, 0.1), (1.0,)])
def test_they_enter_to_the_bit_as_one_by_one(momenta: tuple[float | None, ...]) -> None:
    buffers = norms(*momenta)
    together, apart = (RunningBuffers(buffers.tensors, buffers.rules) for _ in range(2))
    for number, calls in enumerate((1, 1, 3, 0, 2)):
        values = reported(buffers, number, calls)
        push = pushed(buffers, values)
        assert type(push.buffers) is PackedTensors
        validated = validate_push(push, PARAMS, together)
        assert isinstance(validated.buffers, Reported)
        assert validated.grad_sum == 1.5
        assert validated.tensors()[1] is validated.buffers.flat
        together.update(validated.buffers)
        apart.update(values)
        for name, value in apart.current.items():
            assert same_bytes(together.current[name], value), f"{name} after push {number}"


def test_some_of_them_are_seen_one_by_one() -> None:
    buffers = norms(0.1, 0.1)
    running = RunningBuffers(buffers.tensors, buffers.rules)
    values = reported(buffers, 0)
    del values["seen"]
    push = pushed(buffers, values)
    assert type(push.buffers) is dict
    validated = validate_push(push, PARAMS, running)
    assert validated.buffers == push.buffers
    assert len(validated.tensors()) == 1 + len(push.buffers)
    other = norms(0.1, 0.1, 0.1)  # in the layout of another model
    with pytest.raises(PushRefused, match="must build the same model"):
        validate_push(pushed(other, reported(other, 0)), PARAMS, running)


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("0.running_mean", float("nan"), NonFiniteGradient, r"buffer '0.running_mean': got 1 of 3 values NaN"),
        ("1.running_var", float("inf"), NonFiniteGradient, r"buffer '1.running_var': got 1 of 4 values NaN"),
        ("1.running_var", -1e-30, PushRefused, r"buffer '1.running_var': got a negative variance"),
        ("1.num_batches_tracked", -1, PushRefused, r"buffer '1.num_batches_tracked': got -1 calls"),
        ("0.num_batches_tracked", 2**31, PushRefused, r"buffer '0.num_batches_tracked': got 2147483648 calls"),
        ("0.num_batches_tracked", 2**62 + 1, PushRefused, r"buffer '0.num_batches_tracked': got 4611686018427387905 calls"),
    ],
)
def test_impossible_ones_are_refused_with_their_name(name: str, value: float, error: type[Exception], text: str) -> None:
    buffers = norms(0.1, 0.1)
    running = RunningBuffers(buffers.tensors, buffers.rules)
    values = reported(buffers, 0)
    values[name] = values[name].clone()
    values[name].view(-1)[-1] = value
    with pytest.raises(error, match=text):
        validate_push(pushed(buffers, values), PARAMS, running)


def test_what_is_possible_alone_is_so_together() -> None:
    buffers = norms(0.1)
    running = RunningBuffers(buffers.tensors, buffers.rules)
    values = {**reported(buffers, 0), "0.running_mean": torch.full((3,), torch.finfo(torch.float32).max)}
    push = pushed(buffers, values)
    validated = validate_push(push, PARAMS, running)  # their sum is infinite
    assert validated.buffers is push.buffers
    running.update(validated.buffers)


def test_a_gradient_that_is_not_finite_is_told_first() -> None:
    buffers = norms(0.1)
    push = pushed(buffers, {**reported(buffers, 0), "0.running_var": torch.full((3,), -1.0)})
    bad = dataclasses.replace(push, grad=torch.tensor([1.0, float("inf"), 0.0]))
    with pytest.raises(NonFiniteGradient, match="gradient: got 1 of 3 values"):
        validate_push(bad, PARAMS, RunningBuffers(buffers.tensors, buffers.rules))


def test_what_a_worker_changes_after_the_check_does_not_enter() -> None:
    buffers = norms(0.1, 0.1)
    running, expected = (RunningBuffers(buffers.tensors, buffers.rules) for _ in range(2))
    form = PushFormat(params=Layout({"w": PARAMS}), buffers=buffers.layout, dtype=torch.float32)
    encoder = Encoder(form)
    reader = PushReader(form, encoder.wire, shared=True)
    values = reported(buffers, 0)
    encoder.buffers.write(values)
    push = reader.read({"worker": 0, "ticket": 0, "stamp": 0})
    validated = validate_push(push, PARAMS, running)
    assert isinstance(validated.buffers, Reported)
    encoder.wire.fill_(255)
    running.update(validated.buffers)
    expected.update(values)
    assert all(same_bytes(running.current[name], value) for name, value in expected.current.items())


def test_buffers_of_one_sort_lie_side_by_side() -> None:
    buffers = norms(0.1, 0.1)
    starts = sorted(buffers.tensors, key=lambda name: buffers.layout.span(name))
    assert [name.split("_")[-1] for name in starts] == ["mean", "mean", "var", "var", "tracked", "tracked", "seen"]
    assert list(buffers.layout.views(buffers.initial)) == list(buffers.tensors)
    assert all(same_bytes(each, buffers.tensors[name]) for name, each in buffers.layout.views(buffers.initial).items())
