"""One trial batch in the launcher: what cannot be trained is refused in one line, and what can is not changed by it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ormo_rpc import train
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes import prepare
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.trial import try_job
from ormo_rpc.tasks.cross_entropy import check_fit
from tests.support import untrainable
from tests.support.untrainable import (
    Decided,
    Detached,
    Exiting,
    InPlace,
    Linear,
    Named,
    Output,
    Pair,
    Remembering,
    Renormalising,
    Squeezing,
    Writing,
    narrow,
    normed,
    pooled,
    single,
)

OPTIONS: dict[str, Any] = {"workers": 2, "logger": "none", "train": {"batch_size": 4}}
HERE = untrainable.__name__


# -- refusals ------------------------------------------------------------------------------------------------------------


def config(data: str, model: Callable[..., nn.Module], keywords: dict[str, Any] | None = None, **options: Any) -> Config:
    dataset = {"_target_": f"{HERE}.{data}", **(keywords or {})}
    return parse_config({**OPTIONS, "dataset": dataset, "model": {"_target_": f"{HERE}.{model.__name__}"}, **options})


PLACE = r"model: tests\.support\.untrainable\.{model} on {where} of tests\.support\.untrainable\.{data}: "
FIRST = "training batch 0"
ALONE = "training batch 2 (a single sample; another train.batch_size makes it larger)"
EVAL = "the first {split} batch, in eval mode"


@pytest.mark.parametrize(
    ("data", "model", "keywords", "where", "message"),
    [
        # dtype and shape of the inputs
        ("blobs", Linear, {"dtype": "float64"}, FIRST, r"RuntimeError: .*dtype.* \(inputs float64 \(4, 2\), .*\)"),
        ("blobs", Linear, {"dtype": "int64"}, FIRST, r"RuntimeError: .*dtype.* \(inputs int64 \(4, 2\), .*\)"),
        ("masks", Linear, {}, FIRST, r"RuntimeError: mat1 and mat2 shapes .* \(inputs float32 \(4, 1, 4, 4\), .*\)"),
        # the output against the targets
        ("masks", pooled, {}, FIRST, r"the output \(4, 3\) does not fit targets \(4, 4, 4\): expected \(N, C, \.\.\.\) and .*"),
        ("blobs", Decided, {}, FIRST, r"the output is of type torch\.int64, expected a tensor of logits .*"),
        ("blobs", Pair, {}, FIRST, r"the output is of type tuple, expected a tensor of logits .*"),
        ("blobs", Output, {}, FIRST, r"the output is of type SimpleNamespace, expected a tensor of logits .*"),
        ("blobs", Named, {}, EVAL.format(split="test"), r"the output is of type dict, expected a tensor of logits .*"),
        ("one_float_each", Linear, {}, FIRST, r"the output \(4, 3\) does not fit targets \(4,\): .*probabilities.*"),
        # the backward pass
        ("blobs", Detached, {}, FIRST, r"the loss does not depend on any trainable parameter; expected one .*"),
        ("blobs", InPlace, {}, FIRST, r"RuntimeError: one of the variables .* modified by an inplace operation.*"),
        # the last batch of an epoch
        ("blobs", normed, {}, ALONE, r"ValueError: Expected more than 1 value per channel when training.*"),
        ("blobs", Squeezing, {}, ALONE, r"the output \(3,\) does not fit targets \(1,\): expected .*"),
        # evaluation
        ("blobs", Exiting, {"count": 8}, EVAL.format(split="test"), r"SystemExit: 0 .*"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_trained_on_its_data_is_one_line(
    data: str, model: Callable[..., nn.Module], keywords: dict[str, Any], where: str, message: str
) -> None:
    place = PLACE.format(model=model.__name__, where=re.escape(where), data=data)
    with pytest.raises(ConfigError, match=rf"^{place}{message}$") as caught:
        prepare.check(config(data, model, keywords), starts_server=True)
    assert "\n" not in str(caught.value)


def test_classes_that_come_last_are_told_their_place() -> None:
    with pytest.raises(ValueError, match=r"fit targets \(2, 5\): .*; classes that come last, .*output\.movedim\(-1, 1\)$"):
        check_fit(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long))


def test_the_output_of_a_segmentation_does_not_fit_one_target_each() -> None:
    values = {**OPTIONS, "dataset": "digits", "model": {"_target_": f"{HERE}.dense"}}
    message = (
        r"the output \(4, 3, 8, 8\) does not fit targets \(4,\): expected \(N, C, \.\.\.\) and class numbers \(N, \.\.\.\) .*"
    )
    with pytest.raises(ConfigError, match=rf"^model: .*\.dense on training batch 0 of digits: {message}$"):
        prepare.check(parse_config(values), starts_server=True)


@pytest.mark.parametrize(
    ("data", "model", "keywords", "message"),
    [
        (
            "ragged",
            Linear,
            {},
            r"training batch 0 cannot be made: ValueError: items have different shapes .stack expects .*",
        ),
        ("broken", Linear, {}, r"training batch 0 cannot be made: OSError: no file of item \d"),
        ("complex_numbers", Linear, {}, r"in training batch 0 the targets are of type torch\.complex64, expected .*"),
        ("a_list", Linear, {}, r"in training batch 0 the targets are of type list, expected a tensor of .*"),
        ("blobs", narrow, {}, r"in training batch 0 a target is 2, expected 0 to 1 \(the output has 2 classes\) or -100 .*"),
        ("several_classes_each", Linear, {}, r"in training batch 0 targets .* sum to 3 over the classes, expected .*"),
        ("beyond", Linear, {}, r"in training batch 0 a target is 156, expected 0 to 2 .*"),
        ("positions", Linear, {}, r"in training batch 0 targets .*, but some are negative, expected .*"),
        ("blobs", single, {"high": 1, "test_high": 1}, r"in training batch 0 there is one class, expected at least two: .*"),
        ("blobs", Linear, {"low": -1}, r"in training batch 0 a target is -1, expected 0 to 2 .*"),
        (
            "blobs",
            Linear,
            {"count": 8, "test_high": 5},
            r"in the first test batch, in eval mode a target is 3, expected 0 to 2 .*",
        ),
    ],
)
def test_a_data_set_that_cannot_be_trained_on_is_one_line(
    data: str, model: Callable[..., nn.Module], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^dataset: tests\.support\.untrainable\.{data}.*[:,] .*{message}$") as caught:
        prepare.check(config(data, model, keywords), starts_server=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["ValueError", "OSError", "SystemExit"])
@pytest.mark.parametrize("part", ["dataset", "model"])
def test_what_raises_while_it_is_made_is_named(part: str, kind: str) -> None:
    """Also with a `ValueError`, which this package's own refusals are."""
    values = {"dataset": "digits", "model": "mlp", part: {"_target_": f"{HERE}.raising", "kind": kind}}
    message = rf"^{part}: tests\.support\.untrainable\.raising cannot be made: {kind}: no file of it$"
    with pytest.raises(ConfigError, match=message):
        prepare.check(parse_config({**OPTIONS, **values}), starts_server=True)


@pytest.mark.parametrize(("model", "name"), [(Writing, "layer.weight"), (Renormalising, "embedding.weight")])
def test_a_model_that_writes_to_its_parameters_is_refused_with_their_name(model: Callable[..., nn.Module], name: str) -> None:
    place = PLACE.format(model=model.__name__, where=FIRST, data="blobs")
    with pytest.raises(ConfigError, match=rf"^{place}{re.escape(name)}: got another value from a forward pass, .*$"):
        prepare.check(config("blobs", model), starts_server=True)


def test_parameters_that_are_not_trained_here_are_refused_with_their_dtype() -> None:
    message = r"^model: weight: got a trainable parameter of torch\.complex64, expected one of float16, .*; real pairs .*$"
    values = {"dataset": {"_target_": f"{HERE}.blobs"}, "model": {"_target_": f"{HERE}.of_dtype", "dtype": "complex64"}}
    with pytest.raises(ConfigError, match=message):
        prepare.check(parse_config({**OPTIONS, **values}), starts_server=True)


def test_an_attribute_that_no_longer_follows_its_parameter_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    prepare.check(config("blobs", Remembering), starts_server=True)
    (text,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert text.startswith("model: Remembering.stale: this attribute lies in the memory of a trained parameter at construction")


@pytest.mark.parametrize(("splits", "name"), [({"test": 0}, "test set"), ({"test": 2, "validation": 0}, "validation split")])
def test_an_empty_split_is_refused(splits: dict[str, int], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^dataset: got an empty {name}, expected at least one sample$"):
        prepare.check(config("empty_splits", Linear, splits), starts_server=True)


@pytest.mark.parametrize("data", ["int32", "uint8", "boolean", "probabilities"])
def test_targets_of_every_kind_that_can_be_trained_on_pass(data: str) -> None:
    assert prepare.check(config(data, Linear), starts_server=True) is not None


def test_a_loss_that_is_not_finite_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    prepare.check(config("not_finite", Linear), starts_server=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert re.fullmatch(
        PLACE.format(model="Linear", where=FIRST, data="not_finite") + "the loss is nan at .*", caplog.messages[0]
    )


@pytest.mark.parametrize(
    "options",
    [{"worker": {"dummy": True}}, {"runtime": {"name": "sim", "gradient": "quadratic"}, "train": {"max_iterations": 3}}],
)
def test_a_run_without_batches_tries_none(options: dict[str, Any]) -> None:
    prepare.check(config("blobs", Pair, **options), starts_server=True)


def test_a_launcher_that_does_not_start_the_server_tries_none() -> None:
    assert prepare.check(config("blobs", Pair), starts_server=False) is not None


# -- nothing else --------------------------------------------------------------------------------------------------------


def test_the_random_states_are_left_as_they_were() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    made = Job(parse_config({**OPTIONS, "dataset": {"_target_": f"{HERE}.noisy_pair"}, "model": noisy()}))
    seed()
    try_job(made)
    assert draws() == expected


def noisy() -> dict[str, str]:
    return {"_target_": f"{HERE}.noisy_model"}


@pytest.mark.parametrize("validation", [0, 3])
def test_a_run_has_the_same_bits_without_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: int) -> None:
    options = {
        **OPTIONS,
        "runtime": "sim",
        "dataset": {"_target_": f"{HERE}.noisy_pair", "validation": validation},
        "model": noisy(),
        "train": {"batch_size": 4, "epochs": 2},
    }
    with_trial = train(options, run_dir=tmp_path / "with")
    monkeypatch.setattr(prepare, "try_job", lambda _: None)
    without = train(options, run_dir=tmp_path / "without")
    for key in ("final_params_sha256", "final_buffers_sha256", "train_loss", "test_loss", "val_loss", "val_accuracy"):
        assert with_trial[key] == without[key], key
    assert (with_trial["val_loss"] is None) is (validation == 0)
