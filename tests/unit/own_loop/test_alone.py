"""A script that runs alone: the same numbers as a built-in run and as plain PyTorch, and the same records."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ormo_rpc
from ormo_rpc.composing import compose
from ormo_rpc.errors import ConfigError, Interrupted, LoopMisused
from ormo_rpc.runtimes.configured import build_module
from ormo_rpc.seeding import seed_for
from ormo_rpc.training import train
from tests.support.own_loops import QUIET, TICKETS, assert_same, joined, loss_of, net, plain, work_through


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON."""
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("algorithm=naive", "train.weight_decay=0.01", "train.clip_norm=0.5")])
def test_the_same_batches_give_the_parameters_of_the_built_in_task_to_the_bit(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """With dropout, which draws from the generators that both seed."""
    words = [*QUIET, *overrides]
    built_in = [*words, "model.hidden=8", "model.dropout=0.3", "runtime=sim", "workers=1", "train.max_iterations=60"]
    expected = train(built_in, run_dir=tmp_path / "built in")
    config = compose(built_in)
    data = config.dataset.load_splits(config.seed)
    model = build_module(config, data)
    epochs = ormo_rpc.Epochs(len(data.train), config.train.batch_size, config.seed)
    worker = ormo_rpc.join(
        model, *words, total_tickets=60, tickets_per_epoch=epochs.batches_per_epoch, run_dir=tmp_path / "own"
    )
    for work in worker:
        inputs, targets = data.train.batch(epochs.indices(work.ticket), None)
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        worker.push(loss, samples=len(targets))
    assert worker.summary is not None
    for key in ("final_params_sha256", "train_loss", "iterations", "epochs", "status"):
        assert worker.summary[key] == expected[key], key
    assert (worker.summary["model"], worker.summary["dataset"]) == ("MLPNetwork", "own loop")


def test_the_loop_trains_as_plain_pytorch_does(tmp_path: Path) -> None:
    model, seen = net(), list[tuple[int, int, float, int]]()
    worker = joined(model, tmp_path)
    assert worker.serves
    for work in worker:
        seen.append((work.ticket, work.stamp, work.lr, work.seed))
        loss = loss_of(model, work.ticket)
        loss.backward()
        worker.push(loss)
    assert seen == [(ticket, ticket, 0.1, seed_for(0, "forward", ticket)) for ticket in range(TICKETS)]
    assert_same(model, plain(net(), lambda model, ticket: loss_of(model, ticket).backward()))


def test_the_records_of_a_run_are_there(tmp_path: Path) -> None:
    model = net()
    worker = joined(model, tmp_path, tickets=20)

    @worker.evaluate_with
    def evaluate(model: torch.nn.Module) -> dict[str, Any]:
        assert not model.training
        return {"accuracy": torch.tensor(0.5), "loss": loss_of(model, 99)}

    assert callable(evaluate), "it stays what it was"
    for work in worker:
        loss = loss_of(model, work.ticket)
        loss.backward()
        worker.push(loss, metrics={"tokens": 5, "mean": (torch.tensor(3.0), 2)})
    folder, summary = tmp_path / "run", worker.summary
    assert summary is not None
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["iterations"], summary["test_accuracy"]) == ("completed", 20, 0.5)
    rows = read(folder / "metrics.jsonl")
    assert [row["iteration"] for row in rows if "test_loss" in row] == list(range(2, 21, 2)), "every tenth of the run"
    assert rows[-1]["test_loss"] == pytest.approx(loss_of(model, 99).item()), "of the final parameters"
    assert any(row.get("train_tokens") == 5 for row in rows)
    saved = torch.load(next(folder.glob("checkpoints/*/model.pt")))
    other = net(1)
    other.load_state_dict(saved)
    assert_same(other, model)


@pytest.mark.parametrize("every", [None, 5])
def test_evaluations_come_when_they_are_due(every: int | None, tmp_path: Path) -> None:
    model, seen = net(), list[torch.Tensor]()
    worker = ormo_rpc.join(model, *QUIET, "algorithm=asgd", total_tickets=12, tickets_per_epoch=4, run_dir=tmp_path / "run")
    worker.evaluate_with(lambda model: seen.append(next(model.parameters()).detach().clone()) or 1.0, every=every)
    at = list[torch.Tensor]()
    for work in worker:
        at.append(next(model.parameters()).detach().clone())
        loss_of(model, work.ticket).backward()
        worker.push()
    expected = [at[5], at[10], next(model.parameters())] if every else [at[4], at[8], next(model.parameters())]
    assert all(map(torch.equal, seen, expected))
    assert len(seen) == 3


def test_the_clock_of_training_stands_still_during_evaluations(tmp_path: Path) -> None:
    model, evaluated = net(), list[float]()
    words = ("evaluate.every=1", "evaluate.targets=[0.5]")
    worker = ormo_rpc.join(model, *QUIET, *words, total_tickets=6, run_dir=tmp_path / "run")

    @worker.evaluate_with
    def evaluate(_: torch.nn.Module) -> float:
        began = time.monotonic()
        threading.Event().wait(0.5)
        evaluated.append(time.monotonic() - began)
        return 1.0 if len(evaluated) < 4 else 0.0

    assert callable(evaluate)
    work_through(worker, model)
    summary = worker.summary
    assert summary is not None
    assert len(evaluated) == 6
    # Of the wall time to the fourth update three evaluations, 1.5 s, are no time of training.
    assert summary["gradients_to"] == {"0.5": 4}
    assert summary["seconds_to"]["0.5"] < 1.5
    assert summary["training_seconds"] < 2.5
    assert summary["training_seconds"] > 0


def test_an_evaluation_may_do_what_it_likes_with_its_model_and_may_fail(tmp_path: Path) -> None:
    model = net()
    worker = joined(model, tmp_path)
    calls = itertools.count()

    def evaluate(model: torch.nn.Module) -> float:
        model.train()
        for parameter in model.parameters():
            parameter.zero_()
        if next(calls) % 2:
            raise ZeroDivisionError("nothing to evaluate")
        return 1.0

    worker.evaluate_with(evaluate, every=3)
    work_through(worker, model)
    assert_same(model, plain(net(), lambda model, ticket: loss_of(model, ticket).backward()))
    assert worker.summary is not None
    assert (worker.summary["status"], worker.summary["failed_evaluations"]) == ("completed", 2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda _: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda _: {"loss": "low"}, "the evaluation's 'loss' is of type str, expected a number"),
        (lambda _: {"top-5": 1.0}, r"the evaluation returned \['top-5'\], expected metrics by names such as 'loss'"),
    ],
)
def test_the_reason_of_a_failed_evaluation_has_the_line(function: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    model = net()
    worker = joined(model, tmp_path, tickets=2)
    worker.evaluate_with(function)
    work_through(worker, model)
    assert worker.summary is not None
    assert re.search(rf"test_alone\.py:\d+: {message}", worker.summary["reason"])


def test_a_learning_rate_may_be_a_function_of_the_iteration(tmp_path: Path) -> None:
    model, rates = net(), list[float]()
    worker = joined(model, tmp_path, lr=lambda iteration: 0.1 * iteration)  # a warm-up begins at 0
    for work in worker:
        rates.append(work.lr)
        loss_of(model, work.ticket).backward()
        worker.push()
    assert rates == [0.1 * iteration for iteration in range(TICKETS)]
    other = net()
    for iteration in range(TICKETS):
        other.zero_grad()
        loss_of(other, iteration).backward()
        torch.optim.SGD(other.parameters(), 0.1 * iteration).step()
    assert_same(model, other)


def test_a_run_that_was_left_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    worker = joined(model, tmp_path, "checkpoint.every=1")
    for work in worker:
        if work.ticket == 7:
            break  # its ticket is handed out again
        loss_of(model, work.ticket).backward()
        worker.push()
    assert worker.summary is not None
    assert (worker.summary["status"], worker.summary["iterations"]) == ("failed", 7)
    assert worker.summary["reason"] == "the script left its loop at iteration 7, before the end"
    assert f"resume with checkpoint.resume={tmp_path}" in capsys.readouterr().err
    model = net(1)
    worker = ormo_rpc.join(
        model,
        *("algorithm=asgd", *QUIET, f"checkpoint.resume={tmp_path / 'run'}"),
        total_tickets=TICKETS,
        lr=0.1,
        run_dir=tmp_path / "more",
    )
    tickets = list[int]()
    for work in worker:
        tickets.append(work.ticket)
        loss_of(model, work.ticket).backward()
        worker.push()
    assert tickets == list(range(7, TICKETS))
    assert_same(model, plain(net(), lambda model, ticket: loss_of(model, ticket).backward()))
    with pytest.raises(ConfigError, match=r"\Acheckpoint.resume: iteration 12 of 12 is done; raise total_tickets "):
        joined(net(), tmp_path / "done", f"checkpoint.resume={tmp_path / 'more'}")


@pytest.mark.parametrize("inside", [True, False])
def test_a_signal_leaves_a_checkpoint(inside: bool, tmp_path: Path) -> None:
    """Also one that comes in the midst of an evaluation, which is completed first."""
    model = net()
    worker = joined(model, tmp_path)
    if inside:
        worker.evaluate_with(lambda _: signal.raise_signal(signal.SIGTERM) or 1.0, every=5)

    def before(ticket: int) -> None:
        if ticket == 5 and not inside:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        work_through(worker, model, before)
    assert caught.value.number == signal.SIGTERM
    assert worker.summary is not None
    assert (worker.summary["status"], worker.summary["reason"], worker.summary["iterations"]) == ("interrupted", "SIGTERM", 5)
    assert Path(worker.summary["checkpoint"]).is_dir()


def test_random_draws_are_functions_of_the_seed_and_the_ticket(tmp_path: Path) -> None:
    def draws(folder: str) -> list[float]:
        model = net()
        worker, found = joined(model, tmp_path / folder, tickets=3), list[float]()
        for _ in worker:
            found.append(torch.rand(()).item())
            worker.push()
        return found

    torch.manual_seed(1)
    first, between = draws("one"), torch.rand(())
    assert draws("two") == first
    torch.manual_seed(1)
    assert torch.equal(torch.rand(()), between), "the script's own state is as it was"


def test_a_script_may_stop_early_by_its_evaluation(tmp_path: Path) -> None:
    model = net()
    worker = joined(model, tmp_path, "evaluate.patience=2", "optimized_metric=test_loss")
    worker.evaluate_with(lambda _: 1.0, every=2)
    work_through(worker, model)
    assert worker.summary is not None
    assert (worker.summary["status"], worker.summary["iterations"]) == ("completed", 7), "one was handed out before"
    assert "evaluate.patience=2" in worker.summary["reason"]


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: float("nan"), r"lr: got nan at iteration 3 from the function "),
    ],
)
def test_a_learning_rate_that_fails_later_is_the_reason_of_the_end(
    later: Callable[[], float], message: str, tmp_path: Path
) -> None:
    model = net()
    worker = joined(model, tmp_path, lr=lambda iteration: 0.1 if iteration < 3 else later())
    with pytest.raises(RuntimeError, match=message):
        work_through(worker, model)
    assert worker.summary is not None
    assert worker.summary["status"] == "failed"


def test_a_learning_rate_may_be_a_tensor(tmp_path: Path) -> None:
    model = net()
    worker = joined(model, tmp_path, lr=lambda _: torch.tensor(0.25))  # pyright: ignore[reportArgumentType] # as schedulers have
    work_through(worker, model)
    assert {row["eta"] for row in read(tmp_path / "run" / "trace.jsonl") if row["event"] == "apply"} == {0.25}


def test_a_process_that_the_script_forks_leaves_the_run_alone_when_it_ends(tmp_path: Path) -> None:
    model = net()
    worker = joined(model, tmp_path)
    work = iter(worker)
    ticket = next(work).ticket
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(LoopMisused):
            worker.push()
            os._exit(1)
        del work
        worker.__dict__.clear()
        gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert not (tmp_path / "run" / "summary.json").exists()
    assert '"end"' not in (tmp_path / "run" / "trace.jsonl").read_text()
    loss_of(model, ticket).backward()
    worker.push()
    for each in work:
        loss_of(model, each.ticket).backward()
        worker.push()
    assert worker.summary is not None
    assert worker.summary["status"] == "completed"
