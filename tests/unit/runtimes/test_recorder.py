"""From a server's events to trace, metrics, statistics and dashboards, each counted again from the events themselves."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import termios
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from ormo_rpc import build_server
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.loggers.dashboards import ProgressBar, Wandb, dashboards, plain
from ormo_rpc.messages import Push
from ormo_rpc.runtimes.job import JobLike
from ormo_rpc.runtimes.recorder import Recorder
from ormo_rpc.server.events import Event, Kind, Statistics
from ormo_rpc.storage.run_directory import RunDirectory, read_summary, write_summary
from ormo_rpc.worker.evaluation import Evaluation
from tests.support.processes import PATIENCE_SECONDS

TOTAL = 30
CONFIG = parse_config({"workers": 3, "logger": {"log_seconds": 2.0, "mode": "disabled"}})


class Recording:
    """A dashboard that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.closed: list[Mapping[str, Any]] = []

    def show(self, row: Mapping[str, Any], statistics: Statistics) -> None:
        """Keep a row, and how far the statistics were."""
        self.rows.append({**row, "seen": statistics.iterations})

    def close(self, summary: Mapping[str, Any]) -> None:
        """Keep the summary."""
        self.closed.append(summary)


class TenIterationsAnEpoch:
    """What a recorder looks at of a job."""

    config = CONFIG
    total_tickets = TOTAL
    batches_per_epoch = 10

    def lr(self, _iteration: int) -> float:
        """Always the same."""
        return 0.5

    def epoch(self, iteration: int) -> float:
        """Ten iterations are one."""
        return iteration / 10


class Run:
    """A recorder with a clock that is set by hand, and the server whose events it records."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.held = 0.0
        self.job = cast("JobLike", TenIterationsAnEpoch())
        self.shown = Recording()
        self.folder = folder
        self.directory = RunDirectory(folder)
        figures = lambda: {"lock_held_seconds": self.held}  # noqa: E731 - one use, one line
        self.recorder = Recorder(self.job, self.directory, [self.shown], lambda: self.now, figures)
        self.server = build_server(
            params=torch.zeros(2),
            num_workers=3,
            lr=0.5,
            total_tickets=TOTAL,
            record=self.recorder.record,
            clock=lambda: self.now,
        )
        self.pending = self.server.start()

    def push(self, count: int, position: int = 0) -> None:
        """Let the worker that has waited longest push, or the one at a position."""
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
            )
            self.pending += self.server.receive(push)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What a file of the run directory holds by now."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    made.directory.close()


# -- statistics --------------------------------------------------------------------------------------------------------


def apply(iteration: int, worker: int, delay: int, loss: float | None = None) -> Event:
    return Event(
        Kind.apply,
        0.0,
        {"iteration": iteration, "worker": worker, "delay": delay, "samples": 8, "loss": loss, "ticket": iteration},
    )


def test_statistics_by_hand() -> None:
    statistics = Statistics()
    assert (statistics.delay_mean, statistics.delay_max, statistics.loss) == (0.0, 0, None)
    assert statistics.delay_counts() == [0]
    for event in (
        apply(4, 0, 2, loss=3.0),  # of a run that was resumed at iteration 4
        apply(5, 1, 0),
        Event(Kind.discard, 0.0, {"worker": 1, "delay": 9}),
        apply(6, 1, 5, loss=53.0),
        Event(Kind.repeat, 0.0, {"worker": 0}),
        Event(Kind.issue, 0.0, {"worker": 0}),
    ):
        statistics.observe(event)
    assert (statistics.iterations, statistics.gradients_computed) == (7, 4)
    assert (statistics.discarded, statistics.repeated) == (1, 1)
    assert statistics.pushes_per_worker == {0: 1, 1: 3}
    assert statistics.delay_sum_per_worker == {0: 2, 1: 5}  # of what was applied
    assert statistics.delay_mean == pytest.approx(7 / 3)  # (2 + 0 + 5) / 3
    assert statistics.delay_max == 5
    assert statistics.delay_counts() == [1, 0, 1, 0, 0, 1]
    assert statistics.loss == pytest.approx(4.0)  # 3 + (53 - 3) / 50


# -- trace and metrics -------------------------------------------------------------------------------------------------


def test_the_trace_has_every_event_and_the_statistics_are_its_sums(run: Run) -> None:
    run.push(7)
    run.now = 1.25
    run.push(6, position=1)  # the first in line waits, and grows old
    run.push(5)
    assert run.lines("trace.jsonl") == []  # nothing is written on the update path
    run.recorder.pump()
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


def test_a_row_of_metrics_comes_when_its_time_has_come(run: Run) -> None:
    run.now = 1.9
    run.push(5)
    run.recorder.pump()
    assert run.lines("metrics.jsonl") == []
    run.now, run.held = 2.0, 0.25
    run.recorder.pump()
    run.now = 4.5
    run.recorder.pump()  # nothing new
    run.push(10)
    run.now = 5.0
    run.recorder.pump()
    run.push(1)
    run.recorder.pump()
    run.recorder.pump(now=True)
    rows = run.lines("metrics.jsonl")
    assert [(row["iteration"], row["epoch"], row["seconds"]) for row in rows] == [(5, 0.5, 2.0), (15, 1.5, 5.0), (16, 1.6, 5.0)]
    # 5 updates in 2 s; 10 in 3 s; the third row follows at once, which is no rate to tell.
    assert [row["updates_per_second"] for row in rows[:2]] == [2.5, 3.33]
    assert (rows[0]["lr"], rows[0]["lock_held_seconds"]) == (0.5, 0.25)
    # Losses 0, 1, 2, 3, 4: each new one moves the average by a fiftieth of its distance.
    loss = 0.0
    for ticket in range(1, 5):
        loss += (ticket - loss) / 50
    assert rows[0]["train_loss"] == pytest.approx(loss)
    # Three workers in turn: delays 0, 1, 2, 2, 2.
    assert (rows[0]["delay_mean"], rows[0]["delay_max"]) == (1.4, 2)
    assert [{key: row[key] for key in row if key != "seen"} for row in run.shown.rows] == rows


def test_the_rate_of_a_resumed_run_counts_its_own_updates(run: Run) -> None:
    for iteration in range(1000, 1006):
        run.recorder.record(apply(iteration, 0, 0))
    run.now = 3.0
    run.recorder.pump()
    (row,) = run.lines("metrics.jsonl")
    assert (row["iteration"], row["updates_per_second"]) == (1006, 2.0)  # 6 updates in 3 s


def test_an_evaluation_is_a_row_of_the_iteration_that_it_belongs_to(run: Run) -> None:
    run.push(12)
    run.recorder.pump()
    run.now = 1.0
    run.recorder.evaluated(10, 0.75, Evaluation(loss=0.25, accuracy=0.875))
    run.recorder.pump()
    (row,) = run.lines("metrics.jsonl")
    assert row == {"iteration": 10, "epoch": 1.0, "seconds": 0.75, "test_loss": 0.25, "test_accuracy": 0.875}
    assert run.shown.rows == [{**row, "seen": 12}]


def test_the_end_writes_the_rest_and_the_summary_before_any_dashboard_closes(run: Run, tmp_path: Path) -> None:
    run.push(3)
    summary = {"status": "completed", "iterations": 3}
    found: list[Any] = []
    run.shown.close = lambda summary: found.append((summary, read_summary(tmp_path), len(run.lines("metrics.jsonl"))))
    run.recorder.close(summary)
    assert found == [(summary, summary, 1)]
    assert len([line for line in run.lines("trace.jsonl") if line["event"] == "apply"]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"trace.jsonl", "metrics.jsonl", "summary.json"}


# -- the run directory -------------------------------------------------------------------------------------------------


def test_a_directory_is_used_once(tmp_path: Path) -> None:
    RunDirectory.claim(tmp_path)
    assert (tmp_path / "trace.jsonl").read_bytes() == b""
    directory = RunDirectory(tmp_path)
    directory.write_header(seed=3)
    directory.write_processes(11, {1: 13, 0: 12}, "127.0.0.1:9")
    directory.close()
    with pytest.raises(ConfigError) as caught:
        RunDirectory.claim(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: got the directory of an earlier run, expected a new one; go on with checkpoint.resume={tmp_path}"
    )
    header = json.loads((tmp_path / "trace.jsonl").read_text())
    assert (header["event"], header["version"], header["seed"]) == ("header", 1, 3)
    assert (header["torch"], header["threads"]) == (torch.__version__, torch.get_num_threads())
    assert {"commit", "python", "cpu", "capability"} <= header.keys()
    assert json.loads((tmp_path / "processes.json").read_text()) == {
        "server": 11,
        "workers": {"0": 12, "1": 13},
        "address": "127.0.0.1:9",
    }
    assert read_summary(tmp_path) is None


def test_of_two_that_claim_a_directory_at_once_one_gets_it(tmp_path: Path) -> None:
    together = threading.Barrier(2)

    def claim(path: Path) -> bool:
        together.wait(PATIENCE_SECONDS)
        try:
            RunDirectory.claim(path)
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(2) as both:
        for number in range(50):
            assert sorted(both.map(claim, [tmp_path / "runs" / str(number)] * 2)) == [False, True]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    row = {"iteration": 3, "loss": math.nan, "rate": math.inf, "eta": -math.inf, "momentum": 0.5, "reason": None}
    directory.write_event(Event(Kind.apply, 1.5, row))
    directory.write_metrics(row)
    directory.close()
    write_summary(tmp_path, row)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    trace, metrics, summary = (
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
        for name in ("trace.jsonl", "metrics.jsonl", "summary.json")
    )
    expected = {**row, "loss": None, "rate": None, "eta": None}
    assert trace == {"event": "apply", "seconds": 1.5, **expected}
    assert metrics == summary == read_summary(tmp_path) == expected


# -- dashboards --------------------------------------------------------------------------------------------------------


def statistics() -> Statistics:
    made = Statistics()
    for iteration, (worker, delay) in enumerate([(0, 0), (1, 3), (1, 1), (0, 0), (2, 6)]):
        made.observe(apply(iteration, worker, delay))
    return made


def test_the_progress_bar_shows_where_the_run_is() -> None:
    reading, terminal = os.openpty()
    try:
        termios.tcsetwinsize(terminal, (24, 200))
        bar = ProgressBar(50, 0, terminal)
        bar.show({"epoch": 0.5, "train_loss": 1.23456}, statistics())
        bar.show({"epoch": 0.5, "test_accuracy": 0.9125}, statistics())
        bar.close({})
        shown = os.read(reading, 100_000).decode()
    finally:
        os.close(reading)
        os.close(terminal)
    # Five of 50 iterations; delays (0 + 3 + 1 + 0 + 6) / 5 = 2; what an earlier row told still stands.
    last = shown.rstrip().split("\r")[-1]
    pattern = r" *10%\|.* 5/50 \[.*it.*, epoch=0\.5, loss=1\.2346, delay=2\.0, accuracy=91\.25%\]"
    assert re.fullmatch(pattern, last), last


class FakeRun:
    """The run of a wandb that only takes notes."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.metrics: list[tuple[str, str]] = []
        self.finished = 0

    def define_metric(self, name: str, *, step_metric: str) -> None:
        """Note what is drawn over what."""
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        """Note a row, which must be of plain values."""
        json.dumps({key: value for key, value in row.items() if key != "delay/histogram"})  # plain values
        self.logged.append(row)

    def finish(self) -> None:
        """Note the end."""
        self.finished += 1


class Histogram:
    """As wandb's: counts and the edges of their bins."""

    MAX_LENGTH = 4

    def __init__(self, np_histogram: tuple[Any, Any]) -> None:
        self.counts, self.edges = (array.tolist() for array in np_histogram)


class FakeWandb(SimpleNamespace):
    """Stands in for the module wandb."""

    Histogram = Histogram

    class Error(Exception):  # noqa: D106 - stands for wandb's own
        pass

    def __init__(self, failure: str | None = None) -> None:
        super().__init__()
        self.run = FakeRun()
        self.arguments: dict[str, Any] = {}
        self.failure = failure

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802 - its name there
        """As they are given."""
        return settings

    def init(self, **arguments: Any) -> FakeRun:
        """Start, or fail to."""
        if self.failure is not None:
            raise self.Error(self.failure)
        self.arguments = arguments
        return self.run


def test_wandb_gets_every_row_with_delays_by_worker_and_their_histogram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = parse_config({"workers": 3, "seed": 5, "logger": {"project": "p", "group": "g"}})
    dashboard = Wandb(config, tmp_path)
    given = fake.arguments
    assert (given["project"], given["name"], given["group"]) == ("p", "ormo-async-3w-seed5", "g")
    assert (given["mode"], given["dir"]) == ("offline", tmp_path)
    assert parse_config(given["config"]) == config  # all of it, in plain values
    assert fake.run.metrics == [("*", "iteration")]

    dashboard.show({"iteration": 5, "train_loss": 1.5}, statistics())
    dashboard.show({"iteration": 5, "test_accuracy": 0.5}, statistics())
    dashboard.close({"status": "completed", "mode": config.logger.mode})
    # Worker 0 had the delays 0 and 0, worker 1 had 3 and 1, worker 2 had 6.
    per_worker = {"delay/worker_0": 0.0, "delay/worker_1": 2.0, "delay/worker_2": 6.0}
    first, second = fake.run.logged
    assert first == {"iteration": 5, "train_loss": 1.5, **per_worker}
    histogram = second.pop("delay/histogram")
    assert second == {"iteration": 5, "test_accuracy": 0.5, **per_worker}
    # Delays 0, 0, 1, 3, 6 in at most four bins: seven values make bins of two.
    assert (histogram.counts, histogram.edges) == ([3, 1, 0, 1], [0, 2, 4, 6, 8])
    assert fake.run.summary == {"status": "completed", "mode": "offline"}
    assert fake.run.finished == 1


def test_wandb_that_cannot_start_names_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("not logged in"))
    with pytest.raises(ValueError, match="wandb") as caught:
        Wandb(parse_config({"workers": 1, "logger": {"mode": "online"}}), tmp_path)
    assert str(caught.value) == "logger.mode: wandb cannot start online: not logged in; use logger.mode=offline"


@pytest.mark.parametrize(
    ("mode", "progress", "terminal", "expected"),
    [
        ("disabled", True, False, []),
        ("disabled", False, True, []),
        ("disabled", True, True, [ProgressBar]),
        ("offline", True, True, [Wandb, ProgressBar]),
    ],
)
def test_dashboards_are_those_that_are_asked_for(
    mode: str, progress: bool, terminal: bool, expected: list[type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    config = parse_config({"workers": 1, "logger": {"mode": mode, "progress": progress}})
    reading, writing = os.openpty()
    try:
        shown = dashboards(config, tmp_path, 10, writing if terminal else None)
        assert [type(dashboard) for dashboard in shown] == expected
        for dashboard in shown:
            dashboard.close({})
    finally:
        os.close(reading)
        os.close(writing)


def test_plain_replaces_enumerations_all_the_way_down() -> None:
    mode = Config().logger.mode
    assert plain({1: [mode, (mode, {"a": mode})], "b": 2}) == {"1": ["offline", ["offline", {"a": "offline"}]], "b": 2}
