"""Metrics of torchmetrics beside those of a task: values of the whole split, both splits apart, and refusals."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from ormo_rpc import train
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.data import DataSet
from ormo_rpc.errors import ConfigError
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.runtimes import prepare
from ormo_rpc.tasks import Classification, TaskMetric
from ormo_rpc.tasks.regression import Regression
from ormo_rpc.worker.evaluation import Evaluator
from tests.support.tasks import CLASSES, SAMPLES, Largest, Trees, dense, normal, numbers

HERE = __name__
LARGEST = "tests.support.tasks.Largest"
F1 = {"_target_": "torchmetrics.classification.MulticlassF1Score", "num_classes": CLASSES, "average": "macro"}
INSTALLED = importlib.util.find_spec("torchmetrics") is not None
with_torchmetrics = pytest.mark.skipif(not INSTALLED, reason="torchmetrics is not installed")


class Several(Largest):
    """Returns several numbers."""

    def compute(self) -> Any:
        return torch.zeros(3)


class Failing(Largest):
    """Cannot be updated."""

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        raise RuntimeError("not with these")


class Incomplete:
    """Is no metric."""


def evaluated(task: Any, test: Trees, validation: Trees | None = None, outputs: int = CLASSES) -> Any:
    torch.manual_seed(0)
    model = FlatModel(dense(outputs)())
    result = Evaluator(model, DataSet(test, test, (6,), CLASSES, validation), task, 4)(model.flat_params(), {})
    return result, model.module


@with_torchmetrics
@pytest.mark.slow  # importing it takes seconds
def test_the_value_is_that_of_the_whole_split_for_each_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ormo_rpc.worker.evaluation.BATCH_SIZE", 4)
    test, validation = Trees((normal(6), numbers())), Trees((normal(6) + 1, numbers(seed=5)))
    result, module = evaluated(Classification(torchmetrics={"f1": F1}), test, validation)
    for split, found in ((test, result.test), (validation, result.validation)):
        inputs, targets = split.samples
        predicted = module(inputs).argmax(1)
        assert found["f1"] == pytest.approx(f1_score(targets, predicted, average="macro", labels=range(CLASSES)), rel=1e-5)
    assert list(result.test) == ["loss", "accuracy", "f1"]


def test_an_object_of_ones_own_is_given_predictions_in_the_shape_of_the_targets() -> None:
    targets = normal(7)[:, 6]
    task = Regression(torchmetrics={"largest": {"_target_": LARGEST}})
    result, _ = evaluated(task, Trees((normal(6), targets)), outputs=1)
    assert result.test["largest"] == pytest.approx(float(targets.abs().max()))
    assert len(targets) == SAMPLES


def test_it_is_not_given_targets_that_do_not_count() -> None:
    targets = normal(7)[:, 6]
    targets[targets.abs().argmax()] = torch.nan
    task = Regression(ignore_nan=True, torchmetrics={"largest": {"_target_": LARGEST}})
    result, _ = evaluated(task, Trees((normal(6), targets)), outputs=1)
    assert result.test["largest"] == pytest.approx(float(targets.nan_to_num().abs().max()))


@with_torchmetrics
@pytest.mark.slow  # importing it takes seconds
def test_the_direction_is_that_of_the_object() -> None:
    task = Classification(torchmetrics={"f1": F1, "largest": {"_target_": LARGEST}})
    assert task.metric("f1") == TaskMetric("f1", "MulticlassF1Score", higher_is_better=True, bar="f1")
    assert not task.metric("largest").higher_is_better
    assert [each.name for each in task.all_metrics()] == ["loss", "accuracy", "f1", "largest"]


@with_torchmetrics
@pytest.mark.slow  # importing it takes seconds
def test_a_run_has_it_in_its_summary_and_may_be_searched_by_it(tmp_path: Path) -> None:
    f1 = {**F1, "num_classes": 10}
    summary = train(
        {
            "runtime": "sim",
            "logger": "none",
            "workers": 2,
            "task": {"torchmetrics": {"f1": f1}},
            "optimized_metric": "test_f1",
            "train": {"max_iterations": 20},
        },
        run_dir=tmp_path,
    )
    assert 0 < summary["test_f1"] < 1


def refusal(torchmetrics: Mapping[str, Any], task: str = "classification") -> str:
    values = {"task": {"name": task, "torchmetrics": torchmetrics}, "logger": "none", "runtime": "sim"}
    with pytest.raises(ConfigError) as caught:
        prepare.check(parse_config(values), starts_server=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


WHERE = r"(on the first test batch, in eval mode of digits)"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("f1", "got 'f1', expected _target_, such as torchmetrics.classification.MulticlassF1Score"),
        (
            {"_target_": f"{HERE}.Incomplete"},
            f"{HERE}.Incomplete has no reset(), expected an object with reset, update, compute",
        ),
        ({"_target_": f"{HERE}.Several"}, f"compute() returned a tensor (3,), expected one number: an average {WHERE}"),
        ({"_target_": f"{HERE}.Failing"}, f"RuntimeError: not with these {WHERE}"),
    ],
)
def test_what_cannot_measure_is_refused_in_one_line(spec: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classification, "scored", lambda *_: (torch.zeros(3), torch.zeros(3)))
    assert refusal({"mine": spec}) == f"task.torchmetrics.mine: {message}"


def test_a_name_that_is_taken_is_refused() -> None:
    message = "task.torchmetrics.accuracy: the task has a metric of this name, expected another one"
    assert refusal({"accuracy": {"_target_": LARGEST}}) == message


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchmetrics" else found(name, *rest))
    assert refusal({"f1": F1}) == "task.torchmetrics.f1: torchmetrics is not installed; pip install torchmetrics"


@with_torchmetrics
@pytest.mark.slow  # importing it takes seconds
def test_keywords_that_it_does_not_take_are_named() -> None:
    assert refusal({"f1": {**F1, "nonsense": 1}}).startswith("task.torchmetrics.f1")
