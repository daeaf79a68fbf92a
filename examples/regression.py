"""Regression: ``python examples/regression.py`` trains on scikit-learn's diabetes data with three workers.

It predicts how far the disease of a patient has progressed from ten measurements. The error on the test set reaches 0.8 (the
root of the mean square, in standard deviations). ``--plain`` trains the same network in one process of plain PyTorch, which
reaches it too. ``--kill`` kills a worker by SIGKILL at its fifth push; another process takes its place.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import TensorDataset

from ormo_rpc import train

EPOCHS, LR, MOMENTUM, DECAY, BATCH = 20, 0.005, 0.9, 0.01, 16
TEST_SIZE = 88


def data() -> tuple[TensorDataset, TensorDataset]:
    """Return the patients to train on, and those to test on, in standard units of the former."""
    inputs, targets = (torch.as_tensor(each, dtype=torch.float32) for each in load_diabetes(return_X_y=True))
    test, train = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0)).split(
        [TEST_SIZE, len(inputs) - TEST_SIZE]
    )
    inputs, targets = ((each - each[train].mean(0)) / each[train].std(0) for each in (inputs, targets))
    return TensorDataset(inputs[train], targets[train]), TensorDataset(inputs[test], targets[test])


class Net(nn.Module):
    """One hidden layer, and one number for each patient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Predictions, shape (N,)."""
        return self.layers(inputs)[:, 0]


def distributed(faults: Sequence[str] = ()) -> dict[str, Any]:
    """Train with three workers, and return the summary of the run."""
    values = {
        "task": "regression",
        "dataset": {"_target_": "regression.data"},
        "model": {"_target_": "regression.Net"},
        "train": {"epochs": EPOCHS, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "batch_size": BATCH},
        "workers": 3,
        "runtime": {"faults": faults},
        "logger": "none",
    }
    with tempfile.TemporaryDirectory() as folder:
        return train(values, run_dir=folder)


def plain() -> float:
    """Train in one process of plain PyTorch, and return the error on the test set."""
    torch.manual_seed(0)
    (inputs, targets), (test_inputs, test_targets) = (each.tensors for each in data())
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return nn.functional.mse_loss(model(test_inputs), test_targets).sqrt().item()


if __name__ == "__main__":
    if "--plain" in sys.argv:
        print(f"test rmse {plain():.3f}")
    else:
        summary = distributed(["kill@1:5"] if "--kill" in sys.argv else [])
        print(*(f"evicted: worker {each['worker']}, {each['reason']}\n" for each in summary["evictions"]), sep="", end="")
        print(f"test rmse {summary['test_rmse']:.3f}")
