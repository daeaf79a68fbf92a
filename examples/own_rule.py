"""A rule of your own: ``python examples/own_rule.py`` trains with it on three workers, and reaches a test accuracy of 95%.

``--plain`` trains the same network in one process of plain PyTorch, with ``torch.optim.SGD``, which reaches it too. ``--kill``
kills a worker by SIGKILL at its fifth push; another process takes its place. On the command line::

    PYTHONPATH=examples python launch.py algorithm._target_=own_rule.DampedMomentum +algorithm.power=0.5
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ormo_rpc import Algorithm, PushContext, option, train
from ormo_rpc.options import not_negative

EPOCHS, LR, BATCH = 20, 0.02, 32


@dataclass(kw_only=True)
class DampedMomentum(Algorithm):
    """Heavy ball in which a gradient of delay ``tau`` counts ``(1 + tau)^-power``."""

    power: float = option(
        0.5, "how fast a gradient's weight falls with its delay", valid=not_negative, expected="a number >= 0"
    )

    @override
    def init(self, params: Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.u = self.zeros()

    @override
    def learning_rate(self, context: PushContext) -> float:
        return context.lr * (1 + context.delay) ** -self.power

    @override
    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:
        self.u.mul_(self.momentum).add_(grad, alpha=lr)
        self.params.sub_(self.u)

    @override
    def state_dict(self) -> Mapping[str, Tensor]:
        return {"u": self.u}


def distributed(*overrides: str) -> dict[str, Any]:
    """Train on handwritten digits with three workers, and return the summary of the run."""
    rule = ["algorithm._target_=own_rule.DampedMomentum", "+algorithm.power=0.5"]
    length = [f"train.epochs={EPOCHS}", f"train.lr={LR}", f"train.batch_size={BATCH}", "train.momentum=0.9"]
    with tempfile.TemporaryDirectory() as folder:
        return train([*rule, *length, "workers=3", "logger=none", *overrides], run_dir=folder)


def plain() -> float:
    """Train the same network in one process of plain PyTorch, and return the test accuracy."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    halves = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.as_tensor(half) for half in halves)
    train_x, test_x = ((each.float() / 16 - 0.3053) / 0.376 for each in (train_x, test_x))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train_x)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
    return (model(test_x).argmax(1) == test_y).float().mean().item()


if __name__ == "__main__":
    if "--plain" in sys.argv:
        print(f"test accuracy {plain():.2%}")
    else:
        summary = distributed(*(["runtime.faults=[kill@1:5]"] if "--kill" in sys.argv else []))
        print(*(f"evicted: worker {each['worker']}, {each['reason']}\n" for each in summary["evictions"]), sep="", end="")
        print(f"test accuracy {summary['test_accuracy']:.2%}")
