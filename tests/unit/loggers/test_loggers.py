"""Loggers: the progress bar on a real terminal, and wandb by a stand-in for its module."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ormo_rpc.loggers import RunInfo, RunLog, start_logs
from ormo_rpc.loggers.none import NoLogger
from ormo_rpc.loggers.progress import ProgressBar
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.loggers.wandb import WandbLogger, WandbMode, WandbRunLog
from tests.support.events import apply_event


def run_info(directory: Path) -> RunInfo:
    return RunInfo(name="ormo-async-3w-seed5", config={"seed": 5}, directory=directory, total_iterations=50)


def statistics() -> Statistics:
    """Five gradients of three workers, with the delays 0, 3, 1, 0, 6."""
    made = Statistics()
    for iteration, (worker, delay) in enumerate([(0, 0), (1, 3), (1, 1), (0, 0), (2, 6)]):
        made.observe(apply_event(iteration, worker, delay))
    return made


def test_the_progress_bar_shows_iteration_epoch_and_the_metrics_with_a_label() -> None:
    reading, terminal = os.openpty()
    shown = b""
    try:
        termios.tcsetwinsize(terminal, (24, 200))
        bar = ProgressBar(50, terminal)
        bar.log({"iteration": 5, "epoch": 0.5, "train_loss": 1.23456, "delay_mean": 2.04, "delay_max": 6}, statistics())
        bar.log({"iteration": 4, "epoch": 0.4, "test_loss": 1.5, "test_accuracy": 0.9125}, statistics())  # a late evaluation
        bar.finish({})
        os.close(terminal)
        with contextlib.suppress(OSError):  # the end of what a closed terminal has shown
            while True:
                shown += os.read(reading, 100_000)
    finally:
        os.close(reading)
    last = shown.decode().rstrip().split("\r")[-1]
    pattern = r" *10%\|.* 5/50 \[.*it.*, epoch=0\.5, loss=1\.2346, delay=2\.0, accuracy=91\.25%\]"
    assert re.fullmatch(pattern, last), last


class FakeRun:
    """A wandb run that takes notes only."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.metrics: list[tuple[str, str]] = []
        self.finished = 0

    def define_metric(self, name: str, *, step_metric: str) -> None:
        """Note a metric and its x axis."""
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        """Note a row, which must be of plain values."""
        json.dumps({key: value for key, value in row.items() if key != "delay/histogram"})
        self.logged.append(row)

    def finish(self) -> None:
        """Note the end."""
        self.finished += 1


class Histogram:
    """Counts and the edges of their bins, given as to ``wandb.Histogram``."""

    MAX_LENGTH = 4

    def __init__(self, np_histogram: tuple[Any, Any]) -> None:
        self.counts, self.edges = (array.tolist() for array in np_histogram)


class FakeWandb(SimpleNamespace):
    """A stand-in for the module wandb."""

    Histogram = Histogram

    class Error(Exception):  # noqa: D106 - stands for wandb's own
        pass

    def __init__(self, failure: str | None = None) -> None:
        super().__init__()
        self.run = FakeRun()
        self.arguments: dict[str, Any] = {}
        self.failure = failure

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802 - its name there
        """Return the settings."""
        return settings

    def init(self, **arguments: Any) -> FakeRun:
        """Start a run, or fail to."""
        if self.failure is not None:
            raise self.Error(self.failure)
        self.arguments = arguments
        return self.run


def test_wandb_gets_every_row_with_delays_by_worker_and_their_histogram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = WandbLogger(project="p", group="g").start(run_info(tmp_path))
    given = fake.arguments
    assert (given["project"], given["name"], given["group"]) == ("p", "ormo-async-3w-seed5", "g")
    assert (given["mode"], given["dir"], given["config"]) == ("offline", tmp_path, {"seed": 5})
    assert fake.run.metrics == [("*", "iteration")]

    log.log({"iteration": 5, "train_loss": 1.5}, statistics())
    log.log({"iteration": 5, "test_accuracy": 0.5}, statistics())
    log.finish({"status": "completed"})
    # Worker 0 had the delays 0 and 0, worker 1 had 3 and 1, worker 2 had 6.
    per_worker = {"delay/worker_0": 0.0, "delay/worker_1": 2.0, "delay/worker_2": 6.0}
    first, second = fake.run.logged
    assert first == {"iteration": 5, "train_loss": 1.5, **per_worker}
    histogram = second.pop("delay/histogram")
    assert second == {"iteration": 5, "test_accuracy": 0.5, **per_worker}
    # Delays 0, 0, 1, 3, 6 in at most four bins: seven values make bins of two.
    assert (histogram.counts, histogram.edges) == ([3, 1, 0, 1], [0, 2, 4, 6, 8])
    assert fake.run.summary == {"status": "completed"}
    assert fake.run.finished == 1


def test_a_wandb_that_cannot_start_is_an_error_with_the_key_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("not logged in"))
    with pytest.raises(ValueError, match="wandb") as caught:
        WandbLogger(mode=WandbMode.online, run_name="mine").start(run_info(tmp_path))
    assert str(caught.value) == (
        "logger.mode: wandb cannot start online: not logged in; use logger.mode=offline or logger=none"
    )


@pytest.mark.parametrize(
    ("logger", "terminal", "expected"),
    [
        (NoLogger(), False, [RunLog]),
        (NoLogger(progress=False), True, [RunLog]),
        (NoLogger(), True, [RunLog, ProgressBar]),
        (WandbLogger(), True, [WandbRunLog, ProgressBar]),
        (WandbLogger(progress=False), True, [WandbRunLog]),
    ],
    ids=str,
)
def test_the_bar_appears_beside_any_logger_where_there_is_a_terminal(
    logger: Any, terminal: bool, expected: list[type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    reading, writing = os.openpty()
    try:
        logs = start_logs(logger, run_info(tmp_path), writing if terminal else None)
        assert [type(log) for log in logs] == expected
        for log in logs:
            log.finish({})
    finally:
        os.close(reading)
        os.close(writing)
