"""The closing line of a command names the metrics of the task, and says their values as the task writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ormo_rpc import cli
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.storage.summary import Summary, identity, metrics_as_dict
from ormo_rpc.tasks import Classification, TaskMetric
from ormo_rpc.tasks.metrics import LOSS
from ormo_rpc.tasks.own_loop import OwnLoopTask
from tests.support.error_task import Distance

CLASSIFICATION, DISTANCE = Classification().metrics(), Distance().metrics()
OWN = tuple(map(OwnLoopTask().metric, ("loss", "f1")))


@pytest.mark.parametrize(
    ("keys", "within"),
    [
        ({}, False),
        ({"scheduler": {"name": "sync"}}, True),
        ({"scheduler": {"name": "partial"}}, False),
        ({"algorithm": {"name": "m_sync", "m": 2}}, True),
        ({"algorithm": {"name": "rennala"}}, True),
        ({"algorithm": {"name": "ringmaster"}}, False),
        ({"runtime": {"name": "ddp"}}, True),
    ],
    ids=str,
)
def test_delays_of_rounds_are_said_to_be_within_a_round(keys: dict[str, Any], within: bool) -> None:
    figures: dict[str, Any] = {"status": "completed", "iterations": 9, "virtual_seconds": 3.25, "delay_mean": 1.5}
    known = {**identity(parse_config({"workers": 4, **keys})), **figures, "wall_seconds": 2.0, "training_seconds": 3.25}
    line = cli._result(Summary.from_dict(known).to_dict(), Path("run"))  # pyright: ignore[reportPrivateUsage] # what is printed
    assert f" in 3.2 virtual seconds (2.0 s of real time), mean delay 1.5{' within a round' * within}, training loss" in line


@pytest.mark.parametrize(
    ("metrics", "figures", "said"),
    [
        (CLASSIFICATION, {"test_loss": 0.5, "test_accuracy": 0.97222}, "test accuracy 97.22%"),
        (CLASSIFICATION, {"test_accuracy": 0.5, "val_accuracy": 0.25}, "test accuracy 50.00%, validation accuracy 25.00%"),
        (CLASSIFICATION, {}, "test accuracy -"),
        (None, {"test_accuracy": 0.5}, "test accuracy 50.00%"),  # of an earlier version
        (DISTANCE, {"test_loss": 0.5, "test_mae": 1.26, "test_hits": 0.5, "val_mae": 2.0}, "test mae 1.3, validation mae 2.0"),
        ((LOSS,), {"test_loss": 0.5, "val_loss": 0.25}, "test loss 0.5000, validation loss 0.2500"),
        ((LOSS, TaskMetric("spread", "", higher_is_better=False)), {"test_spread": 3.0}, "test spread 3.0000"),
        (OWN, {"test_loss": 0.5, "test_f1": 0.75}, "test f1 0.7500"),
    ],
)
def test_the_closing_line_has_the_metrics_of_the_task(
    metrics: tuple[TaskMetric, ...] | None, figures: dict[str, Any], said: str
) -> None:
    declared = None if metrics is None else metrics_as_dict(metrics)
    given = {"status": "completed", "iterations": 9, "training_seconds": 1.0, "wall_seconds": 2.0, "delay_mean": 1.5}
    summary = Summary.from_dict({**identity(parse_config({"workers": 1})), **given, **figures, "metrics": declared}).to_dict()
    line, _ = cli._result(summary, Path("run")).splitlines()  # pyright: ignore[reportPrivateUsage] # what is printed
    assert line == (
        "completed: ormo (async), 1 worker, digits, mlp: 9 iterations in 1.0 s (2.0 s in all: start -, end -), mean delay 1.5, "
        f"training loss -, {said}"
    )


@pytest.mark.parametrize(
    ("computed", "discarded", "said"),
    [(9, 0, ""), (6, 0, ", 6 of them in this run,"), (8, 3, ", 5 of them in this run,"), (12, 3, ""), (None, None, "")],
)
def test_the_closing_line_of_a_resumed_run_has_the_iterations_of_its_own(
    computed: int | None, discarded: int | None, said: str
) -> None:
    found = {"iterations": 9, "gradients_computed": computed, "discarded": discarded}
    line = cli._iterations(found)  # pyright: ignore[reportPrivateUsage] # a part of what is printed
    assert line == f"9 iterations{said}"
