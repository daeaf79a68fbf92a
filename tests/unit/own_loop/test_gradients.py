"""The gradients that a script leaves in its model, of any kind, against plain PyTorch with the same passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from ormo_rpc.errors import LoopMisused
from tests.support.own_loops import Normed, assert_same, batch, joined, loss_of, net, plain

Backward = Callable[[torch.nn.Module, int], None]


def train_clipped(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Train in plain PyTorch on the tickets 0 to 3, with gradients clipped to a norm of 0.05."""
    for ticket in range(4):
        optimizer.zero_grad()
        loss_of(model, ticket).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()


class Odd(torch.nn.Module):
    """A network with a sparse embedding, a parameter that no pass uses, a frozen one, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.embedding = torch.nn.Embedding(5, 4, sparse=True)
            self.unused = torch.nn.Parameter(torch.ones(3))
            self.frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
            self.first = torch.nn.Linear(4, 4)
            self.second = torch.nn.Linear(4, 4)
            self.second.weight = self.first.weight

    @override
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = self.embedding((inputs[:, 0] > 0).long())
        return self.second(self.first(inputs * self.frozen + rows).tanh())[:, :3]


def in_two_passes(model: torch.nn.Module, ticket: int) -> None:
    """Two passes, whose gradients add up."""
    inputs, targets = batch(ticket)
    for part in (slice(0, 2), slice(2, 5)):
        (torch.nn.functional.cross_entropy(model(inputs[part]), targets[part], reduction="sum") / 5).backward()


def after_zeroing(model: torch.nn.Module, ticket: int) -> None:
    """A script that drops the gradients first, as most do."""
    model.zero_grad(set_to_none=True)
    loss_of(model, ticket).backward()


def after_zeroing_in_place(model: torch.nn.Module, ticket: int) -> None:
    """An optimizer that sets gradients to zero, and that is not asked to step."""
    torch.optim.SGD(model.parameters(), 0.1).zero_grad(set_to_none=False)
    loss_of(model, ticket).backward()


def clipped(model: torch.nn.Module, ticket: int) -> None:
    """Gradients that are changed before they are pushed."""
    loss_of(model, ticket).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def assigned(model: torch.nn.Module, ticket: int) -> None:
    """Gradients that are assigned, as by an own backward pass."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    found = torch.autograd.grad(loss_of(model, ticket), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient


def assigned_by_data(model: torch.nn.Module, ticket: int) -> None:
    """Gradients whose memory is replaced."""
    loss_of(model, ticket).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data = 2 * parameter.grad.data


def with_graph(model: torch.nn.Module, ticket: int) -> None:
    """Gradients that could be differentiated again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, as gradients and parameters refer to each other
        loss_of(model, ticket).backward(create_graph=True)


@pytest.mark.parametrize(
    "backward",
    [in_two_passes, after_zeroing, after_zeroing_in_place, clipped, assigned, assigned_by_data, with_graph],
)
@pytest.mark.parametrize("make", [net, Odd])
def test_gradients_of_any_kind_are_those_of_plain_pytorch(
    make: Callable[[], torch.nn.Module], backward: Backward, tmp_path: Path
) -> None:
    if make is Odd and backward is clipped:
        pytest.skip("torch does not clip sparse gradients")
    model = make()
    worker = joined(model, tmp_path, tickets=4)
    for work in worker:
        backward(model, work.ticket)
        worker.push()
    assert_same(model, plain(make(), backward, range(4)))


def nothing(_: torch.nn.Module) -> None:
    """Leave the gradients as they are."""


def zero(model: torch.nn.Module) -> None:
    """Drop the gradients, as most scripts do."""
    model.zero_grad()


def assign(model: torch.nn.Module) -> None:
    """Put other tensors in their place."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def assign_by_data(model: torch.nn.Module) -> None:
    """Replace the memory of the gradients."""
    for parameter in model.parameters():
        if parameter.grad is not None:  # as after the last ticket
            parameter.grad.data = torch.ones_like(parameter)


@pytest.mark.parametrize("between", [nothing, zero, assign, assign_by_data])
def test_gradients_from_before_the_loop_and_from_between_do_not_leak_in(
    between: Callable[[torch.nn.Module], None], tmp_path: Path
) -> None:
    model = net()
    loss_of(model, 99).backward()
    worker = joined(model, tmp_path, tickets=4)
    loss_of(model, 98).backward()
    for work in worker:
        loss_of(model, work.ticket).backward()
        worker.push()
        between(model)
        loss_of(model, 97).backward()
    assert_same(model, plain(net(), lambda model, ticket: loss_of(model, ticket).backward(), range(4)))


def test_a_push_that_was_refused_for_its_metrics_is_made_of_the_same_gradients_again(tmp_path: Path) -> None:
    model, other = net(), net()
    words = ("worker.autocast=fp16", "train.weight_decay=0.5", "train.clip_norm=0.05", "train.lr_factors={2.*: 0.5}")
    worker = joined(model, tmp_path, *words, tickets=4)
    for work in worker:
        worker.scaled(loss_of(model, work.ticket)).backward()
        for name in ("a b", "c d"):
            with pytest.raises(LoopMisused, match=r"push: metrics: "):
                worker.push(metrics={name: 1.0})
        worker.push(metrics={"a": 1.0})
    parts = ([other[0].weight, other[0].bias], [other[2].weight, other[2].bias])
    groups: list[dict[str, Any]] = [
        {"params": [each], "lr": rate, "weight_decay": 0.5}
        for part, rate in zip(parts, (0.1, 0.05), strict=True)
        for each in part
    ]
    train_clipped(other, torch.optim.SGD(groups, 0.1))
    assert_same(model, other)


def test_a_push_without_a_backward_pass_is_a_gradient_of_zero(tmp_path: Path) -> None:
    model = net()
    worker = joined(model, tmp_path, tickets=4)
    for work in worker:
        if work.ticket % 2:
            loss_of(model, work.ticket).backward()
        worker.push()
    assert_same(model, plain(net(), lambda model, ticket: loss_of(model, ticket).backward(), [1, 3]))


@pytest.mark.parametrize(("trained", "warnings"), [(True, 0), (False, 1)])
def test_a_loop_that_trains_another_model_is_warned_of(
    trained: bool, warnings: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = net(), net()
    worker = joined(model, tmp_path, "train.weight_decay=0.1", tickets=8)
    for work in worker:
        loss_of(model if trained and work.ticket == 2 else other, work.ticket).backward()
        worker.push()
    found = [record.getMessage() for record in caplog.records if "no gradient" in record.getMessage()]
    assert len(found) == warnings
    assert all(f"{Path(__file__).name}:" in text for text in found)


@pytest.mark.parametrize("training", [True, False])
def test_buffers_travel_and_the_mode_is_the_scripts(training: bool, tmp_path: Path) -> None:
    def backward(model: torch.nn.Module, ticket: int) -> None:
        model.train(training or ticket == 2)
        loss_of(model, ticket).backward()

    model = Normed()
    worker = joined(model, tmp_path, tickets=4)
    for work in worker:
        assert model.training == (work.ticket == 0 or training or work.ticket == 3), "as the script has left it"
        backward(model, work.ticket)
        worker.push()
    assert_same(model, plain(Normed(), backward, range(4)))
    assert not model.norm._forward_hooks, "the loop is over"  # pyright: ignore[reportPrivateUsage] # torch has no other way to look


def test_a_compiled_model_has_the_names_of_the_one_inside(tmp_path: Path) -> None:
    model = net()
    compiled: torch.nn.Module = torch.compile(model, backend="eager")  # pyright: ignore[reportAssignmentType] # its stub says a callable
    worker = joined(compiled, tmp_path, tickets=4)
    for work in worker:
        loss_of(compiled, work.ticket).backward()
        worker.push()
    expected = plain(net(), lambda model, ticket: loss_of(model, ticket).backward(), range(4))
    assert_same(model, expected)
    saved = torch.load(next((tmp_path / "run").glob("checkpoints/*/model.pt")))
    assert saved.keys() == expected.state_dict().keys()


def test_parameter_groups_clipping_and_decay_of_the_configuration_hold(tmp_path: Path) -> None:
    model = net()
    words = ("train.weight_decay=0.1", "train.decay_1d=false", "train.clip_norm=0.05", "train.lr_factors={2.*: 0.5}")
    worker = joined(model, tmp_path, *words, tickets=4)
    for work in worker:
        loss_of(model, work.ticket).backward()
        worker.push()
    other = net()
    groups = [
        {
            "params": [parameter],
            "lr": 0.05 if name.startswith("2.") else 0.1,
            "weight_decay": 0.1 if parameter.dim() > 1 else 0.0,
        }
        for name, parameter in other.named_parameters()
    ]
    train_clipped(other, torch.optim.SGD(groups, 0.1))
    assert_same(model, other)
