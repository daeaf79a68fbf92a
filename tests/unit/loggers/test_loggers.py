"""Loggers: the progress bar on a real terminal, and beside which loggers it appears."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.loggers import RunInfo, RunLog, start_logs
from ormo_rpc.loggers.none import NoLogger
from ormo_rpc.loggers.progress import ProgressBar
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.loggers.wandb import WandbLogger, WandbRunLog
from ormo_rpc.tasks import Classification
from ormo_rpc.tasks.metrics import metric_named
from tests.support.error_task import MAE
from tests.support.events import apply_event
from tests.support.fake_wandb import FakeWandb


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
        bar = ProgressBar(50, terminal, lambda name: metric_named(name, [*Classification().metrics(), MAE]))
        bar.log({"iteration": 5, "epoch": 0.5, "train_loss": 1.23456, "delay_mean": 2.04, "delay_max": 6}, statistics())
        late = {
            "test_loss": 1.5,
            "test_accuracy": 0.9125,
            "test_mae": 0.25,
            "val_mae": 0.375,
            "test_odd": 3.0,
            "train_odd": 2.0,
        }
        bar.log({"iteration": 4, "epoch": 0.4, **late}, statistics())  # an evaluation
        bar.finish({})
        os.close(terminal)
        with contextlib.suppress(OSError):  # the end of what a closed terminal has shown
            while True:
                shown += os.read(reading, 100_000)
    finally:
        os.close(reading)
    last = shown.decode().rstrip().split("\r")[-1]
    fields = ("epoch=0.5", "loss=1.2346", "delay=2.0", "accuracy=91.25%", "error=0.2", "val error=0.4", "odd=3.0000")
    pattern = rf" *10%\|.* 5/50 \[.*it.*, {', '.join(map(re.escape, fields))}\]"
    assert re.fullmatch(pattern, last), last


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
