"""Runs of several tasks in one report: columns and curves by the metrics that they have, the best by their direction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from ormo_rpc.config.parsing import parse_config, save_config
from ormo_rpc.loggers.metrics import metric_of
from ormo_rpc.report.pictures import comparison, single
from ormo_rpc.report.runs import Run, group_by_setting
from ormo_rpc.storage.summary import Summary, described, identity, metrics_as_dict, metrics_of, write_summary
from ormo_rpc.tasks import Classification, Task, TaskMetric
from ormo_rpc.tasks.metrics import LOSS, main_metric, metric_named
from tests.support.error_task import HITS, MAE, Distance
from tests.support.recorded_runs import cells

NAMED = {"_target_": "tests.support.error_task.Distance"}


def record(folder: Path, task: Task, figures: dict[str, Any], *, seed: int = 0, loss: float = 1.0, **options: Any) -> Run:
    """A short run that has these figures in its end, and in its only evaluation."""
    folder.mkdir(parents=True)
    config = parse_config(
        {"workers": 1, "task": NAMED if isinstance(task, Distance) else "classification", "seed": seed, **options}
    )
    save_config(config, folder / "config.yaml")
    header = {"event": "header", "version": 1, "commit": "c0ffee", "torch": "2", "cpu": "one"}
    event = {"event": "apply", "seconds": 0.5, "loss": loss, "iteration": 0, "worker": 0, "ticket": 0, "stamp": 0, "delay": 0}
    (folder / "trace.jsonl").write_text(f"{json.dumps(header)}\n{json.dumps(event)}\n")
    evaluated = {key: value for key, value in figures.items() if metric_of(key)}
    (folder / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "epoch": 0.5, "seconds": 0.5, **evaluated}) + "\n")
    content = {"status": "completed", "iterations": 1, "epochs": 0.5, "metrics": metrics_as_dict(task.metrics()), **figures}
    write_summary(folder, Summary.from_dict({**identity(config), **content}))
    return Run.load(folder)


def test_each_task_has_its_columns_and_the_best_of_its_own(tmp_path: Path) -> None:
    accuracies = {("asgd", 0): 0.5, ("asgd", 1): 0.75, ("ormo", 0): 0.875}
    runs = [
        record(tmp_path / f"{algorithm}{seed}", Classification(), {"test_accuracy": value}, seed=seed, algorithm=algorithm)
        for (algorithm, seed), value in accuracies.items()
    ]
    for algorithm, mae in (("asgd", 1.0), ("naive", 3.0), ("ormo", 2.0)):
        figures = {"test_mae": mae, "test_hits": 0.5, "val_mae": mae / 2}
        runs.append(record(tmp_path / f"{algorithm} distance", Distance(), figures, algorithm=algorithm))
    found = cells(group_by_setting(runs))
    assert list(found[0])[:7] == ["algorithm", "task", "seeds", "iterations", "test accuracy", "test mae", "val mae"]
    assert "test loss" not in found[0]
    of = {(row["algorithm"], row["task"].rpartition(".")[2]): row for row in found}
    assert {key: row["test accuracy"] for key, row in of.items() if row["test accuracy"] != "-"} == {
        ("asgd", "classification"): "62.50% ± 17.68%",
        ("ormo", "classification"): "87.50% *",
    }
    distances = [of[algorithm, "Distance"] for algorithm in ("asgd", "naive", "ormo")]
    assert [row["test mae"] for row in distances] == ["1.0 *", "3.0", "2.0"]
    assert [row["val mae"] for row in distances] == ["0.5 *", "1.5", "1.0"]
    assert [row["test hits"] for row in distances] == ["50% *"] * 3  # all alike
    assert of["ormo", "classification"]["test mae"] == "-"


def test_a_single_setting_is_not_the_best_of_anything(tmp_path: Path) -> None:
    (row,) = cells(group_by_setting([record(tmp_path / "run", Classification(), {"test_accuracy": 0.5})]))
    assert row["test accuracy"] == "50.00%"
    others = [{"test_accuracy": 0.5, "status": "diverged"}, {"test_accuracy": None}]
    runs = [record(tmp_path / f"{n}", Classification(), each, workers=2 + n) for n, each in enumerate(others)]
    assert [each["test accuracy"] for each in cells(group_by_setting([*runs, Run.load(tmp_path / "run")]))] == [
        "50.00%",
        "-",
        "-",
    ]


def test_a_task_without_another_metric_has_its_loss_as_a_column(tmp_path: Path) -> None:
    class Alone(Classification):
        def metrics(self) -> tuple[TaskMetric, ...]:
            return (LOSS,)

    runs = [record(tmp_path / f"{n}", Alone(), {"test_loss": n / 2, "val_loss": 1.0}, workers=n) for n in (1, 2)]
    assert [(row["test loss"], row["val loss"]) for row in cells(group_by_setting(runs))] == [
        ("0.5000 *", "1.0000 *"),
        ("1.0000", "1.0000 *"),
    ]
    assert runs[0].main_metric == LOSS
    assert single(runs[0]).axes[1].get_ylabel() == "test loss (lower is better)"


def test_curves_are_of_the_main_metric_of_each_task(tmp_path: Path) -> None:
    one = record(tmp_path / "one", Classification(), {"test_accuracy": 0.5})
    other = record(tmp_path / "other", Distance(), {"test_mae": 1.5, "test_hits": 0.25}, loss=-2.0)
    figure = comparison(group_by_setting([one, other]))
    labels = [each.get_ylabel() for each in figure.axes]
    assert labels[::2] == labels[1::2]
    assert sorted(labels[::2]) == sorted(
        ["training loss", "test accuracy (higher is better)", "training loss", "test mae (lower is better)"]
    )
    drawn = [
        (each.get_ylabel(), np.asarray(each.lines[0].get_ydata()).tolist(), each.get_yscale()) for each in figure.axes[::2]
    ]
    assert sorted(drawn) == [
        ("test accuracy (higher is better)", [0.5], "linear"),
        ("test mae (lower is better)", [1.5], "linear"),
        ("training loss", [-2.0], "linear"),  # a loss of one's own may be negative
        ("training loss", [1.0], "log"),
    ]


def test_the_title_of_a_picture_says_one_worker(tmp_path: Path) -> None:
    run = record(tmp_path / "run", Classification(), {"test_accuracy": 0.5})
    (title,) = [text.get_text() for text in single(run).texts]
    assert title == "ormo (async), 1 worker, digits, mlp: completed"
    assert described({**run.summary, "num_workers": 3}).startswith("ormo (async), 3 workers, ")


def test_declarations_are_read_back_and_an_earlier_version_had_those_of_classification() -> None:
    content = json.loads(json.dumps({"metrics": metrics_as_dict(Distance().metrics())}))
    assert metrics_of(content) == (LOSS, MAE, HITS)
    content["metrics"]["mae"]["of a later version"] = 1
    assert metrics_of(content)[1] == MAE
    assert metrics_of({}) == Classification().metrics()


@pytest.mark.parametrize(("value", "other", "lower"), [(1.0, 2.0, True), (2.0, 1.0, False), (1.0, 1.0, None)])
def test_the_better_of_two_values_is_told_by_the_direction(value: float, other: float, lower: bool | None) -> None:
    assert MAE.is_better(value, other) is (lower is True)
    assert HITS.is_better(value, other) is (lower is False)


def test_nan_is_never_better_and_anything_is_better_than_nan() -> None:
    nan = float("nan")
    for metric in (MAE, HITS):
        assert metric.is_better(1.0, nan)
        assert not metric.is_better(nan, 1.0)
        assert not metric.is_better(nan, nan)


def test_a_form_that_is_none_of_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^metric mae: form: got '\.2x', expected a format of numbers: "):
        TaskMetric("mae", "", higher_is_better=False, form=".2x")


def test_the_main_metric_is_the_first_beside_the_loss_and_rather_one_on_the_progress_bar() -> None:
    assert main_metric(Distance().metrics()) == main_metric((LOSS, HITS, MAE)) == MAE
    assert main_metric((LOSS, HITS)) == HITS  # which has no label
    assert main_metric((LOSS,)) == LOSS
    assert metric_named("loss") == LOSS


class Higher(Classification):
    """Has a metric of the name that another task's has, in the other direction."""

    @override
    def metrics(self) -> tuple[TaskMetric, ...]:
        return LOSS, TaskMetric("some/score", "a score", higher_is_better=True)


class Lower(Distance):
    """As `Higher`."""

    @override
    def metrics(self) -> tuple[TaskMetric, ...]:
        return LOSS, TaskMetric("some/score", "a score", higher_is_better=False)


def test_a_metric_of_two_tasks_is_best_in_the_direction_of_each(tmp_path: Path) -> None:
    runs = [
        record(tmp_path / f"{number} {algorithm}", task, {"test_some/score": value}, algorithm=algorithm)
        for number, task in enumerate((Lower(), Higher()))
        for algorithm, value in (("asgd", 0.25), ("ormo", 0.75))
    ]
    found = [row["test some/score"] for row in cells(group_by_setting(runs))]
    assert sorted(found) == ["0.2500", "0.2500 *", "0.7500", "0.7500 *"]
    marked = {(row["task"], row["algorithm"]) for row in cells(group_by_setting(runs)) if row["test some/score"].endswith("*")}
    assert {algorithm for _, algorithm in marked} == {"asgd", "ormo"}
