"""The table of the report: its columns, its rows, and the counts in its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ormo_rpc.report.pictures import comparison
from ormo_rpc.report.settings import shared
from ormo_rpc.report.table import in_common, rows
from tests.support.recorded_runs import cells, grouped, record


def test_start_and_end_have_a_column_of_live_runs_besides_the_seconds_of_training(tmp_path: Path) -> None:
    runs = [record(tmp_path / f"{seed}", seed=seed, start_seconds=2.0 + seed, end_seconds=0.5) for seed in (0, 1)]
    (found,) = cells(grouped(*runs))
    assert (found["seconds"], found["start and end"]) == ("1.0", "3.0 ± 0.7")
    (earlier,) = cells(grouped(record(tmp_path / "of an earlier version", start_seconds=None)))
    assert "start and end" not in earlier


def test_virtual_seconds_to_a_target_have_a_column_of_their_own(tmp_path: Path) -> None:
    reached: dict[str, Any] = {"target_metric": "accuracy", "seconds_to": {"0.5": 2.0}}
    live, simulated = record(tmp_path / "live", **reached), record(tmp_path / "sim", {"runtime": "sim"}, **reached)
    found = {row["runtime"]: row for row in cells(grouped(live, simulated))}
    assert (found["rpc"]["s to accuracy 0.5"], found["rpc"]["virtual s to accuracy 0.5"]) == ("2.0", "-")
    assert (found["sim"]["s to accuracy 0.5"], found["sim"]["virtual s to accuracy 0.5"]) == ("-", "2.0")
    axes = comparison(grouped(live, simulated)).axes
    assert {each.get_xlabel() for each in axes} == {"epochs", "seconds, virtual ones of simulations"}


def test_the_time_to_a_target_is_of_the_runs_that_were_asked_for_it(tmp_path: Path) -> None:
    reached: list[tuple[list[float], dict[str, float | None]]] = [
        ([0.5], {"0.5": 2.0}),
        ([0.5], {"0.5": 4.0}),
        ([0.5, 0.9], {"0.5": None, "0.9": 7.0}),
        ([], {}),
    ]
    folders = [
        record(
            tmp_path / f"{seed}",
            {"evaluate": {"targets": targets}},
            seed,
            target_metric="accuracy" if targets else None,
            seconds_to=seconds or None,
        )
        for seed, (targets, seconds) in enumerate(reached)
    ]
    (row,) = cells(grouped(*folders))
    # Of three that were asked for 0.5 two reached it, at (2 + 4) / 2 s, and the only one that was asked for 0.9 at 7 s.
    assert (row["seeds"], row["s to accuracy 0.5"], row["s to accuracy 0.9"]) == ("4", "3.0 ± 1.4 (2 of 3)", "7.0 (1 of 1)")


def test_times_of_means_of_other_numbers_of_evaluations_have_columns_of_their_own(tmp_path: Path) -> None:
    seconds = {1: 2.0, 6: 5.0}
    folders = [
        record(
            tmp_path / f"{smooth}",
            {"evaluate": {"targets": [0.5], "smooth": smooth}},
            seed=smooth,
            target_metric="accuracy",
            seconds_to={"0.5": value},
        )
        for smooth, value in seconds.items()
    ]
    (row,) = cells(grouped(*folders))
    assert (row["seeds"], row["test accuracy"]) == ("2", "50.00%")
    assert (row["s to accuracy 0.5"], row["s to accuracy 0.5, mean of 6"]) == ("2.0 (1 of 1)", "5.0 (1 of 1)")


def test_a_cell_says_how_many_runs_have_a_value_where_others_have_none(tmp_path: Path) -> None:
    figures: list[dict[str, Any]] = [{"test_accuracy": 0.5}, {"test_accuracy": 0.75}, {"test_accuracy": None}]
    (row,) = cells(grouped(*(record(tmp_path / f"{seed}", seed=seed, **each) for seed, each in enumerate(figures))))
    assert (row["seeds"], row["test accuracy"], row["iterations"]) == ("3", "62.50% ± 17.68% (2 of 3)", "1")


def test_columns_come_in_the_order_of_the_schema_and_rows_in_that_of_their_values(tmp_path: Path) -> None:
    values = [(0.1, 8, "ormo"), (0.02, 16, "asgd"), (1e-5, 16, "ormo"), (0.1, 8, "asgd")]
    groups = grouped(
        *(
            record(tmp_path / str(n), {"train": {"lr": lr}, "workers": workers, "algorithm": name})
            for n, (lr, workers, name) in enumerate(values)
        )
    )
    assert rows(groups)[0][:3] == ("algorithm", "workers", "train.lr")
    assert [row[:3] for row in rows(groups)[1:]] == [
        ("asgd", "8", "0.1"),
        ("asgd", "16", "0.02"),
        ("ormo", "8", "0.1"),
        ("ormo", "16", "1e-05"),
    ]


def test_what_agrees_is_said_once(tmp_path: Path) -> None:
    groups = grouped(
        *(record(tmp_path / str(lr), {"train": {"lr": lr, "momentum": 0.5}, "workers": 3}, seed=4) for lr in (0.1, 0.2))
    )
    assert in_common(groups) == (
        "All runs: algorithm ormo, workers 3, scheduler async, dataset digits, model mlp, heterogeneity none, "
        "train.batch_size 32, train.momentum 0.5, runtime rpc"
    )
    assert "train.momentum" not in rows(groups)[0]
    assert shared([groups[0].setting])["train.lr"] == 0.1
