"""Segmentation: ``python examples/segmentation.py`` finds handwritten digits in small scenes with three workers.

Two of scikit-learn's digits lie on a black canvas; each pixel is background, or part of a 0, 1, 2, 3 or 4. On scenes of other
digits the mean intersection over union reaches 65%. ``--plain`` trains the same network in one process of plain PyTorch, which
reaches it too. ``--kill`` kills a worker by SIGKILL at its fifth push; another process takes its place.
"""

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from ormo_rpc import train

CLASSES, SIZE = 6, 16
TRAIN, TEST, EPOCHS, LR, BETA, BATCH = 960, 200, 7, 5e-3, 0.5, 16


def scenes(images: torch.Tensor, labels: torch.Tensor, count: int, seed: int) -> TensorDataset:
    """Paste two digits side by side, each at a random height; return scenes (N, 1, 16, 16), and the classes of their pixels."""
    generator = torch.Generator().manual_seed(seed)
    canvas, classes = torch.zeros(count, 1, SIZE, SIZE), torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    for number in range(2 * count):
        digit, top = (int(torch.randint(size, (), generator=generator)) for size in (len(images), SIZE - 7))
        scene, left = number // 2, number % 2 * 8
        canvas[scene, 0, top : top + 8, left : left + 8] = images[digit]
        classes[scene, top : top + 8, left : left + 8] = (images[digit] > 0.25) * (labels[digit] + 1)
    return TensorDataset(canvas, classes)


def data() -> tuple[TensorDataset, TensorDataset]:
    """Return the scenes to train on, and those to test on."""
    images, labels = (torch.as_tensor(each) for each in load_digits(n_class=CLASSES - 1, return_X_y=True))
    images = images.float().view(-1, 8, 8) / 16
    return scenes(images[:-180], labels[:-180], TRAIN, 0), scenes(images[-180:], labels[-180:], TEST, 1)


class Net(nn.Module):
    """Convolutions down to a quarter of the size and up again, with what was seen on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.deepest = nn.Sequential(nn.Conv2d(16, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.last = nn.Sequential(nn.ConvTranspose2d(32, 8, 4, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(16, CLASSES, 3, padding=1)

    def forward(self, scenes: torch.Tensor) -> torch.Tensor:
        """Logits, shape (N, classes, 16, 16)."""
        full = self.first(scenes)
        half = self.down(full)
        both = torch.cat([self.up(self.deepest(half)), half], 1)
        return self.head(torch.cat([self.last(both), full], 1))


def distributed(faults: Sequence[str] = ()) -> dict[str, Any]:
    """Train with three workers, and return the summary of the run."""
    values = {
        "task": "segmentation",
        "dataset": {"_target_": "segmentation.data"},
        "model": {"_target_": "segmentation.Net"},
        "algorithm": "adamw",
        "train": {"epochs": EPOCHS, "lr": LR, "momentum": BETA, "batch_size": BATCH, "lr_schedule": "cosine"},
    }
    with tempfile.TemporaryDirectory() as folder:
        return train(values | {"workers": 3, "logger": "none", "runtime": {"faults": faults}}, run_dir=folder)


def plain() -> float:
    """Train in one process of plain PyTorch, and return the mean intersection over union."""
    torch.manual_seed(0)
    (inputs, targets), (test_inputs, test_targets) = (each.tensors for each in data())
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), LR, (BETA, 0.999), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * TRAIN // BATCH)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
            schedule.step()
    found, right = (each[..., None] == torch.arange(CLASSES) for each in (model.eval()(test_inputs).argmax(1), test_targets))
    return ((found & right).sum((0, 1, 2)) / (found | right).sum((0, 1, 2))).mean().item()


if __name__ == "__main__":
    if "--plain" in sys.argv:
        print(f"test mean IoU {plain():.2%}")
    else:
        summary = distributed(["kill@1:5"] if "--kill" in sys.argv else [])
        print(*(f"evicted: worker {each['worker']}, {each['reason']}\n" for each in summary["evictions"]), sep="", end="")
        print(f"test mean IoU {summary['test_mean_iou']:.2%}")
