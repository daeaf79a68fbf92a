"""Grouping of runs as seeds of one setting, by the whole configuration but for what cannot change a result."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc import train
from ormo_rpc.config.flat import defaults_of, flat, read_flat
from ormo_rpc.config.saving import to_tree
from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.report.runs import differing_keys
from ormo_rpc.report.settings import WITHOUT_EFFECT
from ormo_rpc.report.table import in_common, notes
from ormo_rpc.storage import checkpoint
from tests.support.recorded_runs import cells, grouped, record

QUADRATIC = ("runtime=sim", "runtime.gradient=quadratic", "runtime.dimension=4", "logger=none", "workers=2", "train.lr=0.01")

ANY = {"_target_": "collections.OrderedDict"}


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


def test_a_loop_of_ones_own_has_no_batch_size(tmp_path: Path) -> None:
    own = {part: {"name": "own_loop"} for part in ("dataset", "model", "task")}
    (group,) = grouped(record(tmp_path / "0", own), record(tmp_path / "1", {**own, "train": {"batch_size": 7}}, seed=1))
    assert "train.batch_size" not in in_common([group])


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
