"""One trial batch in the launcher: what cannot be trained is refused in one line, and what can is not changed by it."""

from __future__ import annotations

import builtins
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from typing_extensions import override

from ormo_rpc import train
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.config.schema import Config
from ormo_rpc.data import DataSet
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes import prepare
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.trial import try_job
from ormo_rpc.worker.objective import check_fit
from tests.support.datasets import Noisy

CLASSES = 3
OPTIONS: dict[str, Any] = {"workers": 2, "logger": "none", "train": {"batch_size": 4}}


@dataclass
class Tensors:
    """A user's own split."""

    PURE: ClassVar[bool] = True

    inputs: Any
    targets: Any

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Any, Any]:
        """Return the rows."""
        del generator
        return self.inputs[indices], self.targets[indices] if isinstance(self.targets, Tensor) else self.targets


# -- data sets -----------------------------------------------------------------------------------------------------------


def blobs(
    count: int = 9, low: int = 0, high: int = CLASSES, test_high: int = CLASSES, dtype: str = "float32"
) -> tuple[TensorDataset, TensorDataset]:
    def half(below: int) -> TensorDataset:
        labels = torch.arange(count) % (below - low) + low
        return TensorDataset(torch.randn(count, 2).to(getattr(torch, dtype)), labels)

    return half(high), half(test_high)


def masks() -> tuple[TensorDataset, TensorDataset]:
    half = TensorDataset(torch.randn(8, 1, 4, 4), torch.randint(CLASSES, (8, 4, 4)))
    return half, half


def ragged() -> tuple[list[Any], list[Any]]:
    items = [(torch.zeros(2 + number), number % CLASSES) for number in range(8)]
    return items, items


def data_set(targets: str, dtype: str = "int64") -> Callable[[], DataSet]:
    def make() -> DataSet:
        made = {
            "numbers": (torch.arange(8) % CLASSES).to(getattr(torch, dtype)),
            "probabilities": torch.full((8, CLASSES), 1 / CLASSES),
            "several classes each": torch.ones(8, CLASSES),
            "beyond": torch.full((8,), 156, dtype=torch.uint8),  # as -100 is in 8 bits
            "positions": torch.tensor([1.5, -0.5, 0.0]).expand(8, CLASSES),
            "one float each": torch.zeros(8),
            "complex": torch.zeros(8, dtype=torch.complex64),
            "list": [0, 1, 2, 0],
        }[targets]
        split = Tensors(torch.randn(8, 2), made)
        return DataSet(split, split, (2,), CLASSES)

    return make


int32, uint8, boolean = (data_set("numbers", dtype) for dtype in ("int32", "uint8", "bool"))
probabilities, one_float_each = data_set("probabilities"), data_set("one float each")
several_classes_each, positions, beyond = data_set("several classes each"), data_set("positions"), data_set("beyond")
complex_numbers, a_list = data_set("complex"), data_set("list")


def empty_splits(test: int = 0, validation: int = 1) -> DataSet:
    train, others = Tensors(torch.randn(8, 2), torch.zeros(8).long()), Tensors(torch.randn(8, 2), torch.zeros(8).long())

    def first(count: int) -> Tensors:
        return Tensors(others.inputs[:count], others.targets[:count])

    return DataSet(train, first(test), (2,), CLASSES, first(validation))


class Broken(Dataset[Any]):
    """Has a first item alone."""

    classes = range(CLASSES)

    def __len__(self) -> int:
        return 8

    @override
    def __getitem__(self, index: int) -> Any:
        if index:
            raise OSError(f"no file\nof item {index}")
        return torch.zeros(2), 0


def broken() -> tuple[Any, Any]:
    return Broken(), Broken()


def not_finite() -> tuple[TensorDataset, TensorDataset]:
    half = TensorDataset(torch.full((8, 2), torch.nan), torch.arange(8) % CLASSES)
    return half, half


# -- models --------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A model whose output is changed by a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, CLASSES)

    @override
    def forward(self, inputs: Tensor) -> Any:
        return self.layer(inputs)


class Pair(Linear):
    """Returns logits and features."""

    @override
    def forward(self, inputs: Tensor) -> Any:
        return self.layer(inputs), inputs


class Named(Linear):
    """Returns a dictionary in eval mode."""

    @override
    def forward(self, inputs: Tensor) -> Any:
        logits = self.layer(inputs)
        return logits if self.training else {"logits": logits}


class Output(Linear):
    """Returns an object with the logits in it, as transformers do."""

    @override
    def forward(self, inputs: Tensor) -> Any:
        return SimpleNamespace(logits=self.layer(inputs))


class Decided(Linear):
    """Returns class numbers."""

    @override
    def forward(self, inputs: Tensor) -> Any:
        return self.layer(inputs).argmax(1)


class Detached(Linear):
    """Gradients do not flow from its output."""

    @override
    def forward(self, inputs: Tensor) -> Any:
        return self.layer(inputs).detach()


class InPlace(Linear):
    """Overwrites what its backward pass needs."""

    @override
    def forward(self, inputs: Tensor) -> Any:
        hidden = self.layer(inputs).exp()
        logits = hidden * hidden
        hidden.add_(1)
        return logits


class Writing(Linear):
    """Writes to its parameters."""

    @override
    def forward(self, inputs: Tensor) -> Any:
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        return self.layer(inputs)


class Renormalising(nn.Module):
    """Writes to its parameters within an operator of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, CLASSES, max_norm=0.1)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return self.embedding(inputs.abs().long().clamp(max=4)).mean(1)


class Squeezing(Linear):
    """Loses the dimension of the batch where it is 1."""

    @override
    def forward(self, inputs: Tensor) -> Any:
        return self.layer(inputs).squeeze()


class Exiting(Linear):
    """Ends the process in eval mode."""

    @override
    def forward(self, inputs: Tensor) -> Any:
        if not self.training:
            raise SystemExit(0)
        return self.layer(inputs)


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def dense() -> nn.Module:
    return nn.Conv2d(1, CLASSES, 3, padding=1)


def narrow() -> nn.Module:
    return nn.Linear(2, CLASSES - 1)


def single() -> nn.Module:
    return nn.Linear(2, 1)


def normed(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Linear(4, CLASSES))


def noisy_model(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    assert input_shape == (2, 3)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, num_classes))


def noisy_pair() -> tuple[Noisy, Noisy]:
    return Noisy(22), Noisy(7)


def raising(kind: str) -> nn.Module:
    raise getattr(builtins, kind)("no file\nof it")


# -- refusals ------------------------------------------------------------------------------------------------------------


def config(data: str, model: Callable[..., nn.Module], keywords: dict[str, Any] | None = None, **options: Any) -> Config:
    dataset = {"_target_": f"{__name__}.{data}", **(keywords or {})}
    return parse_config({**OPTIONS, "dataset": dataset, "model": {"_target_": f"{__name__}.{model.__name__}"}, **options})


PLACE = r"model: tests\.unit\.runtimes\.test_trial\.{model} on {where} of tests\.unit\.runtimes\.test_trial\.{data}: "
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
        ("blobs", Detached, {}, FIRST, r"the output does not depend on any trainable parameter; expected logits .*"),
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
    values = {**OPTIONS, "dataset": "digits", "model": {"_target_": f"{__name__}.dense"}}
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
            r"training batch 0 cannot be made: RuntimeError: stack expects each tensor to be equal size, .*",
        ),
        ("broken", Linear, {}, r"training batch 0 cannot be made: OSError: no file of item \d"),
        ("complex_numbers", Linear, {}, r"the targets of training batch 0 are of type torch\.complex64, expected .*"),
        ("a_list", Linear, {}, r"the targets of training batch 0 are of type list, expected a tensor of .*"),
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
    with pytest.raises(ConfigError, match=rf"^dataset: tests\.unit\.runtimes\.test_trial\.{data}.*[:,] .*{message}$") as caught:
        prepare.check(config(data, model, keywords), starts_server=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["ValueError", "OSError", "SystemExit"])
@pytest.mark.parametrize("part", ["dataset", "model"])
def test_what_raises_while_it_is_made_is_named(part: str, kind: str) -> None:
    """Also with a `ValueError`, which this package's own refusals are."""
    values = {"dataset": "digits", "model": "mlp", part: {"_target_": f"{__name__}.raising", "kind": kind}}
    message = rf"^{part}: tests\.unit\.runtimes\.test_trial\.raising cannot be made: {kind}: no file of it$"
    with pytest.raises(ConfigError, match=message):
        prepare.check(parse_config({**OPTIONS, **values}), starts_server=True)


@pytest.mark.parametrize(("model", "name"), [(Writing, "layer.weight"), (Renormalising, "embedding.weight")])
def test_a_model_that_writes_to_its_parameters_is_refused_with_their_name(model: Callable[..., nn.Module], name: str) -> None:
    place = PLACE.format(model=model.__name__, where=FIRST, data="blobs")
    with pytest.raises(ConfigError, match=rf"^{place}{re.escape(name)}: got another value from a forward pass, .*$"):
        prepare.check(config("blobs", model), starts_server=True)


def of_dtype(input_shape: tuple[int, ...], dtype: str) -> nn.Module:
    """A layer whose parameters are of another dtype."""
    return nn.Linear(input_shape[0], 3, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_parameters_that_are_not_trained_here_are_refused_with_their_dtype(dtype: str) -> None:
    message = rf"^model: got trainable parameters of torch\.{dtype}, expected float32 or float64; .*$"
    values = {"dataset": {"_target_": f"{__name__}.blobs"}, "model": {"_target_": f"{__name__}.of_dtype", "dtype": dtype}}
    with pytest.raises(ConfigError, match=message):
        prepare.check(parse_config({**OPTIONS, **values}), starts_server=True)


class Remembering(nn.Module):
    """Two views of a weight in plain attributes, of which a pass takes one anew."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Linear(input_shape[0], 3)
        self.weight = self.layer.weight
        self.stale, self.fresh = self.weight.detach(), self.weight.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        self.fresh = self.weight.detach()
        return self.layer(inputs) + inputs @ self.stale.t()


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
    made = Job(parse_config({**OPTIONS, "dataset": {"_target_": f"{__name__}.noisy_pair"}, "model": noisy()}))
    seed()
    try_job(made)
    assert draws() == expected


def noisy() -> dict[str, str]:
    return {"_target_": f"{__name__}.noisy_model"}


@pytest.mark.parametrize("validation", [0, 3])
def test_a_run_has_the_same_bits_without_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: int) -> None:
    options = {
        **OPTIONS,
        "runtime": "sim",
        "dataset": {"_target_": f"{__name__}.noisy_pair", "validation": validation},
        "model": noisy(),
        "train": {"batch_size": 4, "epochs": 2},
    }
    with_trial = train(options, run_dir=tmp_path / "with")
    monkeypatch.setattr(prepare, "try_job", lambda _: None)
    without = train(options, run_dir=tmp_path / "without")
    for key in ("final_params_sha256", "final_buffers_sha256", "train_loss", "test_loss", "val_loss", "val_accuracy"):
        assert with_trial[key] == without[key], key
    assert (with_trial["val_loss"] is None) is (validation == 0)
