"""Grouping of runs as seeds of one setting, by the whole configuration but for what cannot change a result."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc import ConfigError, train
from ormo_rpc.config.flat import defaults_of, flat, read_flat
from ormo_rpc.config.parsing import parse_config, save_config
from ormo_rpc.config.saving import to_tree
from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.models.fingerprint import CHECKSUM, Fingerprint
from ormo_rpc.report.pictures import comparison
from ormo_rpc.report.runs import Group, Run, differing_keys, group_by_setting, load_runs, run_directories
from ormo_rpc.report.settings import WITHOUT_EFFECT, shared
from ormo_rpc.report.table import in_common, notes, rows
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import RunDirectory
from ormo_rpc.storage.summary import Summary, identity, unfinished_summary, write_summary
from ormo_rpc.storage.sweep_directory import JobRecord, Plan, SweepDirectory

QUADRATIC = ("runtime=sim", "runtime.gradient=quadratic", "runtime.dimension=4", "logger=none", "workers=2", "train.lr=0.01")

ANY = {"_target_": "collections.OrderedDict"}


def record(folder: Path, values: dict[str, Any] | None = None, seed: int = 0, **more: Any) -> Path:
    """Write the directory of a short run: configuration, summary, and one gradient in its trace."""
    folder.mkdir(parents=True)
    config = parse_config({"workers": 4, **(values or {}), "seed": seed})
    save_config(config, folder / "config.yaml")
    header = {"event": "header", "version": 1, "commit": "c0ffee", "torch": "2", "cpu": "one", **more.pop("header", {})}
    event = {"event": "apply", "seconds": 0.5, "loss": 1.0, "iteration": 0, "worker": 0, "ticket": 0, "stamp": 0, "delay": 0}
    (folder / "trace.jsonl").write_text(f"{json.dumps(header)}\n{json.dumps(event)}\n")
    (folder / "metrics.jsonl").write_text("")
    figures = {"status": "completed", "iterations": 1, "epochs": 0.5, "test_accuracy": 0.5, "training_seconds": 1.0}
    write_summary(folder, Summary.from_dict({**identity(config), **figures, **more}))
    return folder


def grouped(*folders: Path) -> list[Group]:
    return group_by_setting(Run.load(folder) for folder in folders)


def cells(groups: list[Group]) -> list[dict[str, str]]:
    header, *body = rows(groups)
    return [dict(zip(header, row, strict=True)) for row in body]


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


def test_a_sweep_over_momentum_and_batch_size_has_four_settings(tmp_path: Path) -> None:
    """The one of the issue: it was one row of four seeds."""
    groups = grouped(
        *(
            record(tmp_path / f"{momentum} {size}", {"train": {"momentum": momentum, "batch_size": size}})
            for momentum in (0.5, 0.9)
            for size in (16, 32)
        )
    )
    assert differing_keys(groups) == ["train.batch_size", "train.momentum"]
    assert [(row["train.batch_size"], row["train.momentum"], row["seeds"]) for row in cells(groups)] == [
        ("16", "0.5", "1"),
        ("16", "0.9", "1"),
        ("32", "0.5", "1"),
        ("32", "0.9", "1"),
    ]
    assert groups[0].label(differing_keys(groups)) == "batch_size 16, momentum 0.5"


@pytest.mark.parametrize(
    ("one", "other", "keys"),
    [
        ({"train": {"weight_decay": 0.0}}, {"train": {"weight_decay": 1e-4}}, ["train.weight_decay"]),
        ({"train": {"clip_norm": 1.0}}, {}, ["train.clip_norm"]),
        ({"model": {"hidden": 8}}, {"model": {"hidden": 16}}, ["model.hidden"]),
        ({"algorithm": {"momentum_correction": True}}, {}, ["algorithm.momentum_correction"]),
        (
            {"heterogeneity": {"name": "one_slow", "factor": 2}},
            {"heterogeneity": {"name": "one_slow", "factor": 10}},
            ["heterogeneity.factor"],
        ),
        ({"scheduler": {"name": "ssp", "s": 1}}, {"scheduler": {"name": "ssp", "s": 3}}, ["scheduler.s"]),
        ({"compression": {"name": "topk", "ratio": 0.1}}, {"compression": "topk"}, ["compression.ratio"]),
        ({"dataset": {"validation": 0.1}}, {}, ["dataset.validation"]),
        ({"worker": {"prefetch": 1}}, {}, ["worker.prefetch"]),
        ({"checkpoint": {"journal": True}}, {}, ["checkpoint.journal"]),
        ({"workers": 2}, {"workers": 8}, ["workers"]),
        (
            {"model": {"_target_": "collections.OrderedDict", "inner": {"_target_": "a.block", "width": 2}}},
            {"model": {"_target_": "collections.OrderedDict", "inner": {"_target_": "a.block", "width": 4}}},
            ["model.inner.width"],
        ),
        (
            {"dataset": {"_target_": "collections.Counter", "root": "one"}},
            {"dataset": {"_target_": "collections.Counter", "root": "two"}},
            ["dataset.root"],
        ),
        ({"model": {"_target_": "collections.OrderedDict"}}, {"model": {"_target_": "collections.Counter"}}, ["model"]),
        ({"runtime": {"name": "sim", "joins": {4: 1.5}}}, {"runtime": "sim"}, ["runtime.joins"]),
        (
            {"model": {**ANY, "sizes": {"a.b": 2}}},
            {"model": {**ANY, "sizes": {"a": {"b": 2}}}},
            ["model.sizes.a.b", "model.sizes"],
        ),
        ({"model": {**ANY, "flags": [1]}}, {"model": {**ANY, "flags": [True]}}, ["model.flags"]),
        *(
            ({**chosen, "optimized_metric": "val_loss"}, {**chosen, "optimized_metric": "val_accuracy"}, ["optimized_metric"])
            for chosen in (
                {"dataset": {"validation": 0.1}, "evaluate": {"every": 2, "patience": 1}},
                {"dataset": {"validation": 0.1}, "checkpoint": {"best": True}},
            )
        ),
    ],
)
def test_an_option_that_differs_makes_another_setting(
    one: dict[str, Any], other: dict[str, Any], keys: list[str], tmp_path: Path
) -> None:
    groups = grouped(record(tmp_path / "one", one), record(tmp_path / "other", other))
    assert differing_keys(groups) == keys
    assert [len(group.runs) for group in groups] == [1, 1]
    assert len({row[keys[0]] for row in cells(groups)}) == 2


@pytest.mark.parametrize(
    "values",
    [
        {"dataset": {"root": "elsewhere", "download": True}},
        {"server": {"address": "127.0.0.1:9999", "secret_file": "secret"}},
        {"logger": {"name": "none", "log_seconds": 9.0, "progress": False}},
        {"checkpoint": {"keep": 9}},
        {"evaluate": {"targets": [0.5], "smooth": 3}},
        {"optimized_metric": "test_accuracy"},
        {"train": {"lr": 2e-2}},  # the default
        {"model": {**ANY, "sizes": [1, 2.5, {"a": 4}], "bound": math.nan}},  # and with other spellings below
    ],
)
def test_what_cannot_change_a_result_makes_none(values: dict[str, Any], tmp_path: Path) -> None:
    spelt = {"model": {**ANY, "sizes": [1.0, 2.5, {"a": 4.0}], "bound": math.nan}} if "model" in values else {}
    (group,) = grouped(record(tmp_path / "one", spelt), record(tmp_path / "other", values, seed=1))
    assert [run.seed for run in group.runs] == [0, 1]
    assert notes([group]) == []


def test_every_key_that_does_not_count_exists_and_has_its_reason() -> None:
    known = {key for group in GROUPS for key in (group, *flat(to_tree(Config())))} | {"optimized_metric"}
    assert set(WITHOUT_EFFECT) <= known
    assert all(WITHOUT_EFFECT.values())


def test_the_part_says_what_its_default_options_would_repeat(tmp_path: Path) -> None:
    """`ormo` has an option that `asgd` does not: a column only where it is not its default."""
    plain = grouped(record(tmp_path / "1", {"algorithm": "asgd"}), record(tmp_path / "2", {"algorithm": "ormo"}))
    assert differing_keys(plain) == ["algorithm"]
    corrected = record(tmp_path / "3", {"algorithm": {"name": "ormo", "momentum_correction": True}})
    two = grouped(tmp_path / "1", corrected)
    assert differing_keys(two) == ["algorithm", "algorithm.momentum_correction"]
    assert [(row["algorithm"], row["algorithm.momentum_correction"]) for row in cells(two)] == [("asgd", "-"), ("ormo", "true")]
    assert two[1].label(differing_keys(two)) == "ormo, momentum_correction true"
    mixed = grouped(record(tmp_path / "4", {"runtime": "sim", "train": {"lr": 0.1}}), tmp_path / "1", tmp_path / "2")
    assert differing_keys(mixed) == ["algorithm", "train.lr", "runtime"]


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


def test_a_synthetic_run_has_neither_data_nor_model(tmp_path: Path) -> None:
    synthetic = {"runtime": {"name": "sim", "gradient": "quadratic"}}
    (group,) = grouped(
        record(tmp_path / "0", {**synthetic, "model": "cnn"}), record(tmp_path / "1", {**synthetic, "dataset": "mnist"}, seed=1)
    )
    assert "model quadratic" in in_common([group])
    assert "dataset" not in in_common([group])
    both = grouped(tmp_path / "0", record(tmp_path / "2", {"runtime": "sim", "model": "cnn"}))
    assert differing_keys(both)[:2] == ["dataset", "model"]
    assert [(row["dataset"], row["model"]) for row in cells(both)] == [("-", "quadratic"), ("digits", "cnn")]


def test_a_run_of_ddp_stands_under_its_own_name_and_not_under_the_default_algorithm(tmp_path: Path) -> None:
    runtimes = [{"name": "ddp"}, {"name": "ddp", "nesterov": True}, {"name": "rpc"}]
    groups = grouped(*(record(tmp_path / str(number), {"runtime": runtime}) for number, runtime in enumerate(runtimes)))
    found = [(row["algorithm"], row["scheduler"]) for row in cells(groups)]
    assert found == [("ddp", "sync"), ("ddp_nesterov", "sync"), ("ormo", "async")]


@pytest.mark.slow
def test_resumed_runs_are_another_setting_by_the_iteration_and_the_configuration_of_their_checkpoint(tmp_path: Path) -> None:
    def run(name: str, options: Iterable[str]) -> Path:
        train([*QUADRATIC, *options], run_dir=tmp_path / name)
        return tmp_path / name

    def first(folder: Path) -> Path:
        return checkpoint.complete(folder)[0]

    half = ("train.max_iterations=40", "checkpoint.every=10", "checkpoint.keep=9")
    whole = [run(f"whole{seed}", [*half, f"seed={seed}"]) for seed in (0, 1)]
    other = run("other", [*half, "train.lr=0.02"])
    own = [run(f"own{seed}", [*half, f"seed={seed}", f"checkpoint.resume={first(whole[seed])}"]) for seed in (0, 1)]
    later = run("later", [*half, f"checkpoint.resume={checkpoint.complete(whole[0])[1]}"])
    foreign = run("foreign", [*half, f"checkpoint.resume={first(other)}"])
    groups = grouped(*whole, *own, later, foreign)
    assert differing_keys(groups) == ["checkpoint.resume"]
    assert {row["checkpoint.resume"]: row["seeds"] for row in cells(groups)} == {
        "null": "2",
        "iteration 10": "2",
        "iteration 20": "1",
        "iteration 10 of train.lr=0.02": "1",
    }
    twice = [
        run(f"twice{seed}", ["train.max_iterations=50", f"seed={seed}", f"checkpoint.resume={own[seed]}"]) for seed in (0, 1)
    ]
    (both,) = grouped(*twice)
    assert (len(both.runs), both.setting["checkpoint.resume"]) == (
        2,
        "iteration 40 of train.max_iterations=40, checkpoint.every=10, checkpoint.resume=iteration 10",
    )
    first(other).rename(tmp_path / "moved")
    (again,) = grouped(foreign)
    assert again.setting["checkpoint.resume"] == str(first(tmp_path / "other").with_name("iteration_000000010"))


def test_a_configuration_is_read_flat_without_its_classes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "workers: 2\nalgorithm:\n  _target_: gone.Rule\n  name: mine\n  rates: {fast: 0.5, slow: {}}\nruntime:\n  name: sim\n"
        "  joins: {4: 1.5}\n"
    )
    assert read_flat(tmp_path / "config.yaml") == {
        "workers": 2,
        "algorithm": "gone.Rule",
        "algorithm.name": "mine",
        "algorithm.rates.fast": 0.5,
        "algorithm.rates.slow": {},
        "runtime": "sim",
        "runtime.joins": {4: 1.5},
    }


def test_the_defaults_of_a_configuration_are_itself_where_nothing_was_set() -> None:
    options = flat(to_tree(Config()))
    assert defaults_of(options) == options
