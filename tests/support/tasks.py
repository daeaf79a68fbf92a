"""A row for each form of each task: data, a model, and the loss and metrics as plain PyTorch or a loop has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from ormo_rpc.data import DataSet, trees

SAMPLES, CLASSES, TOKENS, LENGTH = 23, 4, 9, 6
Metrics = Callable[[nn.Module, Any], Mapping[str, float]]


@dataclass
class Trees:
    """A split of a tree of tensors that have a row for each sample."""

    PURE: ClassVar[bool] = True

    samples: Any

    def __len__(self) -> int:
        return trees.size(self.samples)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> Any:
        """Return the rows."""
        del generator
        return trees.map_tensors(lambda rows: rows[indices], self.samples)


@dataclass(frozen=True)
class Row:
    """A task with data of its own.

    Attributes:
        task: Its keys.
        samples: All samples, as one batch.
        network: Makes the model.
        loss: The loss of a batch in plain PyTorch.
        metrics: The other metrics over a whole split, which is one batch.
    """

    task: Mapping[str, Any]
    samples: Callable[[], Any]
    network: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    metrics: Metrics = lambda _, __: {}


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def normal(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=chance())


def numbers(*shape: int, below: int = CLASSES, seed: int = 2) -> Tensor:
    return torch.randint(below, (SAMPLES, *shape), generator=torch.Generator().manual_seed(seed))


def with_some(targets: Tensor, value: float) -> Tensor:
    """Targets of which some have another value: unequal numbers in equal parts of the samples, all of the first two."""
    targets = targets.clone()
    targets.view(-1)[::5] = value
    targets[:2] = value
    return targets


# -- models --------------------------------------------------------------------------------------------------------------


def dense(outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


class Segmenter(nn.Module):
    """Returns a mapping, as torchvision's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, CLASSES, 1))

    @override
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.layers(images)}


class Language(nn.Module):
    """Sees the tokens so far; the mask, where there is one, leaves out those that are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, 5), nn.Linear(5, TOKENS)

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        return self.head(torch.tanh(hidden.cumsum(1)))


class Named(Language):
    """Returns an object, as transformers do."""

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=super().forward(input_ids, attention_mask))


class OwnLoss(Language):
    """Returns its own loss beside the logits, as transformers do where they are given labels."""

    @override
    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] # as theirs
        logits = super().forward(input_ids)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


class Alone(nn.Module):
    """Its only output is its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return (self.layer(inputs) - inputs).square().mean()


class Two(nn.Module):
    """Has two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(2, 3)

    @override
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.first(left) * self.second(right)


# -- functions of a user -------------------------------------------------------------------------------------------------


def distance(model: nn.Module, batch: Any, power: float = 2.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a loss from a batch that is a mapping of any keys, and a metric."""
    apart = (model(batch["left"], batch["right"]) - batch["goal"]).abs()
    return (apart**power).mean(), {"apart": apart.mean()}


class Largest:
    """An object of the user's own: the largest absolute target."""

    higher_is_better = False

    def reset(self) -> None:
        self.value = 0.0

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        assert predicted.shape == targets.shape
        self.value = max(self.value, float(targets.abs().max()))

    def compute(self) -> float:
        return self.value


# -- plain PyTorch and hand-computed metrics -----------------------------------------------------------------------------


def classified(logits: Tensor, targets: Tensor, ignored: int) -> dict[str, float]:
    """Accuracy over the targets that count, one by one."""
    found, wanted = logits.argmax(1).flatten().tolist(), targets.flatten().tolist()
    pairs = [(each, other) for each, other in zip(found, wanted, strict=True) if other != ignored]
    return {"accuracy": sum(each == other for each, other in pairs) / len(pairs)}


def overlap(logits: Tensor, targets: Tensor, ignored: int) -> dict[str, float]:
    """Accuracy, and the mean of intersection over union by sets of pixels."""
    found, wanted = logits.argmax(1).flatten().tolist(), targets.flatten().tolist()
    ratios: list[float] = []
    for number in range(CLASSES):
        counted = [place for place, other in enumerate(wanted) if other != ignored]
        here, there = {n for n in counted if found[n] == number}, {n for n in counted if wanted[n] == number}
        if here | there:
            ratios.append(len(here & there) / len(here | there))
    return {**classified(logits, targets, ignored), "mean_iou": sum(ratios) / len(ratios)}


def errors(predicted: Tensor, targets: Tensor) -> dict[str, float]:
    """Errors and the coefficient of determination by their definitions, column by column."""
    predicted, targets = predicted.reshape(SAMPLES, -1), targets.reshape(SAMPLES, -1)
    explained: list[float] = []
    for guesses, column in zip(predicted.t(), targets.t(), strict=True):
        known = ~column.isnan()
        spread = (column[known] - column[known].mean()).square().sum()
        explained.append(float(1 - (guesses[known] - column[known]).square().sum() / spread))
    apart = (predicted - targets)[~targets.isnan()]
    return {
        "mae": float(apart.abs().mean()),
        "rmse": math.sqrt(float(apart.square().mean())),
        "r2": sum(explained) / len(explained),
    }


def regression(of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[[nn.Module, Any], Tensor], Metrics]:
    def both(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        output = model(batch[0])
        return output.reshape(batch[1].shape), batch[1]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output, targets = both(model, batch)
        return of(output[~targets.isnan()], targets[~targets.isnan()])

    return loss, lambda model, batch: errors(*both(model, batch))


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def masked(batch: Any) -> Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def perplexity(loss: Callable[[nn.Module, Any], Tensor]) -> Metrics:
    return lambda model, batch: {"perplexity": math.exp(loss(model, batch).item())}


def tokens_loss(model: nn.Module, batch: Any) -> Tensor:
    return next_token(model(batch), batch)


def pair_loss(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]).transpose(1, 2), batch[1])


def masked_loss(model: nn.Module, batch: Any) -> Tensor:
    return next_token(model(**batch).logits, masked(batch))


def lengths() -> Tensor:
    """A mask of sequences of different lengths."""
    return (torch.arange(LENGTH) < numbers(below=LENGTH - 1, seed=3)[:, None] + 2).long()


MSE, L1, HUBER, MISSING = (
    regression(functional.mse_loss),
    regression(functional.l1_loss),
    regression(lambda predicted, targets: functional.huber_loss(predicted, targets, delta=0.3)),
    regression(functional.mse_loss),
)

ROWS: Mapping[str, Row] = {
    "classification": Row(
        {"name": "classification"},
        lambda: (normal(6), with_some(numbers(), -100)),
        dense(CLASSES),
        lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
        lambda model, batch: classified(model(batch[0]), batch[1], -100),
    ),
    "classification of rows with names": Row(
        {"name": "classification"},
        lambda: {"image": normal(6), "label": numbers()},
        dense(CLASSES),
        lambda model, batch: functional.cross_entropy(model(batch["image"]), batch["label"]),
        lambda model, batch: classified(model(batch["image"]), batch["label"], -100),
    ),
    "regression": Row({"name": "regression"}, lambda: (normal(6), normal(7)[:, 6] * 3 + 5), dense(1), *MSE),
    "regression, l1": Row({"name": "regression", "error": "l1"}, lambda: (normal(6), normal(2)), dense(2), *L1),
    "regression, huber": Row(
        {"name": "regression", "error": "huber", "delta": 0.3}, lambda: (normal(6), normal(3)), dense(3), *HUBER
    ),
    "regression, some missing": Row(
        {"name": "regression", "ignore_nan": True},
        lambda: (normal(6), with_some(normal(2), math.nan)),
        dense(2),
        *MISSING,
    ),
    "regression of two inputs": Row(
        {"name": "regression"},
        lambda: ((normal(6), normal(2)), normal(3)),
        Two,
        lambda model, batch: functional.mse_loss(model(*batch[0]), batch[1]),
        lambda model, batch: errors(model(*batch[0]), batch[1]),
    ),
    "regression of named inputs": Row(
        {"name": "regression"},
        lambda: ({"right": normal(2), "left": normal(6)}, normal(3)),
        Two,
        lambda model, batch: functional.mse_loss(model(**batch[0]), batch[1]),
        lambda model, batch: errors(model(**batch[0]), batch[1]),
    ),
    "segmentation": Row(
        {"name": "segmentation", "ignore_index": 255},
        lambda: (normal(1, 5, 6), with_some(numbers(5, 6), 255).to(torch.uint8)),
        Segmenter,
        lambda model, batch: functional.cross_entropy(model(batch[0])["out"], batch[1].long(), ignore_index=255),
        lambda model, batch: overlap(model(batch[0])["out"], batch[1].long(), 255),
    ),
    "language modelling": Row(
        {"name": "language_modelling"}, lambda: numbers(LENGTH, below=TOKENS), Language, tokens_loss, perplexity(tokens_loss)
    ),
    "language modelling, pair": Row(
        {"name": "language_modelling", "bytes_per_token": 3.5},
        lambda: (numbers(LENGTH, below=TOKENS), with_some(numbers(LENGTH, below=TOKENS, seed=4), -100)),
        Language,
        pair_loss,
        lambda model, batch: {
            **perplexity(pair_loss)(model, batch),
            "bits_per_byte": pair_loss(model, batch).item() / math.log(2) / 3.5,
        },
    ),
    "language modelling, padded": Row(
        {"name": "language_modelling"},
        lambda: {"input_ids": numbers(LENGTH, below=TOKENS), "attention_mask": lengths()},
        Named,
        masked_loss,
        perplexity(masked_loss),
    ),
    "model loss": Row(
        {"name": "model_loss", "mean_over": "next_labels"},
        lambda: {
            "input_ids": numbers(LENGTH, below=TOKENS),
            "labels": with_some(numbers(LENGTH, below=TOKENS, seed=4), -100),
        },
        OwnLoss,
        lambda model, batch: model(**batch).loss,
    ),
    "model loss alone": Row({"name": "model_loss"}, lambda: (normal(6),), Alone, lambda model, batch: model(batch[0])),
    "custom, of torch": Row(
        {"_target_": "torch.nn.functional.smooth_l1_loss", "beta": 0.5},
        lambda: (normal(6), normal(2)),
        dense(2),
        lambda model, batch: functional.smooth_l1_loss(model(batch[0]), batch[1], beta=0.5),
    ),
    "custom, class of torch": Row(
        {"_target_": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.1},
        lambda: (normal(6), numbers()),
        dense(CLASSES),
        lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1),
    ),
    "custom, class of torch with an ignored class": Row(
        {"_target_": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.1, "ignore_index": 1},
        lambda: (normal(6), with_some(numbers(), 1)),
        dense(CLASSES),
        lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1, ignore_index=1),
    ),
    "custom, nll_loss of torch": Row(
        {"_target_": "torch.nn.functional.nll_loss"},
        lambda: (normal(6), with_some(numbers(), -100)),
        lambda: nn.Sequential(dense(CLASSES)(), nn.LogSoftmax(1)),
        lambda model, batch: functional.nll_loss(model(batch[0]), batch[1]),
    ),
    "custom, all of it": Row(
        {"_target_": f"{__name__}.distance", "power": 3.0},
        lambda: {"left": normal(6), "right": normal(2), "goal": normal(3)},
        Two,
        lambda model, batch: (model(batch["left"], batch["right"]) - batch["goal"]).abs().pow(3.0).mean(),
        lambda model, batch: {"apart": (model(batch["left"], batch["right"]) - batch["goal"]).abs().mean().item()},
    ),
}


def data(row: str) -> DataSet:
    """Return the samples of a row as training and test split."""
    samples = Trees(ROWS[row].samples())
    return DataSet(samples, samples, (6,), CLASSES)


def network(row: str) -> nn.Module:
    """Return the model of a row."""
    return ROWS[row].network()
