"""Sums and counts, and the metrics that several of them make."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score, r2_score
from torch import Tensor, nn

from ormo_rpc.data import DataSet
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.tasks import Sums, Task
from ormo_rpc.tasks.language_modelling import LanguageModelling
from ormo_rpc.tasks.metrics import metric_named
from ormo_rpc.tasks.model_loss import ModelLoss
from ormo_rpc.tasks.own_loop import own_metric
from ormo_rpc.tasks.regression import Regression
from ormo_rpc.tasks.segmentation import Segmentation
from ormo_rpc.worker.evaluation import Evaluator
from tests.support.tasks import Trees


def over_parts(task: Task, output: Tensor, targets: Tensor, cuts: list[int]) -> dict[str, float]:
    """The metrics of a split that is cut into batches."""
    total: dict[str, Sums] = {}
    for start, stop in zip([0, *cuts], [*cuts, len(targets)], strict=True):
        batch = (None, targets[start:stop])
        for name, each in task.sums(output[start:stop], batch).items():
            total[name] = total[name] + each if name in total else each
    return dict(task.means(total))


cuts_of_twelve = st.lists(st.integers(1, 11), unique=True, max_size=5).map(sorted)


@given(values=st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 9)), min_size=1, max_size=9))
def test_a_mean_is_that_of_all_values_each_as_often_as_it_counts(values: list[tuple[float, int]]) -> None:
    total = Sums(0.0, 0)
    for value, count in values:
        total += Sums(value * count, count)
    every = [value for value, count in values for _ in range(count)]
    assert total.counts is bool(every)
    assert total.mean() == pytest.approx(np.mean(every), abs=1e-9) if every else math.isnan(total.mean())


def test_a_mean_of_several_leaves_out_those_that_never_count() -> None:
    total = Sums(torch.tensor([1, 0, 3]), torch.tensor([2, 0, 4])) + Sums(torch.tensor([1, 0, 0]), torch.tensor([2, 0, 0]))
    assert total.mean() == pytest.approx((2 / 4 + 3 / 4) / 2)
    nothing = Sums(torch.zeros(2), torch.zeros(2))
    assert math.isnan(nothing.mean())
    assert not nothing.counts


@given(seed=st.integers(0, 99), cuts=cuts_of_twelve)
def test_r2_is_that_of_scikit_learn_however_the_split_is_cut(seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = 100 + torch.randn(12, 3, generator=generator, dtype=torch.float64)
    output = targets + torch.randn(12, 3, generator=generator, dtype=torch.float64)
    found = over_parts(Regression(), output, targets, cuts)
    assert found["r2"] == pytest.approx(r2_score(targets, output), rel=1e-8)


def test_a_column_that_is_constant_has_no_r2() -> None:
    targets = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    output = torch.tensor([[1.5, 5.0], [2.0, 6.0], [4.0, 5.0]])
    found = over_parts(Regression(), output, targets, [])
    assert found["r2"] == pytest.approx(r2_score(targets[:, 0], output[:, 0]), rel=1e-6)
    assert "r2" not in over_parts(Regression(), output[:, 1:], targets[:, 1:], [])


@given(seed=st.integers(0, 99), cuts=cuts_of_twelve)
def test_the_mean_intersection_over_union_is_that_of_scikit_learn(seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, targets = (
        torch.randn(12, 4, 3, generator=generator),
        torch.randint(3, (12, 3), generator=generator),
    )  # never class 3
    targets[:, 0] = 255
    found = over_parts(Segmentation(ignore_index=255), logits, targets, cuts)
    counted = targets != 255
    known, guessed = targets[counted].numpy(), logits.argmax(1)[counted].numpy()
    occurring = sorted({*known.tolist(), *guessed.tolist()})
    assert found["mean_iou"] == pytest.approx(jaccard_score(known, guessed, labels=occurring, average="macro"))
    assert found["accuracy"] == pytest.approx((known == guessed).mean())


def test_a_split_of_missing_numbers_cannot_be_evaluated() -> None:
    split = Trees((torch.zeros(3, 2), torch.full((3,), math.nan)))
    model = FlatModel(nn.Linear(2, 1))
    evaluator = Evaluator(model, DataSet(split, split, (2,), 0), Regression(ignore_nan=True))
    with pytest.raises(ValueError, match=r"^dataset: no target of the test split counts$"):
        evaluator(model.flat_params(), {})


def test_targets_of_language_models_are_shifted_where_they_lie_at_their_tokens() -> None:
    tokens = torch.tensor([[1, 2, 3]])
    for batch, shift, expected in (
        (tokens, None, [[2, 3]]),
        ((tokens, tokens), None, [[1, 2, 3]]),
        ((tokens, tokens), True, [[2, 3]]),
        ({"input_ids": tokens, "labels": tokens}, None, [[2, 3]]),
        ({"input_ids": tokens, "labels": tokens}, False, [[1, 2, 3]]),
        ({"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 0]])}, None, [[2, -100]]),
    ):
        assert LanguageModelling(shift=shift).targets(batch).tolist() == expected


@pytest.mark.parametrize(
    "form",
    [lambda loss: loss, lambda loss: (loss, None), lambda loss: {"loss": loss}, lambda loss: SimpleNamespace(loss=loss)],
)
def test_the_loss_of_a_model_is_found_in_each_form_of_output(form: Any) -> None:
    loss = torch.tensor(2.0)
    task, batch = ModelLoss(), (torch.zeros(3, 2),)
    assert task.loss(form(loss), batch) is loss
    assert task.sums(form(loss), batch) == {"loss": Sums(6.0, 3)}
    task.check(form(loss), batch)


@pytest.mark.parametrize(
    ("name", "higher"),
    [("coverage", True), ("f1", True), ("dice", True), ("mean_error", False), ("wave_loss", False), ("test_NLL", False)],
)
def test_the_direction_of_an_unknown_metric_is_told_by_its_name(name: str, higher: bool) -> None:
    assert metric_named(name).higher_is_better is higher
    assert own_metric(name).higher_is_better is higher
    assert own_metric(name, [name]).higher_is_better
    assert not own_metric(name, ["another"]).higher_is_better
