"""An ordinary training script: ``python examples/own_loop_before.py`` reaches a test accuracy of 95% in one process.

``examples/own_loop.py`` is the same script with as many workers as you like; docs/own_loop.md shows what was changed.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

EPOCHS, LR, BATCH = 20, 0.02, 32


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits, 8 x 8 pixels: inputs and labels to train on, and to test on every fifth."""
    images, numbers = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(numbers)
    tests = torch.arange(len(labels)) % 5 == 0
    return inputs[~tests], labels[~tests], inputs[tests], labels[tests]


def make_model() -> nn.Module:
    """A small convolutional network."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 10)),
    )


def main() -> None:
    """Train, and print the accuracy on the test samples."""
    torch.manual_seed(0)
    inputs, labels, test_inputs, test_labels = load()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)

    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            output = model(test_inputs)
        loss = nn.functional.cross_entropy(output, test_labels)
        return {"loss": loss.item(), "accuracy": (output.argmax(1) == test_labels).float().mean().item()}

    for _ in range(EPOCHS):
        for indices in torch.randperm(len(labels)).split(BATCH):
            model.train()
            loss = nn.functional.cross_entropy(model(inputs[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    print(f"test accuracy: {evaluate(model)['accuracy']:.2%}")


if __name__ == "__main__":
    main()
