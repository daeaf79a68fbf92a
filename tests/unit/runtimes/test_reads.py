"""A data set is made and read, and a model built, no more often than needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import override

from ormo_rpc import train
from ormo_rpc.config.parsing import parse_config, parse_text
from ormo_rpc.config.schema import Config
from ormo_rpc.runtimes import prepare
from ormo_rpc.runtimes.job import Job
from tests.support.datasets import write_cifar10

SAMPLES = 40
made: list[dict[str, Any]] = []
"""The keywords of every call of the data set's function."""
built: list[nn.Module] = []
"""The models."""
reads: list[int] = []
"""The item of every read of a training set."""


class Counted(Dataset[tuple[Tensor, int]]):
    """Notes its reads."""

    def __init__(self, *, noted: bool) -> None:
        self.noted = noted

    def __len__(self) -> int:
        return SAMPLES

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.noted:
            reads.append(index)
        return torch.full((3,), float(index)), index % 5


class WithClasses(Counted):
    """Names its classes."""

    classes = "abcde"


def pair(**keywords: Any) -> tuple[Counted, Counted]:
    made.append(keywords)
    return Counted(noted=True), Counted(noted=False)


def pair_of(num_classes: int = 5) -> tuple[Counted, Counted]:
    return pair(num_classes=num_classes)


def named() -> tuple[Counted, Counted]:
    made.append({})
    return WithClasses(noted=True), WithClasses(noted=False)


def net(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    assert num_classes == 5
    built.append(nn.Linear(input_shape[0], num_classes))
    return built[-1]


def config(function: str, **options: Any) -> Config:
    dataset = {"_target_": f"{__name__}.{function}", **options.pop("dataset", {})}
    return parse_config(
        {
            "workers": 2,
            "logger": "none",
            "dataset": dataset,
            "model": {"_target_": f"{__name__}.net"},
            "train": {"batch_size": 4, "epochs": 2},
            **options,
        }
    )


@pytest.fixture(autouse=True)
def _nothing_noted() -> None:  # pyright: ignore[reportUnusedFunction] # pytest uses it
    made.clear()
    built.clear()
    reads.clear()


@pytest.mark.parametrize(
    ("function", "dataset", "counting"),
    [
        ("pair", {}, SAMPLES),
        ("pair", {"validation": 8}, SAMPLES),
        ("pair_of", {}, SAMPLES),
        ("pair_of", {"num_classes": 5}, 0),
        ("named", {}, 0),
    ],
)
def test_the_launcher_makes_the_data_set_and_counts_its_classes_once(
    function: str, dataset: dict[str, Any], counting: int
) -> None:
    checked = prepare.check(config(function, dataset=dataset), starts_server=True)
    assert checked is not None
    assert len(made) == 1
    first, tried = 1, 4 * (1 + ("validation" in dataset))  # the item whose shape is looked at, and the batches that are tried
    assert len(reads) == counting + first + tried
    text = checked.config.yaml
    for _ in range(3):  # server and two workers, each from the text of config.yaml
        reads.clear()
        job = Job(parse_text(text))
        job.model()
        assert job.data.num_classes == 5
        assert len(reads) == first
    expected = {"num_classes": 5} if function == "pair_of" else {}
    assert made == [expected] * 4  # the function never receives what was counted


def test_a_simulation_makes_and_counts_its_data_set_once(tmp_path: Path) -> None:
    train(config("pair", runtime="sim"), run_dir=tmp_path)
    assert len(made) == 1
    # counted, the first, one tried, 16 labels for the fingerprint, two epochs
    assert len(reads) == SAMPLES + 1 + 4 + 16 + 2 * SAMPLES


def test_models_are_built_for_those_alone_who_change_them(tmp_path: Path) -> None:
    checked = prepare.check(config("pair"), starts_server=True)
    assert isinstance(checked, Job)
    assert len(built) == 2  # which are compared; one of them is tried
    built.clear()
    train(config("pair", runtime="sim"), run_dir=tmp_path)
    assert len(built) == 4  # tried, evaluated, exported, trained; the server reads one that is used afterwards
    assert len({id(each) for each in built}) == 4


def test_a_worker_builds_one_model_of_its_own() -> None:
    worker = Job(config("pair_of")).worker()
    assert [worker.model.module] == built


def test_the_files_of_a_data_set_are_read_once_in_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ormo_rpc.data import CIFAR10

    write_cifar10(tmp_path)
    calls: list[bool] = []
    read = CIFAR10.read

    def noted(source: CIFAR10, *, train: bool) -> tuple[Tensor, Tensor]:
        calls.append(train)
        return read(source, train=train)

    monkeypatch.setattr(CIFAR10, "read", noted)
    values = {"name": "cifar10", "root": str(tmp_path), "verify": False}
    prepare.check(parse_config({"workers": 2, "logger": "none", "dataset": values}), starts_server=True)
    assert sorted(calls) == [False, True]
