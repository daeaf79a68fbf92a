"""From a server's events to trace, rows of metrics, statistics and logs, each counted again from the events themselves."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from typing_extensions import override

from ormo_rpc import build_server, train
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.config.schema import Config
from ormo_rpc.loggers import RunLog
from ormo_rpc.loggers.metrics import measure_by_name
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.messages import Push
from ormo_rpc.runtimes.job_like import JobLike
from ormo_rpc.runtimes.recorder import Recorder
from ormo_rpc.storage.run_directory import RunDirectory
from ormo_rpc.storage.summary import Summary, read_summary
from ormo_rpc.worker.evaluation import Evaluation
from tests.support.events import apply_event

TOTAL = 30
CONFIG = parse_config({"workers": 3, "logger": {"name": "none", "log_seconds": 2.0, "log_iterations": 1000}})


class ListLog(RunLog):
    """A log that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @override
    def log(self, row: Mapping[str, Any], statistics: Statistics) -> None:
        self.rows.append({**row, "seen": statistics.iterations})


class Broken(RunLog):
    """A log that cannot be finished."""

    @override
    def finish(self, summary: Mapping[str, Any]) -> None:
        raise RuntimeError("no network")


class TenIterationsAnEpoch:
    """The part of a job that a recorder reads."""

    total_tickets = TOTAL
    batches_per_epoch = 10

    def __init__(self, config: Config = CONFIG) -> None:
        self.config = config

    def lr(self, _iteration: int) -> float:
        """Return a constant."""
        return 0.5

    def epoch(self, iteration: int) -> float:
        """Count ten iterations as one epoch."""
        return iteration / 10


class Run:
    """A recorder with a clock that is set by hand, and a server whose events it records."""

    def __init__(self, folder: Path, config: Config = CONFIG, *, started: bool = True) -> None:
        self.now = 0.0
        self.held = 0.0
        self.job = cast("JobLike", TenIterationsAnEpoch(config))
        self.shown = ListLog()
        self.folder = folder
        self.directory = RunDirectory(folder)
        extra_metrics = lambda: {"lock_held_seconds": self.held}  # noqa: E731 - one use, one line
        self.logs: Future[list[RunLog]] = Future()
        if started:
            self.logs.set_result([self.shown])
        self.recorder = Recorder(self.job, self.directory, lambda: self.now, extra_metrics)
        self.recorder.give_rows_to(self.logs)
        self.server = build_server(
            params=torch.zeros(2),
            num_workers=3,
            lr=0.5,
            total_tickets=TOTAL,
            record=self.recorder.record,
            clock=lambda: self.now,
        )
        self.pending = self.server.start()

    def push(self, count: int, position: int = 0, metrics: Mapping[str, Any] | None = None) -> None:
        """Push for the oldest pending reply, or the one at a position."""
        for _ in range(count):
            reply = self.pending.pop(position)
            assert reply.ticket is not None
            push = Push(
                worker=reply.worker,
                ticket=reply.ticket,
                stamp=reply.stamp,
                grad=torch.ones(2),
                loss=float(reply.ticket),
                samples=10,
                metrics={} if metrics is None else metrics,
            )
            self.pending += self.server.receive(push)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Read a file of the run directory."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    made.directory.close()


def test_the_trace_has_every_event_and_the_statistics_are_its_sums(run: Run) -> None:
    run.push(7)
    run.now = 1.25
    run.push(6, position=1)  # the oldest reply waits, and its delay grows
    run.push(5)
    assert run.lines("trace.jsonl") == []  # nothing is written on the update path
    run.recorder.flush()
    trace = run.lines("trace.jsonl")
    kinds = Counter(line["event"] for line in trace)
    assert kinds == {"issue": 3 + 18, "apply": 18}
    applied = [line for line in trace if line["event"] == "apply"]
    assert {"iteration", "worker", "ticket", "stamp", "bucket", "delay", "eta", "seconds", "grad_sum"} <= applied[0].keys()
    assert [line["seconds"] for line in applied] == [0.0] * 7 + [1.25] * 11
    assert all(float.fromhex(line["grad_sum"]) == 2.0 and line["eta"] == 0.5 for line in applied)

    delays = [line["iteration"] - line["stamp"] for line in applied]
    statistics = run.recorder.statistics
    assert statistics.delay_mean == pytest.approx(np.mean(delays))
    assert statistics.delay_max == max(delays) > 3
    assert statistics.pushes_per_worker == Counter(line["worker"] for line in applied)
    assert statistics.delays == Counter(delays)
    assert statistics.delay_counts() == [delays.count(delay) for delay in range(max(delays) + 1)]
    assert [line["samples"] for line in applied] == [10] * 18


def test_a_row_of_metrics_is_written_every_log_seconds(run: Run) -> None:
    run.now = 1.9
    run.push(5)
    run.recorder.flush()
    assert run.lines("metrics.jsonl") == []
    run.now, run.held = 2.0, 0.25
    run.recorder.flush()
    run.now = 4.5
    run.recorder.flush()  # nothing new
    run.push(10)
    run.now = 5.0
    run.recorder.flush()
    run.push(1)
    run.recorder.flush()
    run.recorder.flush(row=True)
    rows = run.lines("metrics.jsonl")
    # At the time of their last gradient.
    assert [(row["iteration"], row["epoch"], row["seconds"]) for row in rows] == [(5, 0.5, 1.9), (15, 1.5, 4.5), (16, 1.6, 5.0)]
    # 5 updates in 1.9 s, 10 in the next 2.6 s, 1 in 0.5 s.
    assert [row["updates_per_second"] for row in rows] == [2.63, 3.85, 2.0]
    assert (rows[0]["lr"], rows[0]["lock_held_seconds"]) == (0.5, 0.25)
    assert rows[0]["train_loss"] == pytest.approx(2.0)  # of the losses 0, 1, 2, 3, 4
    # Three workers in turn: delays 0, 1, 2, 2, 2.
    assert (rows[0]["delay_mean"], rows[0]["delay_max"]) == (1.4, 2)
    assert [{key: row[key] for key in row if key != "seen"} for row in run.shown.rows] == rows


def test_a_row_is_written_every_log_iterations_at_the_time_of_their_last_event(tmp_path: Path) -> None:
    run = Run(tmp_path, parse_config({"workers": 3, "logger": {"name": "none", "log_seconds": 2.0, "log_iterations": 4}}))
    for seconds in (0.25, 0.5, 0.75):  # five gradients at each of these moments, and one flush for all of them
        run.now = seconds
        run.push(5)
    run.now = 1.0
    run.recorder.flush()
    rows = run.lines("metrics.jsonl")
    assert [(row["iteration"], row["seconds"], row["updates_per_second"]) for row in rows] == [
        (5, 0.25, 20.0),
        (10, 0.5, 20.0),
    ]
    run.now = 3.0
    run.push(1)
    run.recorder.flush()  # in the midst of a moment, perhaps
    assert [row["iteration"] for row in run.lines("metrics.jsonl")] == [5, 10, 15]
    run.now = 3.5
    run.recorder.flush()  # log_seconds counts as well
    assert [row["iteration"] for row in run.lines("metrics.jsonl")] == [5, 10, 15, 16]
    run.directory.close()


def test_the_shortest_run_has_a_curve(tmp_path: Path) -> None:
    options = ["runtime=sim", "logger=none", "train.max_iterations=60", "runtime.compute_seconds=0.01", "model.hidden=8"]
    summary = train([*options, "workers=2"], run_dir=tmp_path)
    assert summary["virtual_seconds"] < 1
    losses = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in losses if "train_loss" in row]) >= 20


def test_the_rate_of_the_last_row_ends_with_the_last_gradient(run: Run) -> None:
    run.now = 2.0
    run.push(16)
    run.now = 100.0  # a long evaluation
    run.recorder.flush(row=True)
    (row,) = run.lines("metrics.jsonl")
    assert (row["iteration"], row["seconds"], row["updates_per_second"]) == (16, 2.0, 8.0)


def test_the_rate_of_a_resumed_run_counts_its_own_updates(run: Run) -> None:
    for iteration in range(1000, 1006):
        run.recorder.record(dataclasses.replace(apply_event(iteration, 0, 0), seconds=1.5))
    run.now = 3.0
    run.recorder.flush()
    (row,) = run.lines("metrics.jsonl")
    assert (row["iteration"], row["updates_per_second"]) == (1006, 4.0)  # 6 updates in 1.5 s


def test_the_first_rate_of_a_restarted_server_is_over_the_time_since_its_checkpoint(run: Run) -> None:
    run.now = 8.0
    run.push(20)
    run.recorder.flush()
    again = Run(run.folder / "again")
    again.recorder.continue_from(run.recorder.statistics.state_dict())
    again.now = 10.0
    again.push(4)
    again.recorder.flush(row=True)
    (row,) = again.lines("metrics.jsonl")
    assert (row["seconds"], row["updates_per_second"]) == (10.0, 2.0)  # 4 in 2 s, not 24 in 10 s
    again.directory.close()


def test_rows_have_the_means_of_what_was_pushed_since_the_last_one_and_the_summary_those_of_the_run(run: Run) -> None:
    for seconds, tokens in ((1.0, 10.0), (2.0, 20.0), (4.0, 60.0)):
        run.now = seconds
        run.push(1, metrics={"tokens": tokens, "hits": (tokens, 2 * tokens + 10)} | ({"norm": math.inf} if tokens > 10 else {}))
        if seconds != 1.0:
            run.now = seconds + 0.5
            run.recorder.flush()
    run.now = 5.0
    run.push(2)  # without any
    run.recorder.flush(row=True)
    rows = [
        {key: row[key] for key in row if key in ("train_tokens", "train_hits", "train_norm")}
        for row in run.lines("metrics.jsonl")
    ]
    # (10 + 20) / 2 and 60; (10 + 20) / (30 + 50) and 60 / 130.
    assert rows == [{"train_tokens": 15.0, "train_hits": 0.375}, {"train_tokens": 60.0, "train_hits": 60 / 130}, {}]
    assert [row for row in run.shown.rows if "train_tokens" in row]
    trace = [line["metrics"] for line in run.lines("trace.jsonl") if "metrics" in line]
    assert trace[1:] == [
        {"tokens": 20.0, "hits": [20.0, 50.0], "norm": None},
        {"tokens": 60.0, "hits": [60.0, 130.0], "norm": None},
    ]
    content = run.recorder.close(Summary(by_name=measure_by_name(run.recorder.measurements(5.0, 5))))
    assert (content["train_tokens"], content["train_hits"]) == (30.0, 90 / 210)
    assert "train_norm" not in content  # never finite
    assert read_summary(run.folder) == content == Summary.from_dict(content).to_dict()


def test_an_evaluation_is_a_row_of_the_iteration_whose_parameters_it_is_of(run: Run) -> None:
    run.push(12)
    run.recorder.flush()
    run.now = 1.0
    run.recorder.record_evaluation(10, 0.75, Evaluation({"loss": 0.25, "accuracy": 0.875}))
    run.recorder.flush()
    (row,) = run.lines("metrics.jsonl")
    assert row == {"iteration": 10, "epoch": 1.0, "seconds": 0.75, "test_loss": 0.25, "test_accuracy": 0.875}
    assert run.shown.rows == [{**row, "seen": 12}]


def test_the_summary_is_written_before_a_log_is_finished(run: Run, tmp_path: Path) -> None:
    run.push(3)
    found: list[Any] = []
    run.shown.finish = lambda summary: found.append((summary, read_summary(tmp_path), len(run.lines("metrics.jsonl"))))
    content = run.recorder.close(Summary(status="completed", iterations=3))
    assert (content["status"], content["iterations"]) == ("completed", 3)
    assert found == [(content, content, 1)]
    assert len([line for line in run.lines("trace.jsonl") if line["event"] == "apply"]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"trace.jsonl", "metrics.jsonl", "summary.json"}


def test_a_log_that_starts_late_gets_the_rows_before(tmp_path: Path) -> None:
    """Start of wandb takes a second or more, which a run does not wait for."""
    run = Run(tmp_path, started=False)
    for _ in range(2):
        run.push(2)
        run.now += 3.0
        run.recorder.flush()
    run.logs.set_result([run.shown])
    run.push(2)
    run.now += 3.0
    run.recorder.flush()
    assert [{key: row[key] for key in row if key != "seen"} for row in run.shown.rows] == run.lines("metrics.jsonl")
    assert [row["iteration"] for row in run.shown.rows] == [row["seen"] for row in run.shown.rows] == [2, 4, 6]
    run.directory.close()


def test_a_log_that_cannot_start_ends_the_run_unless_that_is_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, started=False)
    run.push(2)
    run.recorder.flush()
    run.logs.set_exception(ValueError("logger.mode: wandb cannot start"))
    with pytest.raises(ValueError, match=r"^logger\.mode: wandb cannot start$"):
        run.recorder.flush()
    run.directory.close()
    over = Run(tmp_path / "over", started=False)
    over.push(2)
    over.recorder.flush(row=True)
    timer = threading.Timer(0.05, over.logs.set_exception, [ValueError("logger.mode: wandb cannot start")])
    timer.start()
    assert over.recorder.close(Summary(status="completed"))["status"] == "completed"
    timer.join()
    said = "the run is over before its logger has started: ValueError: logger.mode: wandb cannot start"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_log_that_cannot_be_finished_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, started=False)
    run.logs.set_result([Broken(), run.shown])
    assert run.recorder.close(Summary(status="completed"))["status"] == "completed"
    assert [record.getMessage() for record in caplog.records] == ["Broken cannot be finished: RuntimeError: no network"]
