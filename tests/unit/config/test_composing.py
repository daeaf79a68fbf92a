"""Composing a configuration: each part, each experiment, the defaults; every one comes back equal from its file."""

from __future__ import annotations

import dataclasses
import string
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import load_config, parse_config, save_config
from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.config.write_conf import conf_dir
from ormo_rpc.models import CustomModel
from ormo_rpc.options import parts
from ormo_rpc.options.target import Target
from ormo_rpc.server.lr_schedule import Shape

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
TARGET = "torch.nn.Linear"
PAPER = {f"paper_{data}_k{k}_{speeds}" for data in ("cifar10", "cifar100") for k in (16, 64) for speeds in ("hom", "het")}


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in parts(group)])
def test_every_part_composes_and_comes_back_equal_from_its_file(group: str, name: str, tmp_path: Path) -> None:
    custom = name == "custom"
    config = compose([f"{group}={name}", *([f"{group}._target_={TARGET}"] if custom else [])])
    assert getattr(config, group).name == name
    # Nothing else differs from the defaults, and the options of a part are the defaults of its own class.
    options: dict[str, Any] = {"_target_": TARGET} if custom else {}
    assert config == dataclasses.replace(Config(), **{group: parts(group)[name](**options)})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_defaults_on_the_command_line_are_those_of_the_schema() -> None:
    assert compose() == Config()
    config = Config()
    chosen = [config.algorithm.name, config.scheduler.name, config.dataset.name, config.model.name, config.runtime.name]
    assert chosen == ["ormo", "async", "digits", "mlp", "rpc"]


@pytest.mark.parametrize("experiment", [*(name for name in EXPERIMENTS if name not in PAPER), min(PAPER)])
def test_the_command_line_wins_over_an_experiment(experiment: str, tmp_path: Path) -> None:
    config = compose([f"experiment={experiment}", "train.epochs=7", "algorithm=asgd"])
    values = OmegaConf.load(conf_dir() / "experiment" / f"{experiment}.yaml")
    for key, value in values.train.items():
        set_to = getattr(config.train, key)
        assert (set_to.value if isinstance(set_to, Enum) else set_to) == (7 if key == "epochs" else value)
    for override in values.defaults:
        if isinstance(override, str):
            continue  # an experiment that this one builds on
        ((group, name),) = override.items()
        assert getattr(config, group.removeprefix("override /")).name == name
    assert config.algorithm.name == "asgd"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_settings_of_the_paper_are_its_schedule_in_each_of_its_combinations() -> None:
    assert {name for name in EXPERIMENTS if name.startswith("paper_")} == PAPER
    for name in PAPER:
        _, data, k, speeds = name.split("_")
        config = compose([f"experiment={name}"])
        heterogeneity = "slow_tail" if speeds == "het" else "none"
        found = (config.dataset.name, config.model.name, f"k{config.workers}", config.heterogeneity.name)
        assert found == (data, "resnet20", k, heterogeneity), name
        train = config.train
        assert (train.epochs, train.batch_size, train.momentum, train.weight_decay) == (160, 64, 0.9, 1e-4), name
        assert (train.lr_schedule, train.lr_milestones, train.lr_gamma) == (Shape.step, [80, 120], 0.1), name
        assert train.warmup_epochs == 5, name


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, min_size=1), inner, max_size=3),
    max_leaves=5,
).filter(lambda value: "$" not in repr(value) and "???" not in repr(value))  # OmegaConf's own signs


@given(
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    milestones=st.lists(st.floats(1e-3, 1e6), max_size=4).map(sorted),
    seed=st.integers(0, 2**63 - 1),
    keywords=st.dictionaries(st.text(string.ascii_lowercase, min_size=1).map("k_".__add__), plain_values, max_size=3),
)
def test_every_value_comes_back_from_the_file(
    lr: float, milestones: list[float], seed: int, keywords: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = {
        "seed": seed,
        "train": {"lr": lr, "lr_milestones": milestones},
        "model": {"_target_": TARGET, **keywords},
    }
    config = parse_config(values)
    assert (config.seed, config.train.lr, config.train.lr_milestones) == (seed, lr, milestones)
    assert config.model == CustomModel(_target_=TARGET, kwargs=keywords)
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    save_config(config, file)
    assert load_config(file) == config


def test_a_dictionary_replaces_another_one() -> None:
    config = compose(["runtime=sim", "runtime.joins={4: 1.5, 5: 2}"])
    assert config.sim.joins == {4: 1.5, 5: 2.0}


def test_the_keywords_of_a_schedule_stand_beside_its_target_with_a_plus_or_without() -> None:
    assert compose(["train.lr_schedule=cosine"]).train.lr_schedule is Shape.cosine
    expected = Target("torch.optim.lr_scheduler.StepLR", {"step_size": 30, "gamma": 0.5})
    words = [f"train.lr_schedule._target_={expected.path}", "train.lr_schedule.step_size=30", "+train.lr_schedule.gamma=0.5"]
    assert compose(words).train.lr_schedule == expected
    assert compose(["experiment=cifar10_resnet20", *words]).train.lr_schedule == expected, "in the place of a name"
    assert (
        compose([f"train.lr_schedule={{_target_: {expected.path}, step_size: 30, gamma: 0.5}}"]).train.lr_schedule == expected
    )
    inner = "train.lr_schedule.schedulers=[{_target_: torch.optim.lr_scheduler.LinearLR, total_iters: 5}]"
    nested = compose(["train.lr_schedule._target_=torch.optim.lr_scheduler.ChainedScheduler", inner]).train.lr_schedule
    assert isinstance(nested, Target)
    assert nested.keywords == {"schedulers": [{"_target_": "torch.optim.lr_scheduler.LinearLR", "total_iters": 5}]}


def test_epochs_become_iterations_and_the_scale_divides_the_learning_rate() -> None:
    values = {"lr": 0.6, "lr_schedule": "step", "lr_milestones": [2, 3.5], "lr_gamma": 0.5, "warmup_epochs": 0.25}
    config = parse_config({"workers": 3, "train": {**values, "lr_scaling": "mean"}})
    rate = config.learning_rate(batches_per_epoch=10, total_tickets=100)
    # 0.6 / 3 workers = 0.2; milestones at 2 * 10 and 3.5 * 10; warm-up of round(0.25 * 10) = 2 iterations: 1/2, then all.
    rates = [rate(t) for t in (0, 1, 19, 20, 34, 35)]
    assert rates == pytest.approx([0.1, 0.2, 0.2, 0.1, 0.1, 0.05])
    unscaled = parse_config({"workers": 3, "train": values}).learning_rate(10, 100)
    assert [unscaled(t) for t in (0, 1, 19, 20, 34, 35)] == pytest.approx([3 * value for value in rates])
