"""The goals, the page and the picture of the race."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments.race import report
from experiments.race.figures import Results, best_asynchronous, best_m_sync, best_m_sync_nesterov
from experiments.race.formatting import shown
from experiments.race.goals import goals as goals_of
from experiments.race.setup import LONG, TUNED_MOMENTUM


def row(
    contender: str, *times: float, validation: float | None, accuracy: float = 0.9, setting: str = "one_slow", workers: int = 4
) -> dict[str, Any]:
    """A row of results whose seeds reach 87% at these times."""
    runs = [
        {"seed": seed, "status": "completed", "gradients": 9, "seconds": [1.0, time], "accuracy": [1000, 8700]}
        for seed, time in enumerate(times)
    ]
    return {
        "setting": setting,
        "workers": workers,
        "contender": contender,
        "variant": "",
        "rate": 0.1,
        "tuning": {"": {"0.1": [validation], "0.2": "cut"}},
        "validation_time": validation,
        "validation_accuracy": accuracy,
        "runs": runs,
    }


@pytest.fixture
def results() -> Results:
    rows = [
        row("ddp", 100.0, 80.0, 90.0, validation=95.0),
        row("ormo", 9.0, 18.0, 8.0, validation=9.0),
        row("ormo_da", 7.0, 7.0, 7.0, validation=10.0),  # better, but not by validation
        row("m_sync", 12.0, 12.0, 12.0, validation=12.0),
        row("m_sync_cancel", 10.0, 10.0, 10.0, validation=10.0),
        row("ddp", 10.0, 10.0, 10.0, validation=10.0, setting="none", workers=16),
        row("ormo", 15.0, 15.0, 15.0, validation=15.0, setting="none", workers=16),
    ]
    return Results(
        {
            "job": ["dataset=x"],
            "momenta": [0.9],
            "epochs": 8,
            "batch_size": 64,
            "smooth": 1,
            "targets": [0.85, 0.87, 0.88],
            "target": 0.87,
            "tuning_target": 0.875,
            "tuning_seeds": [1000],
            "rates": {"4": [0.1, 0.2]},
            "rows": rows,
            "beyond": 3,
            "every": 100,
            "machines": ["torch 2, a CPU"],
            "environment": {"torch": "2", "cpu": "a CPU"},
            "not_run": [["gamma", 64, "ddp"]],
        }
    )


def test_goals_compare_medians_of_the_rule_that_validation_puts_first(results: Results) -> None:
    cell = results.cell("one_slow", 4)
    best, m_sync = best_asynchronous(cell), best_m_sync(cell)
    assert best is not None
    assert m_sync is not None
    assert (best["contender"], m_sync["contender"]) == ("ormo", "m_sync_cancel")
    goals = {(row[0], row[1], row[2]): row for row in goals_of(results)}
    # Medians: 9 of ormo, 90 of DDP, 10 of m-sync.
    assert goals["one_slow", "4", "DDP"][3:] == ("0.129", "<= 0.13", "0.1", "0.09 0.225 0.0889", "ormo", "DDP", "yes")
    assert goals["one_slow", "4", "best m-sync"][5:] == ("0.9", "0.9 1.8 0.8", "ormo", "m-sync, cancelling", "yes")
    assert goals["none", "16", "DDP"][5:] == ("1.5", "1.5 1.5 1.5", "ormo", "DDP", "no")
    assert ("exponential", "4", "DDP") not in goals, "it was not run"


def test_the_best_of_those_that_never_reached_the_target_has_the_highest_accuracy() -> None:
    cell = {
        "ormo": row("ormo", 9.0, validation=None, accuracy=0.84),
        "ormo_la": row("ormo_la", 9.0, validation=None, accuracy=0.86),
        "dana": row("dana", 9.0, validation=None, accuracy=0.85),
    }
    best = best_asynchronous(cell)
    assert best is not None
    assert best["contender"] == "ormo_la"
    one_has_it = best_asynchronous({**cell, "smega2": row("smega2", 9.0, validation=50.0, accuracy=0.1)})
    assert one_has_it is not None
    assert one_has_it["contender"] == "smega2", "a time comes before every accuracy"


def test_of_equal_times_the_first_is_the_best_whatever_the_accuracies_of_runs_that_were_cut_off() -> None:
    cell = {
        "smega2": row("smega2", 9.0, validation=20.0, accuracy=0.9),
        "ormo_la": row("ormo_la", 9.0, validation=20.0, accuracy=0.8),
    }
    best = best_asynchronous(cell)
    assert best is not None
    assert best["contender"] == "ormo_la"


def test_a_run_that_diverged_has_reached_nothing_and_counts_in_no_mean(results: Results) -> None:
    mixed = row("dana", 5.0, 6.0, 7.0, validation=20.0)
    mixed["runs"][2]["status"] = "diverged"
    assert results.times(mixed, 0.87) == {0: 5.0, 1: 6.0, 2: math.inf}
    assert results.last(mixed) == [0.87, 0.87]
    header, *_, last = report.table(Results({**results.content, "rows": [*results.rows, mixed]}), "one_slow", 4)
    assert dict(zip(header, last, strict=True))["reached"] == "2 of 3, 1 diverged"


def test_rates_that_another_contender_has_tried_count_once(results: Results) -> None:
    tried = row("ddp_nesterov", 9.0, validation=20.0)
    for tuning, expected in ((tried["tuning"], "2"), ({"": {"0.1": [21.0], "0.2": "cut"}}, "4")):
        same = {**row("ddp_proportional_nesterov", 9.0, validation=20.0), "tuning": tuning}
        page = report.page(Results({**results.content, "rows": [tried, same]}))
        assert f"the best synchronous rule: {expected}; DDP with Nesterov momentum: 2;" in page


def test_ratios_are_over_the_seeds_that_both_have(results: Results) -> None:
    more = row("dana", 5.0, 45.0, 45.0, 1.0, 1.0, validation=20.0)
    ddp = results.cell("one_slow", 4)["ddp"]
    assert results.ratio(more, ddp, 0.87) == 45 / 90, "medians of the first three"
    assert results.ratios(more, ddp, 0.87) == [5 / 100, 45 / 80, 45 / 90]
    missing_first = {**ddp, "runs": ddp["runs"][1:]}
    assert results.ratios(more, missing_first, 0.87) == [45 / 80, 45 / 90]
    table = report.table(Results({**results.content, "rows": [*results.rows, more]}), "one_slow", 4)
    shown = dict(zip(table[0], table[-1], strict=True))
    assert (shown["contender"], shown["reached"], shown["s to 87%"]) == ("dana", "5 of 5", "5.0")
    assert shown["of DDP, 87%"] == "0.5 (3 seeds of both)"


def test_accuracies_are_compared_over_the_seeds_that_both_have(results: Results) -> None:
    def ended(contender: str, *accuracies: int) -> dict[str, Any]:
        runs = [
            {"seed": seed, "status": "completed", "seconds": [9.0], "accuracy": [each]} for seed, each in enumerate(accuracies)
        ]
        return {**row(contender, validation=1.0), "runs": runs}

    rows = [ended("ddp", 8000, 8100, 9000), ended("ormo", 8050, 8150)]
    page = report.page(Results({**results.content, "rows": rows}))
    assert "| one_slow | 4 | ormo: 81.00% ± 0.71% | 80.50% ± 0.71% | +0.50% | yes |" in page


def test_the_best_of_both_kinds_are_compared_at_each_target_and_in_the_end(results: Results) -> None:
    def ending(contender: str, *seconds: float, end: int) -> dict[str, Any]:
        run = {"seed": 0, "status": "completed", "gradients": 9, "seconds": [*seconds], "accuracy": [8500, 8600, end]}
        return {**row(contender, validation=1.0, setting="half_slow"), "runs": [run]}

    more = [ending("ormo", 2.0, 6.0, 9.0, end=8750), ending("m_sync_cancel", 4.0, 5.0, 10.0, end=8700)]
    found = report.page(Results({**results.content, "rows": [*results.rows, *more]}))
    expected = "| half_slow | 4 | ormo | m-sync, cancelling | 0.5 | 1.2 | 0.9 | rival: not reached | - | +0.50% | 1 |"
    assert expected in found.splitlines()
    page = report.page(results)
    assert "the best asynchronous rule: 2 to 4; the best synchronous rule: 2 to 6; DDP: 2; the best m-sync: 2 to 6." in page, (
        "two rates of each row"
    )


def test_the_page_has_rates_to_begin_with_as_a_user_types_them(results: Results) -> None:
    # Rates of means are 0.1; a rule that applies each gradient has the K-th part.
    page = report.page(results)
    assert "| DDP | 0.1 | 0.1 |" in page
    assert "| ormo | 0.025 | 0.00625 |" in page
    assert "| m-sync | 0.1 | - |" in page


def test_a_ratio_to_a_rival_that_never_reached_the_target_is_no_number() -> None:
    assert shown(58.9 / math.inf) == "rival: not reached"
    assert [shown(value) for value in (math.inf, math.nan, 0.5)] == ["not reached", "-", "0.5"]


def test_the_page_says_where_asynchrony_loses_and_what_was_not_run(results: Results) -> None:
    page = report.page(results)
    assert "* none, K = 16: DDP needs 10.0 s, ormo 15.0 s" in page
    assert "sooner than the asynchronous one that validation puts first" in page
    assert "* one_slow, K = 4: " not in page
    assert "* gamma, K = 64: DDP" in page
    header, _, *rows = report.as_markdown(report.table(results, "one_slow", 4)).splitlines()
    assert "of DDP, 87%" in header
    assert rows[3].startswith("| ormo | 0.1 | 2 | 3 of 3 |")


def test_page_and_picture_are_made_from_the_file_alone(results: Results, tmp_path: Path) -> None:
    content = json.loads(json.dumps(results.content))
    report.write(content, tmp_path)
    assert (tmp_path / "race.md").read_text() == report.page(results)
    assert (tmp_path / "race.png").stat().st_size > 10_000


def test_with_momentum_tuned_the_goals_are_those_that_were_measured(results: Results, tmp_path: Path) -> None:
    rows = [{**row, "variant": "momentum 0.95"} for row in results.rows]
    report.write({**results.content, "momenta": [0.9, 0.95], "rows": rows}, tmp_path, TUNED_MOMENTUM)
    assert [path.name for path in tmp_path.iterdir()] == ["race_momentum.md"]
    page = (tmp_path / "race_momentum.md").read_text()
    assert "`python -m experiments.race --momentum`" in page
    assert "momentum 0.9, 0.95 (each makes a variant of every variant)" in page
    goals = page.split("## Goals")[1].split("\n\n")[1].splitlines()[2:]
    assert [line.split(" | ")[:2] for line in goals] == [["| one_slow", "4"], ["| none", "16"], ["| one_slow", "4"]]
    assert "| ormo, momentum 0.95 | 0.1 | 2 | 3 of 3 |" in page


def test_the_longer_job_has_tables_of_its_own_without_the_goals(results: Results, tmp_path: Path) -> None:
    report.write({**results.content, "epochs": 16}, tmp_path, LONG)
    assert [path.name for path in tmp_path.iterdir()] == ["race_long.md"]
    page = (tmp_path / "race_long.md").read_text()
    assert "`python -m experiments.race --long`" in page
    assert "16 epochs" in page
    assert "## Goals" not in page
    assert "| ormo | 0.1 | 2 | 3 of 3 |" in page


def test_with_m_of_all_workers_m_sync_is_ddp() -> None:
    cell = {name: row(name, validation=time) for name, time in (("ddp", 5.0), ("m_sync", 6.0), ("m_sync_cancel", 7.0))}
    cell |= {name: row(name, validation=time) for name, time in (("ddp_nesterov", 4.0), ("m_sync_nesterov", 3.0))}
    assert best_m_sync(cell) == cell["ddp"]
    assert best_m_sync_nesterov(cell) == cell["m_sync_nesterov"]
    cell["ddp_nesterov"] = row("ddp_nesterov", validation=2.0)
    assert best_m_sync_nesterov(cell) == cell["ddp_nesterov"]
