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
from torch.utils.data import TensorDataset
from typing_extensions import override

from ormo_rpc.data import DataSet, Epochs, MapSplit, Pad
from ormo_rpc.errors import ConfigError
from ormo_rpc.messages import Reply
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.options import find
from ormo_rpc.tasks import Classification, Sums, Task, UnfitTargets
from ormo_rpc.tasks.custom import CustomTask
from ormo_rpc.tasks.language_modelling import LanguageModelling
from ormo_rpc.tasks.metrics import metric_named
from ormo_rpc.tasks.model_loss import ModelLoss
from ormo_rpc.tasks.own_loop import own_metric
from ormo_rpc.tasks.regression import Regression
from ormo_rpc.tasks.segmentation import Segmentation
from ormo_rpc.worker.evaluation import Evaluator
from ormo_rpc.worker.worker import Worker
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
    for mean, scale in ((100.0, 1.0), (1.7e9, 1000.0)):  # the second as seconds of a clock are
        targets = mean + scale * torch.randn(12, 3, generator=generator, dtype=torch.float64)
        output = targets + scale * torch.randn(12, 3, generator=generator, dtype=torch.float64)
        found = over_parts(Regression(), output, targets, cuts)
        assert found["r2"] == pytest.approx(r2_score(targets, output), rel=1e-8)


def test_errors_are_not_of_rounded_targets() -> None:
    targets, output = torch.tensor([2**24 + 1, 2**24 + 3]), torch.tensor([2.0**24, 2.0**24])
    assert over_parts(Regression(), output, targets, [1])["loss"] == (1 + 9) / 2
    assert over_parts(Regression(), output, targets.double(), [1])["mae"] == 2.0


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


LENGTHS = (3, 1, 4, 2, 7, 5, 3, 2)


class Tokens(nn.Module):
    """Logits of the token after each, from that one alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 11)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)


@pytest.mark.parametrize("task", [LanguageModelling(), LanguageModelling(ignore_index=4)])
def test_padded_token_sequences_have_the_metrics_and_gradient_of_each_by_itself(task: LanguageModelling) -> None:
    generator = torch.Generator().manual_seed(0)
    items = [torch.randint(0, 11, (2 + length,), generator=generator) for length in LENGTHS]  # 0 is a token
    plain, model = Tokens(), FlatModel(Tokens())
    ignored = task.ignore_index
    losses = [nn.functional.cross_entropy(plain(x[:-1]), x[1:], reduction="none", ignore_index=ignored) for x in items]
    expected = torch.cat(losses).sum() / sum(int((x[1:] != ignored).sum()) for x in items)
    split = MapSplit(items, Pad())
    found = Evaluator(model, DataSet(split, split), task, 3)(model.flat_params(), {}).test["loss"]
    assert found == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    epochs = Epochs(len(items), len(items), 0)
    worker = Worker(FlatModel(Tokens()), split, epochs, find("algorithm", "asgd")(), seed=0, task=task)
    reply = Reply(worker=0, ticket=0, stamp=0, params=worker.model.flat_params(), lr=0.1, steps=1, incarnation=0)
    assert plain.embedding.weight.grad is not None
    torch.testing.assert_close(worker.compute(reply).grad, plain.embedding.weight.grad.flatten())


def test_padded_numbers_have_the_metrics_of_each_item_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    items = [tuple(torch.randn(2, length, generator=generator).double()) for length in LENGTHS]
    split, model = MapSplit(items, Pad()), FlatModel(nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 1, 1).double()))
    task = Regression(ignore_nan=True)
    found = Evaluator(model, DataSet(split, split), task, 3)(model.flat_params(), {}).test
    weight, bias = model.flat_params()
    errors = torch.cat([x * weight + bias - y for x, y in items])
    assert found["loss"] == pytest.approx(errors.square().mean().item(), rel=1e-9)
    assert found["mae"] == pytest.approx(errors.abs().mean().item(), rel=1e-9)


@given(seed=st.integers(0, 99), size=st.integers(1, 8))
def test_ragged_targets_have_the_metrics_of_all_their_numbers(seed: int, size: int) -> None:
    """However wide the batches are that they come in."""
    generator = torch.Generator().manual_seed(seed)
    targets = [torch.randn(2, length, generator=generator).double() for length in LENGTHS]
    task, total = Regression(ignore_nan=True), dict[str, Sums]()
    for start in range(0, len(targets), size):
        batch = Pad()([(each, each) for each in targets[start : start + size]])
        for name, each in task.sums(torch.zeros_like(batch[1]), batch).items():
            total[name] = total[name] + each if name in total else each
    every = torch.cat([each.flatten() for each in targets])
    longest = max(LENGTHS)
    places = [(row, n) for row in range(2) for n in range(longest)]
    columns = [torch.stack([each[row, n] for each in targets if each.shape[1] > n]) for row, n in places]
    expected = {
        "loss": every.square().mean().item(),
        "mae": every.abs().mean().item(),
        "rmse": every.square().mean().sqrt().item(),
        "r2": float(np.mean([r2_score(each, torch.zeros(len(each))) for each in columns if len(each) > 1])),
    }
    assert task.means(total) == pytest.approx(expected, rel=1e-9)


def test_sums_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^got sums of the shapes \(2,\) and \(1,\) in two batches, expected one shape$"):
        _ = Sums(torch.ones(2), torch.ones(2)) + Sums(torch.ones(1), torch.ones(1))


def test_padding_of_bytes_does_not_count() -> None:
    texts = [torch.tensor(text, dtype=torch.uint8) for text in ([1, 2, 3, 4], [5, 6])]
    batch = Pad()([{"input_ids": each} for each in texts])
    logits = torch.randn(2, 4, 200, generator=torch.Generator().manual_seed(0))
    task = LanguageModelling()
    expected = nn.functional.cross_entropy(torch.cat([logits[0, :3], logits[1, :1]]), torch.tensor([2, 3, 4, 6]))
    assert task.count(batch) == 4
    assert task.loss(logits, batch).item() == pytest.approx(expected.item(), rel=1e-6)
    assert task.means(task.sums(logits, batch))["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_padded_numbers_that_would_count_are_refused() -> None:
    of_floats, whole = ([(torch.ones(length, dtype=dtype),) * 2 for length in (2, 1)] for dtype in (torch.float32, torch.int64))
    with pytest.raises(ValueError, match=r"^a target is NaN, expected a number; task\.ignore_nan=true leaves it out, .*$"):
        Regression().check_batch(Pad()(of_floats))
    with pytest.raises(ValueError, match=r"^a target is -100, with which dataset\.collate=pad pads whole numbers, .*$"):
        Regression(ignore_nan=True).check_batch(Pad()(whole))
    with pytest.raises(ValueError, match=r"^a target is -100, with which dataset\.collate=pad pads whole numbers, .*$"):
        Regression().loss(torch.zeros(2, 2), Pad()(whole))  # in a later batch than that of the trial
    Regression().check_batch((None, torch.full((2, 2), 156, dtype=torch.uint8)))  # of which torch says that it is -100
    logits, chances = torch.zeros(2, 3, 4), [torch.full((3, length), 1 / 3) for length in (4, 2)]
    batch = Pad()([(each, each) for each in chances])
    with pytest.raises(UnfitTargets, match=r"class probabilities, but some sum to nan over the classes, expected"):
        Classification().check(logits, batch)


def test_a_class_of_a_loss_that_cannot_be_made_is_refused() -> None:
    task = CustomTask(_target_="torch.nn.CrossEntropyLoss", kwargs={"weight": WEIGHTS})
    with pytest.raises(ConfigError, match=r"^task\._target_: torch\.nn\.CrossEntropyLoss cannot be made: TypeError: .*tensor"):
        task.loss(torch.zeros(2, 4), (None, torch.tensor([0, 1])))


def of_those_that_count(output: Tensor, targets: Tensor) -> Tensor:
    """A mean over the targets that are not 0."""
    return nn.functional.cross_entropy(output, targets, ignore_index=0)


def of_all_samples(output: Tensor, targets: Tensor) -> Tensor:
    """A mean over all samples."""
    return nn.functional.cross_entropy(output, targets, ignore_index=0, reduction="sum") / len(targets)


WEIGHTS = [1.0, 5.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("target", "of_probabilities", "ignored"),
    [
        ("torch.nn.CrossEntropyLoss", False, 0),
        ("torch.nn.CrossEntropyLoss", True, -100),  # of probabilities torch takes no other
        ("torch.nn.NLLLoss", False, 0),
    ],
)
def test_the_mean_over_a_split_is_weighted_by_the_classes_as_torch_does_it(
    target: str, of_probabilities: bool, ignored: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(23, 4, generator=generator), torch.randint(0, 4, (23,), generator=generator)
    targets[:6] = 3  # of which a batch is made
    targets[6:9] = 0
    targets[9:12] = 2  # one that weighs nothing
    if of_probabilities:
        targets = torch.softmax(torch.randn(23, 4, generator=generator), 1)
    options = {"ignore_index": ignored, "weight": {"_target_": "torch.tensor", "data": WEIGHTS}}
    task = CustomTask(_target_=target, kwargs=options)
    function = getattr(nn, target.rpartition(".")[2])(torch.tensor(WEIGHTS), ignore_index=ignored)
    model, split = FlatModel(nn.Sequential(nn.Linear(4, 4), nn.LogSoftmax(1))), MapSplit(TensorDataset(inputs, targets))
    found = Evaluator(model, DataSet(split, split), task, 3)(model.flat_params(), {}).test["loss"]
    with torch.no_grad():
        assert found == pytest.approx(function(model.module(inputs), targets).item(), rel=1e-6)


@pytest.mark.parametrize(("name", "warns"), [("of_those_that_count", True), ("of_all_samples", False)])
def test_a_loss_that_is_no_mean_over_samples_is_warned_of(name: str, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    task = CustomTask(_target_=f"{__name__}.{name}")
    output, targets = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1, 2, 3, 1, 2, 3])
    for _ in range(2):
        task.check(output, (None, targets))
    assert [record.getMessage().partition(", so")[0] for record in caplog.records] == [
        f"task._target_: {__name__}.{name}: the loss of a batch is not that of its two halves, weighted by their samples"
    ] * warns


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
