"""Evaluation: loss and accuracy of given parameters on a data split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ormo_rpc.data import Split
from ormo_rpc.models.flat import FlatModel

BATCH_SIZE = 500
"""Samples in a forward pass; the result does not depend on it."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        loss: Mean cross-entropy over the samples.
        accuracy: The fraction of the samples whose largest logit is that of the correct class, in [0, 1].
    """

    loss: float
    accuracy: float


def evaluate(model: FlatModel, params: Tensor, statistics: Mapping[str, Tensor], data: Split) -> Evaluation:
    """Evaluate at the parameters, shape (D,), and the batch-norm statistics by name; neither is modified."""
    model.bind(params)
    model.load_statistics(statistics)
    model.module.eval()
    loss, correct = 0.0, 0
    with torch.inference_mode():
        for indices in torch.arange(len(data)).split(BATCH_SIZE):
            inputs, targets = data.batch(indices, None)
            logits = model.module(inputs)
            loss += functional.cross_entropy(logits, targets, reduction="sum").item()
            correct += int((logits.argmax(1) == targets).sum())
    return Evaluation(loss / len(data), correct / len(data))
