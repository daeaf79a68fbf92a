"""Cross entropy and accuracy, means over the targets that count.

Logits have the shape (N, C, ...). Targets are class numbers of the shape (N, ...), or class probabilities of the logits' shape.
One class number does not count, by default `IGNORED`.
"""

from __future__ import annotations

import torch

from ormo_rpc.data.padding import IGNORED
from ormo_rpc.tasks.base import UnfitTargets
from ormo_rpc.tasks.metrics import Sums


def is_class_number(value: int) -> bool:
    """Tell if a number can be that of a class, or of what does not count."""
    return -(2**31) <= value < 2**31


CLASS_NUMBER = "a whole number of 32 bits"
"""The range of `is_class_number` in words."""

PROBABILITY_TOLERANCE = 0.01
"""The largest difference from 1 of the sum of probabilities, which may be of half precision."""


def mean_loss(logits: torch.Tensor, targets: torch.Tensor, ignored: int = IGNORED) -> torch.Tensor:
    """The mean cross entropy of the targets that count, as torch computes it: NaN where none does."""
    return torch.nn.functional.cross_entropy(logits, as_targets(targets), ignore_index=ignored)


def loss_sum(logits: torch.Tensor, targets: torch.Tensor, ignored: int = IGNORED) -> Sums:
    """Sum up the losses of a batch, in at least single precision."""
    if logits.dtype.itemsize < torch.float32.itemsize:
        logits = logits.double()
    loss = torch.nn.functional.cross_entropy(logits, as_targets(targets), reduction="sum", ignore_index=ignored)
    return Sums(loss.item(), count(targets, ignored))


def sums(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, Sums]:
    """Sum up the losses and correct predictions of a batch."""
    loss = loss_sum(logits, targets)
    classes = targets.argmax(1) if targets.is_floating_point() else targets.long()
    return {"loss": loss, "accuracy": Sums(int((logits.argmax(1) == classes).sum()), loss.count)}


def count(targets: torch.Tensor, ignored: int = IGNORED) -> int:
    """The number of targets that count."""
    if targets.is_floating_point():
        return targets.numel() // targets.shape[1]
    return int((targets.long() != ignored).sum())


def check_targets(targets: object) -> None:
    """Refuse targets that can be neither class numbers nor probabilities.

    Raises:
        ValueError: the message says what came and what was expected.
    """
    if not isinstance(targets, torch.Tensor) or targets.is_complex():
        kind = getattr(targets, "dtype", type(targets).__name__)
        raise ValueError(f"the targets are of type {kind}, expected a tensor of class numbers or probabilities")


def check_fit(output: object, targets: torch.Tensor) -> None:
    """Refuse what a model returned where it cannot be logits of these targets.

    Raises:
        ValueError: the message says what came and what was expected.
    """
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(f"the output is of type {kind}, expected a tensor of logits")
    one_per_target = (*output.shape[:1], *output.shape[2:])
    if output.dim() < 2 or targets.shape != (output.shape if targets.is_floating_point() else one_per_target):
        other = " (or probabilities in the output's shape)" if targets.is_floating_point() else ""
        if output.dim() > 2 and targets.shape == output.shape[:-1]:
            other += "; classes that come last, as in a language model, go to their place by output.movedim(-1, 1)"
        raise ValueError(
            f"the output {tuple(output.shape)} does not fit targets {tuple(targets.shape)}: "
            f"expected (N, C, ...) and class numbers (N, ...){other}"
        )


def check_classes(logits: torch.Tensor, targets: torch.Tensor, ignored: int = IGNORED) -> None:
    """Refuse targets that cross entropy is no objective for, and class numbers that no logit belongs to.

    Raises:
        UnfitTargets: the message has the first of them.
    """
    if logits.shape[1] < 2:
        raise UnfitTargets("there is one class, expected at least two: the cross entropy of one is always 0")
    if targets.is_floating_point():
        sums = targets.sum(1)
        wrong = sums[~((sums - 1).abs() <= PROBABILITY_TOLERANCE)]  # NaN too, with which targets are padded
        if wrong.numel() or (targets < 0).any():
            what = f"sum to {float(wrong[0]):g} over the classes" if wrong.numel() else "are negative"
            raise UnfitTargets(
                f"targets of floating point and of the output's shape are class probabilities, but some {what}, expected "
                "numbers >= 0 whose sum is 1: the objective is cross entropy"
            )
        return
    targets = targets.long()
    wrong = targets[(targets != ignored) & ((targets < 0) | (targets >= logits.shape[1]))]
    if wrong.numel():
        raise UnfitTargets(
            f"a target is {int(wrong[0])}, expected 0 to {logits.shape[1] - 1} (the output has {logits.shape[1]} classes) "
            f"or {ignored} for one that does not count"
        )


def as_targets(targets: torch.Tensor) -> torch.Tensor:
    """Return targets of a dtype that torch takes: of integers only int64."""
    return targets if targets.is_floating_point() else targets.long()
