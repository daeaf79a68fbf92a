"""Runs that the report leaves out of its means, and its notes on those that it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ormo_rpc import ConfigError
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.models.fingerprint import CHECKSUM, Fingerprint
from ormo_rpc.report.runs import differing_keys, load_runs, run_directories
from ormo_rpc.report.table import notes
from ormo_rpc.storage.run_directory import RunDirectory
from ormo_rpc.storage.summary import unfinished_summary, write_summary
from ormo_rpc.storage.sweep_directory import JobRecord, Plan, SweepDirectory
from tests.support.recorded_runs import cells, grouped, record


def test_a_seed_that_occurs_twice_is_said_and_counts_once(tmp_path: Path) -> None:
    folders = [
        record(tmp_path / "a", seed=7, test_accuracy=0.1, status="interrupted", reason="SIGINT"),
        record(tmp_path / "b", seed=7, test_accuracy=0.2),
        record(tmp_path / "c", seed=7, test_accuracy=0.9),
        record(tmp_path / "d", seed=8, test_accuracy=0.4),
    ]
    (group,) = grouped(*folders)
    assert ([run.path for run in group.runs], len(group.repeated)) == ([folders[1], folders[3]], 2)
    (row,) = cells([group])
    assert (row["seeds"], row["test accuracy"]) == ("2", "30.00% ± 14.14%")  # of 20% and 40%
    assert notes([group]) == [
        f"ormo: seed 7 occurs twice: {folders[1]} counts, {folders[2]} does not",
        f"ormo: seed 7 occurs twice: {folders[1]} counts, {folders[0]} does not",
    ]


def test_a_directory_given_twice_is_one_run(tmp_path: Path) -> None:
    folder = record(tmp_path / "sweep" / "0")
    assert run_directories([tmp_path / "sweep", folder, tmp_path / "sweep" / ".." / "sweep"]) == [folder]


def test_runs_that_did_not_complete_are_not_in_the_means(tmp_path: Path) -> None:
    cut = record(tmp_path / "2", seed=2, test_accuracy=0.3, status="interrupted", reason="SIGINT")
    (group,) = grouped(
        record(tmp_path / "0", seed=0, test_accuracy=0.8),
        record(tmp_path / "1", seed=1, test_accuracy=0.1, status="diverged", reason="the training loss ended at 90"),
        cut,
    )
    (row,) = cells([group])
    assert (row["seeds"], row["test accuracy"], row["diverged"]) == ("3", "80.00%", "1 of 3")
    assert notes([group]) == [
        f"{cut}: interrupted (SIGINT), not in the means",
        "ormo: 1 of 3 diverged: the training loss ended at 90",
    ]


def test_runs_that_lost_workers_or_updates_are_said(tmp_path: Path) -> None:
    """They count, but went another way than the other seeds."""
    lossy = record(tmp_path / "1", seed=1, evictions=[{"worker": 1}], rolled_back=7)
    (group,) = grouped(record(tmp_path / "0", evictions=[], rolled_back=0), lossy)
    assert notes([group]) == [f"{lossy}: workers evicted: 1, updates rolled back: 7, which the configuration does not tell"]


def test_runs_that_ended_early_or_elsewhere_are_said(tmp_path: Path) -> None:
    limit = {"train": {"max_seconds": 2.0}}
    (group,) = grouped(
        record(tmp_path / "0", limit, reason="train.max_seconds=2: ended after 0.17 of 30 epochs"),
        record(tmp_path / "1", limit, seed=1, header={"commit": "beef"}),
        record(tmp_path / "2", limit, seed=2),
    )
    assert notes([group]) == [
        "ormo: 1 of 3 completed: train.max_seconds=2: ended after 0.17 of 30 epochs",
        "Runs of different commit: c0ffee (2 of 3 runs), beef (1 of 3 runs)",
    ]


def test_a_run_of_an_earlier_version_is_read_under_the_present_keys(tmp_path: Path) -> None:
    new = record(tmp_path / "new", {"worker": {"dummy": True}, "transport": "rpc"})
    old = record(tmp_path / "old", seed=1)
    text = (new / "config.yaml").read_text()
    former = text.replace("dummy:", "stand_in:").replace("seed: 0", "seed: 1")
    former = former.replace("transport:\n  name: rpc", "transport:\n  name: torch_rpc")
    (old / "config.yaml").write_text(former)
    (group,) = grouped(new, old)
    assert [run.seed for run in group.runs] == [0, 1]
    # One that does not have a key yet is told apart, as nobody knows that its value would be the default.
    (old / "config.yaml").write_text(
        "".join(line for line in former.splitlines(keepends=True) if "divergence_factor" not in line)
    )
    two = grouped(new, old)
    assert differing_keys(two) == ["train.divergence_factor"]
    assert [row["train.divergence_factor"] for row in cells(two)] == ["3", "-"]


def test_what_is_no_run_that_can_be_compared_is_left_out_with_its_reason(tmp_path: Path) -> None:
    good = record(tmp_path / "0")
    bare = record(tmp_path / "1")
    (bare / "config.yaml").unlink()
    RunDirectory.claim(tmp_path / "2")
    write_summary(tmp_path / "2", unfinished_summary(parse_config({"workers": 2}), "failed", "no port is free", 1.0))
    replay = record(tmp_path / "3", replayed=str(good))
    runs, left_out = load_runs([tmp_path])
    assert [run.path for run in runs] == [good]
    assert left_out == [
        f"Left out: {bare / 'config.yaml'}: [Errno 2] No such file or directory: '{bare / 'config.yaml'}'",
        f"Left out: {tmp_path / '2'}: got a folder without the summary of a run that began (failed: no port is free)",
        f"Left out: {replay}: got a replay, which is no run of its own, of {good}",
    ]
    with pytest.raises(
        ConfigError, match=r"2: got a folder without the summary of a run that began \(failed: no port is free\)$"
    ):
        load_runs([tmp_path / "2"])


def test_jobs_of_a_sweep_that_were_refused_are_said(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path / "sweep")
    sweep.begin(Plan(jobs=3))
    for number, status, reason in ((0, "completed", None), (1, "failed", "train.lr: got -1"), (2, "running", None)):
        directory = str(tmp_path / "sweep before it was moved" / str(number))
        sweep.write(JobRecord(number=number, settings=f"seed={number}", directory=directory, status=status, reason=reason))
    record(tmp_path / "sweep" / "0")
    runs, left_out = load_runs([tmp_path / "sweep"])
    assert len(runs) == 1
    jobs = ["Left out: job 2 (seed=1): failed, train.lr: got -1", "Left out: job 3 (seed=2): running"]
    assert left_out == jobs
    (record(tmp_path / "sweep" / "2") / "summary.json").unlink()  # its process was killed
    assert load_runs([tmp_path])[1] == jobs, "as well below a folder of sweeps, and once"


def test_a_run_that_was_killed_or_goes_on_is_said(tmp_path: Path) -> None:
    record(tmp_path / "0")
    (record(tmp_path / "1") / "summary.json").unlink()
    assert load_runs([tmp_path])[1] == [
        f"Left out: {tmp_path / '1'}: got a run without a summary.json: it is still running, or its process was killed"
    ]


def test_seeds_whose_model_or_data_was_changed_in_between_are_said(tmp_path: Path) -> None:
    def said(size: int = 2, samples: int = 8, checksum: int = 1) -> list[str]:
        for seed, values in enumerate(((2, 8, 1), (size, samples, checksum))):
            folder = tmp_path / f"{seed}"
            if not folder.exists():
                record(folder, seed=seed)
            data = {"training samples": values[1], CHECKSUM: values[2]}
            fingerprint = Fingerprint(parameters={"w": f"float32 ({values[0]},)"}, data=data)
            (folder / "fingerprint.json").write_text(json.dumps(fingerprint.to_dict()))
        return notes(grouped(tmp_path / "0", tmp_path / "1"))

    one, other, seeds = tmp_path / "0", tmp_path / "1", "ormo: its runs are no seeds of one setting"
    assert said(size=3) == [f"{seeds}: model: parameters: {one}: w float32 (2,); {other}: w float32 (3,)"]
    assert said(samples=9) == [f"{seeds}: dataset: training samples: {one}: 8; {other}: 9"]
    assert said(checksum=2) == [], "a seed may draw the validation split"
