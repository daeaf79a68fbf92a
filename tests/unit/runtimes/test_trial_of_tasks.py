"""The trial batch with every task: whatever is wrong with a batch, an output or a loss is one line before anything starts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes import prepare
from tests.support import untrainable

HERE = untrainable.__name__
PLACE = rf" on training batch 0 of {re.escape(HERE)}\.{{data}}: "
PAIR = r"expected a pair \(inputs, targets\), or a mapping with one of labels, label, targets, target"


def refusal(task: Any, data: dict[str, Any], model: str, **options: Any) -> str:
    values = {
        "task": task,
        "dataset": {**data, "_target_": f"{HERE}.{data['_target_']}"},
        "model": {"_target_": f"{HERE}.{model}"},
        "logger": "none",
        "train": {"batch_size": 4},
        **options,
    }
    with pytest.raises(ConfigError) as caught:
        prepare.check(parse_config(values), starts_server=True)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("a_number", r"the loss is of type float, expected a tensor of no dimension"),
        ("one_each", r"the loss has the shape \(4,\), expected one number of floating point: the mean over the targets"),
        ("whole_number", r"the loss is of torch\.int64, expected one number of floating point: .*"),
        ("failing", r"KeyError: .*no.*such.* \(inputs float32 \(4, 2\), targets int64 \(4,\)\)"),
        ("three_parameters", r"TypeError: three_parameters\(\) missing 1 required positional argument: 'weight' .*"),
    ],
)
def test_what_is_no_loss_names_the_function(loss: str, message: str) -> None:
    task = {"_target_": f"{HERE}.{loss}"}
    found = refusal(task, {"_target_": "blobs"}, "Linear")
    assert re.fullmatch(rf"task: {re.escape(HERE)}\.{loss}{PLACE.format(data='blobs')}{message}", found), found


def test_a_loss_without_a_gradient_is_named() -> None:
    found = refusal({"_target_": f"{HERE}.without_gradient"}, {"_target_": "blobs"}, "Linear")
    message = r"the loss does not depend on any trainable parameter; expected one that gradients flow from \(.*\)"
    assert re.fullmatch(rf"model: {re.escape(HERE)}\.Linear{PLACE.format(data='blobs')}{message}", found), found


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("classification", "tensor", rf"the batch is of type Tensor, {PAIR}"),
        ("classification", "triple", rf"the batch is a \w+ of 3, {PAIR}"),
        ("regression", "no targets", rf"the batch has the keys inputs, {PAIR}"),
        ("regression", "not finite", r"a target is NaN, expected a number; task\.ignore_nan=true leaves it out, as .*"),
        (
            "segmentation",
            "floats",
            r"the targets are of type torch\.float64, expected a tensor of class numbers .*",
        ),
        ("language_modelling", "floats", r"the targets are torch\.float64 \(4,\), expected token numbers \(B, T\)"),
        ("language_modelling", "no targets", r"the batch has the keys inputs, expected labels or input_ids among them"),
        ("language_modelling", "single tokens", r"the sequences have 1 token, expected two at least.*"),
        (
            {"name": "model_loss", "mean_over": "labels"},
            "floats",
            r"the labels are torch\.float64 \(4,\), expected numbers of them for task\.mean_over=labels",
        ),
    ],
)
def test_a_batch_without_what_the_task_needs_is_named(task: Any, kind: str, message: str) -> None:
    data = {"_target_": "rows_of", "kind": kind, "num_classes": 3}
    found = refusal(task, data, "Linear")
    assert re.fullmatch(rf"dataset: {re.escape(HERE)}\.rows_of: in training batch 0 {message}", found), found


@pytest.mark.parametrize(
    ("task", "data", "model", "message"),
    [
        ("regression", "floats", "Linear", r"the output \(4, 3\) does not fit targets \(4,\): expected the same .*"),
        ("regression", "floats", "Decided", r"the output is of type torch\.int64, expected a tensor of numbers .*"),
        (
            "language_modelling",
            "tokens",
            "Tokens",
            r"the output \(4, 3, 2\) does not fit tokens \(4, 2\), .*transpose.*",
        ),
        ("model_loss", "floats", "Pair", r"TypeError: .*takes 2 positional arguments but 3 were given .*"),
    ],
)
def test_an_output_that_does_not_fit_names_the_model(task: str, data: str, model: str, message: str) -> None:
    found = refusal(task, {"_target_": "rows_of", "kind": data, "num_classes": 3}, model)
    assert re.fullmatch(rf"model: {re.escape(HERE)}\.{model}{PLACE.format(data='rows_of')}{message}", found), found


def test_shapes_that_torch_would_broadcast_are_refused() -> None:
    task = {"_target_": "torch.nn.functional.mse_loss"}
    found = refusal(task, {"_target_": "rows_of", "kind": "floats"}, "single")
    assert "the output (4, 1) and the targets (4,) would be broadcast against each other" in found


def test_a_batch_that_cannot_be_cut_is_refused_where_it_would_be() -> None:
    found = refusal("classification", {"_target_": "uneven"}, "WithTable", worker={"accumulate": 2})
    expected = "worker.accumulate: got 2, expected 1, as training batch 0 of tests.support.untrainable.uneven cannot be cut: "
    assert found.startswith(f"{expected}batch[0][0] has 4 rows and batch[0][1] has 7")


def test_a_part_that_is_too_small_names_what_has_cut_it() -> None:
    found = refusal("classification", {"_target_": "blobs"}, "normed", worker={"accumulate": 4})
    place = "model: tests.support.untrainable.normed on a part of training batch 0, as worker.accumulate=4, of tests.support."
    assert found.startswith(f"{place}untrainable.blobs: ValueError: Expected more than 1 value per channel when training")
