"""The report of simulated runs: groups over seeds, the columns that metrics declare, and one page with all of it."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

from ormo_rpc import train
from ormo_rpc.errors import ConfigError
from ormo_rpc.loggers.metrics import METRICS
from ormo_rpc.report import __main__ as command
from ormo_rpc.report.runs import Run, differing_keys, group_by_setting, load_runs, run_directories
from ormo_rpc.report.table import as_markdown, as_text, notes, rows, spread
from ormo_rpc.storage.sweep_directory import JobRecord, Plan, SweepDirectory

OPTIONS = ("runtime=sim", "runtime.gradient=quadratic", "runtime.dimension=4", "train.max_iterations=20", "logger=none")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulate two algorithms with two seeds each."""
    folder = tmp_path_factory.mktemp("sweep")
    for algorithm in ("asgd", "ormo"):
        for seed in (0, 1):
            options = [*OPTIONS, "workers=2", "train.lr=0.01", f"algorithm={algorithm}", f"seed={seed}"]
            train(options, run_dir=folder / f"{algorithm}{seed}")
    return folder


def test_runs_are_grouped_by_everything_but_the_seed(sweep: Path) -> None:
    groups = group_by_setting(Run.load(path) for path in run_directories([sweep]))
    assert [(group.setting["algorithm"], [run.summary["seed"] for run in group.runs]) for group in groups] == [
        ("asgd", [0, 1]),
        ("ormo", [0, 1]),
    ]
    assert differing_keys(groups) == ["algorithm"]
    assert [group.label(["algorithm"]) for group in groups] == ["asgd", "ormo"]


def test_the_table_has_the_columns_that_metrics_declare(sweep: Path) -> None:
    groups = group_by_setting(Run.load(path) for path in run_directories([sweep]))
    header, *body = rows(groups)
    without = ("test accuracy", "val accuracy")  # a quadratic has none: a column without any value is left out
    declared = [metric.column for metric in METRICS.values() if metric.column and metric.column not in without]
    assert list(header) == ["algorithm", "seeds", *declared, "virtual seconds", "diverged"]
    losses = [run.summary["train_loss"] for run in groups[1].runs]
    row = dict(zip(header, body[1], strict=True))
    assert row["train loss"] == f"{statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}"
    assert (row["iterations"], row["seeds"], row["diverged"]) == ("20", "2", "0 of 2")
    # 20 tickets of 0.1 virtual seconds over two workers.
    assert row["virtual seconds"] == "1.0"


def test_delays_of_synchronous_rounds_are_said_to_be_places(tmp_path: Path) -> None:
    for scheduler in ("async", "sync"):
        train([*OPTIONS, "workers=2", "train.lr=0.01", f"scheduler={scheduler}"], run_dir=tmp_path / scheduler)
    said = notes(group_by_setting(Run.load(path) for path in run_directories([tmp_path])))
    assert said == ["sync: delays are places within a round, whose gradients are all of the same parameters"]


def test_mean_and_spread_are_formatted_by_hand() -> None:
    assert spread([], ".1f") == "-"
    assert spread([2.0], ".1f") == spread([2.0, 2.0], ".1f") == "2.0"
    assert spread([1.0, 3.0], ".2f") == "2.00 ± 1.41"  # sqrt(((1 - 2)^2 + (3 - 2)^2) / 1)
    table = [("a", "bb"), ("ccc", "d")]
    assert as_text(table) == "a    bb\nccc  d"
    assert as_markdown(table) == "| a | bb |\n|---|---|\n| ccc | d |"


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_one_page(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", str(sweep), "--out", str(tmp_path)])
    command.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == (
        "All runs: workers 2, scheduler async, model quadratic, heterogeneity none, train.max_iterations 20, "
        "train.batch_size 32, train.lr 0.01, runtime sim, runtime.gradient quadratic, runtime.dimension 4"
    )
    assert printed[1].split()[:2] == ["algorithm", "seeds"]
    assert [line.split()[0] for line in printed[2:4]] == ["asgd", "ormo"]
    assert printed[-2:] == [str(tmp_path / "report.html"), str(tmp_path / "report.png")]
    page = (tmp_path / "report.html").read_text()
    assert f"<p>{printed[0]}</p>" in page
    assert page.count("src='data:image/png;base64,") == 3  # the comparison, and a run of each group
    assert (tmp_path / "report.png").stat().st_size > 0


def test_a_sweep_none_of_whose_jobs_has_a_run_is_left_out_with_their_reasons(sweep: Path, tmp_path: Path) -> None:
    failed = SweepDirectory(tmp_path / "failed")
    failed.begin(Plan(jobs=1, keys=["seed"]))
    failed.write(
        JobRecord(number=0, settings="seed=0", directory=str(failed.path / "0"), status="failed", reason="train.lr: got -1")
    )
    runs, left_out = load_runs([sweep, failed.path])
    assert runs
    assert left_out == ["Left out: job 1 (seed=0): failed, train.lr: got -1"]
    with pytest.raises(ConfigError, match=r"^job 1 \(seed=0\): failed, train.lr: got -1$"):
        load_runs([failed.path])


def test_a_folder_without_a_run_is_refused_or_left_out_beside_others(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "refused").mkdir()
    runs, (left_out,) = load_runs([tmp_path / "refused", sweep])
    assert runs
    assert left_out.startswith(f"Left out: {tmp_path / 'refused'}: got a folder without any summary.json")
    with pytest.raises(ConfigError) as caught:
        load_runs([tmp_path / "refused"])
    assert str(caught.value) == (
        f"{tmp_path / 'refused'}: got a folder without any summary.json, expected a run directory or a sweep of some"
    )
