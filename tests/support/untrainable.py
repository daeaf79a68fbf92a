"""Data sets and models of users that cannot be trained, or only with a warning, each for one reason."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from typing_extensions import override

from ormo_rpc.data import DataSet
from tests.support.datasets import Noisy

CLASSES = 3


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
        return logits if self.training else {"scores": logits}


class Output(Linear):
    """Returns an object with the logits in it under a name that nobody knows."""

    @override
    def forward(self, inputs: Tensor) -> Any:
        return SimpleNamespace(scores=self.layer(inputs))


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


def of_dtype(input_shape: tuple[int, ...], dtype: str) -> nn.Module:
    """A layer whose parameters are of another dtype."""
    return nn.Linear(input_shape[0], 3, dtype=getattr(torch, dtype))


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


# -- losses --------------------------------------------------------------------------------------------------------------


def a_number(output: Tensor, targets: Tensor) -> Any:
    return nn.functional.cross_entropy(output, targets).item()


def one_each(output: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, targets, reduction="none")


def whole_number(output: Tensor, targets: Tensor) -> Tensor:
    return (output.argmax(1) != targets).sum()


def without_gradient(output: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.detach(), targets)


def failing(output: Tensor, targets: Tensor) -> Tensor:
    raise KeyError(f"no\nsuch as {tuple(output.shape)} and {tuple(targets.shape)}")


def three_parameters(output: Tensor, targets: Tensor, weight: float) -> Tensor:
    return weight * nn.functional.cross_entropy(output, targets)


def rows_of(kind: str, num_classes: int = CLASSES) -> tuple[Any, Any]:
    """Return items that make batches of another form."""
    assert num_classes == CLASSES
    made: dict[str, Any] = {
        "tensor": [torch.zeros(2) for _ in range(8)],
        "triple": [(torch.zeros(2), 0, 0) for _ in range(8)],
        "no targets": [{"inputs": torch.zeros(2)} for _ in range(8)],
        "floats": [(torch.zeros(2), float(number)) for number in range(8)],
        "not finite": [(torch.zeros(2), float("nan")) for _ in range(8)],
        "tokens": [(torch.zeros(2).long(), torch.zeros(2).long()) for _ in range(8)],
        "single tokens": [{"input_ids": torch.zeros(1).long()} for _ in range(8)],
    }
    return made[kind], made[kind]


@dataclass
class Uneven(Tensors):
    """Its batches have a table beside the rows of the samples."""

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Any, Any]:
        inputs, targets = super().batch(indices, generator)
        return (inputs, torch.zeros(7)), targets


def uneven() -> DataSet:
    split = Uneven(torch.randn(8, 2), torch.arange(8) % CLASSES)
    return DataSet(split, split, (2,), CLASSES)


class WithTable(Linear):
    """Takes a table beside its inputs."""

    @override
    def forward(self, inputs: Tensor, table: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] # it has two inputs
        return self.layer(inputs) + table.sum()


class Tokens(nn.Module):
    """Returns logits of tokens, the classes second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, CLASSES)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return self.embed(inputs.long()).transpose(1, 2)
