"""The results of the experiment on asynchrony, from times that are made up."""

from __future__ import annotations

import math
from typing import Any

from experiments.when_it_pays import cells, mean_time


def row(scheduler: str, *times: float | None) -> dict[str, Any]:
    """A row of results with these times to the target."""
    of_each = {"test_accuracy": 0.96, "virtual_seconds": 9.0, "delay_mean": 3.5}
    runs = [{"seconds_to_target": seconds, **of_each} for seconds in times]
    return {"setting": "one_slow", "scheduler": scheduler, "lr": 0.02, "runs": runs}


def test_a_run_that_does_not_reach_the_target_makes_the_mean_infinite() -> None:
    assert mean_time(row("sync", 1.0, 3.0)["runs"]) == 2.0
    assert mean_time(row("sync", 1.0, None)["runs"]) == math.inf


def test_a_row_of_the_table_compares_with_the_synchronous_runs() -> None:
    # (8 + 12) / 2 = 10 seconds against (2 + 2) / 2 = 2: 5 times as fast.
    found = cells(row("async", 2.0, 2.0), row("sync", 8.0, 12.0))
    assert found == ("one_slow", "async", "0.02", "2 of 2", "2.0", "5.00", "96.00%", "9.0", "3.5")
    assert cells(row("async", 2.0, None), row("sync", 8.0, 12.0))[3:6] == ("1 of 2", "2.0", "0.00")
