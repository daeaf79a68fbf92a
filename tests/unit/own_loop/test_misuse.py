"""Loops that do what they must not do: each is refused in one line that names the script's line."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ormo_rpc
from ormo_rpc.errors import ConfigError, LoopMisused
from ormo_rpc.own_loop.configuring import OVERRIDES
from ormo_rpc.own_loop.loop import JoinedWorker
from tests.support.own_loops import QUIET, joined, loss_of, net, work_through

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


LAST_PUSH = (two_pushes, push_before, push_after, many_losses, bad_metric, write, write_past_torch, freeze)
MESSAGES: dict[Misuse, str] = {
    no_push: "the loop goes on without push() for ticket 1, expected one in each of its rounds; ",
    two_pushes: "push() is called again for ticket 0, expected once for each",
    push_before: "push() is called outside of the loop, expected once in each of its rounds",
    push_after: "push() is called outside of the loop, expected once in each of its rounds",
    second_loop: "the loop begins a second time, expected one loop for each join()",
    many_losses: "the loss is of type Tensor of shape (3,), expected a number",
    bad_metric: "push: metrics: name: got 'a', expected a number, or a pair (sum, count)",
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
    optimizers[0].step()


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


REFUSED: dict[tuple[str, ...], str] = {
    ("train.epochs=3",): r"train.epochs: got a value in a loop of your own, expected none: the length of the run is ",
    ("train.batch_size=3",): r"train.batch_size: got a value in a loop of your own, expected none: ",
    ("dataset=mnist",): r"dataset: got a value in a loop of your own, expected none: its dataset is the script's",
    ("model.hidden=3",): r"model.hidden: got a value in a loop of your own, expected none: its model is the script's",
    ("task=regression",): r"task: got a value in a loop of your own, expected none: its task is the script's",
    ("runtime=sim",): r"runtime: got sim in a loop of your own, expected rpc: a simulation ",
    ("runtime=replay", "replay.run=x"): r"runtime: got replay in a loop of your own, expected rpc: its gradients come from ",
    ("algorithm=orlomo",): r"algorithm: got orlomo in a loop of your own, expected one without local steps, ",
    ("algorithm=easgd",): r"algorithm: got easgd in a loop of your own, expected one without local steps, ",
    ("worker.prefetch=1",): r"worker.prefetch: got 1 in a loop of your own, expected 0: ",
    ("worker.dummy=true",): r"worker.dummy: got a value in a loop of your own, expected none: gradients are the script's",
    ("workers=4",): r"workers: got 4 in a script that runs alone, in one process; start it with ormo-rpc launch --workers N ",
    ("runtime.min_workers=2",): r"runtime.min_workers: got 2 in a script that runs alone, in one process; ",
    ("runtime.faults=[kill@0:1]",): r"runtime.faults: got \['kill@0:1'\] in a script that runs alone, in one process; ",
    ("role=worker",): r"server.address: got None with role=worker, expected HOST:PORT of the running server",
    ("train.no_decay=[nothing.*]",): r"train.no_decay: ",
    ("train.lr=0.1",): r"train.lr: got a value beside lr= in join\(\), expected one of the two",
    ("no.such=1",): r"no: ",
    ("checkpoint.resume=/nowhere",): r"/nowhere: got a path without an intact checkpoint",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_a_loop_of_ones_own_cannot_have_is_refused_in_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        joined(net(), tmp_path, *words)
    assert re.match(REFUSED[words], str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_tickets": 0}, r"total_tickets: got 0 in join\(\), expected a whole number >= 1"),
        ({"total_tickets": 1.5}, r"total_tickets: got 1.5 in join\(\), expected a whole number >= 1"),
        ({"total_tickets": 3, "tickets_per_epoch": 0}, r"tickets_per_epoch: got 0 in join\(\), expected a whole number >= 1"),
        ({"total_tickets": 3, "lr": 0.0}, r"lr: got 0.0 in join\(\), expected a number > 0, or a function "),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"\A{message}"):
        ormo_rpc.join(net(), *QUIET, **arguments)  # pyright: ignore[reportArgumentType] # wrong ones on purpose


def test_a_model_that_cannot_be_trained_is_refused() -> None:
    model = net().requires_grad_(False)
    with pytest.raises(ConfigError, match=r"\Amodel: got no trainable parameter, expected at least one\Z"):
        ormo_rpc.join(model, *QUIET, total_tickets=1)


@pytest.mark.parametrize("form", [json.dumps, " ".join])
def test_the_command_line_is_stronger_than_join(
    form: Callable[[list[str]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OVERRIDES, form(["train.max_iterations=3", "train.lr=0.5", "seed=7"]))
    model, rates = net(), list[float]()
    worker = joined(model, tmp_path, "seed=1", lr=lambda _: 0.1)
    for work in worker:
        rates.append(work.lr)
        worker.push()
    assert rates == [0.5] * 3
    assert "seed: 7" in (tmp_path / "run" / "config.yaml").read_text()
    monkeypatch.setenv(OVERRIDES, "[1]")
    with pytest.raises(ConfigError, match=rf"\A{OVERRIDES}: got '\[1\]' in the environment, expected a list such as "):
        joined(net(), tmp_path)


def test_a_run_directory_is_for_one_run(tmp_path: Path) -> None:
    model = net()
    work_through(joined(model, tmp_path, tickets=1), model)
    model = net()
    worker = joined(model, tmp_path, tickets=1)
    with pytest.raises(ConfigError, match=r"got the directory of an earlier run, expected a new one"):
        work_through(worker, model)
