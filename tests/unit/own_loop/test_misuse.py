"""Loops that do what they must not do: each is refused in one line that names the script's line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ormo_rpc.errors import LoopMisused
from ormo_rpc.own_loop.loop import JoinedWorker
from tests.support.own_loops import joined, loss_of, net, work_through

HERE = re.escape(__file__)
Misuse = Callable[[JoinedWorker, torch.nn.Module], None]


def no_push(worker: JoinedWorker, model: torch.nn.Module) -> None:
    """Forget one."""
    for work in worker:
        if work.ticket != 1:
            loss_of(model, work.ticket).backward()
            worker.push()


def two_pushes(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Push twice."""
    for _work in worker:
        worker.push()
        worker.push()


def push_before(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Push without a ticket."""
    worker.push()


def push_after(worker: JoinedWorker, model: torch.nn.Module) -> None:
    """Push when all is over."""
    work_through(worker, model)
    worker.push()


def second_loop(worker: JoinedWorker, model: torch.nn.Module) -> None:
    """Begin again."""
    work_through(worker, model)
    work_through(worker, model)


def many_losses(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Push the losses of the samples."""
    for _work in worker:
        worker.push(torch.ones(3))


def bad_metric(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Push a metric that is no number."""
    for _work in worker:
        worker.push(1.0, metrics={"name": "a"})


def listed_metrics(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Push metrics without names."""
    for _work in worker:
        worker.push(1.0, metrics=[1.0])  # pyright: ignore[reportArgumentType] # wrong on purpose


def half_a_sample(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Push a number of samples that is none."""
    for _work in worker:
        worker.push(1.0, samples=2.5)  # pyright: ignore[reportArgumentType] # wrong on purpose


def no_samples(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Push a batch of nothing."""
    for _work in worker:
        worker.push(1.0, samples=0)


def late_evaluation(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Register an evaluation when the server has begun."""
    for _work in worker:
        worker.evaluate_with(lambda _: 1.0)


def step(worker: JoinedWorker, model: torch.nn.Module) -> None:
    """Keep the step of the script as it was."""
    optimizer = torch.optim.Adam(model.parameters())
    for work in worker:
        loss_of(model, work.ticket).backward()
        if work.ticket == 3:
            optimizer.step()
        worker.push()


def write(worker: JoinedWorker, model: torch.nn.Module) -> None:
    """Do the step by hand."""
    for work in worker:
        loss_of(model, work.ticket).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1)
        worker.push()


def write_past_torch(worker: JoinedWorker, model: torch.nn.Module) -> None:
    """Change values in a way that torch does not count."""
    for work in worker:
        loss_of(model, work.ticket).backward()
        model.get_parameter("2.bias").data.mul_(2.0)
        worker.push()


def freeze(worker: JoinedWorker, model: torch.nn.Module) -> None:
    """Freeze a layer in the loop."""
    for work in worker:
        loss_of(model, work.ticket).backward()
        model.get_parameter("2.bias").requires_grad_(False)
        worker.push()


def push_without_gradients(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Push in a mode in which nothing has gradients."""
    for _work in worker:
        with torch.inference_mode():
            worker.push()


def begin_without_gradients(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Begin the loop in such a mode."""
    with torch.inference_mode():
        next(iter(worker))


def freeze_before(worker: JoinedWorker, model: torch.nn.Module) -> None:
    """Freeze a layer too late."""
    model.get_parameter("0.bias").requires_grad_(False)
    work_through(worker, model)


def replace_before(worker: JoinedWorker, model: torch.nn.Module) -> None:
    """Replace a parameter, which the run would not have."""
    model.get_submodule("0").weight = torch.nn.Parameter(torch.zeros(8, 4))
    work_through(worker, model)


def widen_before(worker: JoinedWorker, model: torch.nn.Module) -> None:
    """Change the dtype too late."""
    work_through(worker, model.double())


def add_before(worker: JoinedWorker, model: torch.nn.Module) -> None:
    """Add a layer too late."""
    model.add_module("head", torch.nn.Linear(3, 3))
    work_through(worker, model)


def no_evaluation(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Give a number for a function."""
    worker.evaluate_with(1.0)  # pyright: ignore[reportCallIssue, reportArgumentType] # wrong on purpose


def half_an_interval(worker: JoinedWorker, _: torch.nn.Module) -> None:
    """Give an interval that is no whole number."""
    worker.evaluate_with(lambda _: 1.0, every=2.5)  # pyright: ignore[reportCallIssue, reportArgumentType] # wrong on purpose


LAST_PUSH = (two_pushes, push_before, push_after, many_losses, bad_metric, write, write_past_torch, freeze)
OTHER = "is another one than at join(), or has another dtype, device or requires_grad, expected the same to the end of the loop"
MESSAGES: dict[Misuse, str] = {
    push_without_gradients: "the loop is in torch.inference_mode(), where nothing has gradients, expected to be outside of it",
    begin_without_gradients: "the loop is in torch.inference_mode(), where nothing has gradients, expected to be outside of it",
    freeze_before: f"model: the parameter 0.bias {OTHER}",
    replace_before: f"model: the parameter 0.weight {OTHER}",
    widen_before: f"model: the parameter 0.bias {OTHER}",
    add_before: f"model: the parameter head.bias {OTHER}",
    no_evaluation: "got float in evaluate_with(), expected a function of the model",
    half_an_interval: "every: got 2.5 in evaluate_with(), expected a whole number >= 1",
    no_push: "the loop goes on without push() for ticket 1, expected one in each of its rounds; ",
    two_pushes: "push() is called again for ticket 0, expected once for each",
    push_before: "push() is called outside of the loop, expected once in each of its rounds",
    push_after: "push() is called outside of the loop, expected once in each of its rounds",
    second_loop: "the loop begins a second time, expected one loop for each join()",
    many_losses: "the loss is of type Tensor of shape (3,), expected a number",
    bad_metric: "push: metrics: name: got 'a', expected a number, or a pair (sum, count)",
    listed_metrics: "push: metrics: got a list, expected numbers by name",
    half_a_sample: "samples: got a float, expected a whole number",
    no_samples: "samples: got 0, expected at least 1",
    late_evaluation: "evaluate_with() is called in or after the loop, expected before it",
    step: "Adam.step() would change the parameter 0.weight; in the loop of ormo_rpc.join the server does the step",
    write: "model: the parameter 0.weight was changed in the loop, expected what the server has sent: leave out ",
    write_past_torch: "model: the parameter 2.bias was changed in the loop, expected what the server has sent: ",
    freeze: "model: 2.bias: got requires_grad=false in the loop, expected true, as at join(), where what is trained is decided",
}


@pytest.mark.parametrize("misuse", MESSAGES, ids=lambda misuse: misuse.__name__)
def test_misuse_names_the_line_of_the_script(misuse: Misuse, tmp_path: Path) -> None:
    model = net()
    worker = joined(model, tmp_path)
    with pytest.raises(LoopMisused) as caught:
        misuse(worker, model)
    found = re.fullmatch(rf"(?:{HERE}|.*own_loops\.py):(\d+): (.*)", str(caught.value))
    assert found is not None, str(caught.value)
    assert found[2].startswith(MESSAGES[misuse])
    if misuse in LAST_PUSH:
        lines, first = inspect.getsourcelines(misuse)
        last = max(number for number, line in enumerate(lines) if "worker.push(" in line)
        assert int(found[1]) == first + last
    if "parameter" in MESSAGES[misuse]:  # nobody's memory was written to
        assert all(each.is_leaf for each in model.parameters())


def test_an_optimizer_of_other_parameters_may_step_and_any_may_after_the_loop(tmp_path: Path) -> None:
    model, other = net(), net(1)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, other)]
    worker = joined(model, tmp_path, tickets=2)

    def before(ticket: int) -> None:
        loss_of(other, ticket).backward()
        optimizers[1].step()

    work_through(worker, model, before)
    loss_of(model, 0).backward()
    trained = [each.detach().clone() for each in model.parameters()]
    optimizers[0].step()
    for parameters, former in ((model.parameters(), trained), (other.parameters(), net(1).parameters())):
        assert not any(torch.equal(now, was) for now, was in zip(parameters, former, strict=True))


def test_an_error_of_the_script_is_its_own_and_the_summary_has_no_success(tmp_path: Path) -> None:
    model = net()
    worker = joined(model, tmp_path)

    def before(ticket: int) -> None:
        if ticket == 3:
            raise IndexError("no such batch")

    with pytest.raises(IndexError, match=r"\Ano such batch\Z"):
        work_through(worker, model, before)
    assert worker.summary is not None
    assert (worker.summary["status"], worker.summary["iterations"]) == ("failed", 3)
    loss_of(model, 0).backward()  # the model is the script's again
    torch.optim.SGD(model.parameters(), 0.1).step()
