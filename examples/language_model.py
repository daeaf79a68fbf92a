"""A language model: ``python examples/language_model.py`` trains a small transformer with three workers.

It predicts the next character of Python's own documentation (``help("for")`` and the like), and reaches a test perplexity of
10, where counting pairs of characters reaches 12. ``--plain`` trains the same network in one process of plain PyTorch, which
reaches it too. ``--kill`` kills a worker by SIGKILL at its fifth push; another process takes its place.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

from ormo_rpc import train

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,()[]{}:;'\"=_-*+/<>#@!?|&%$^~`\\"
LENGTH, TRAIN, TEST, EPOCHS = 33, 4000, 300, 2
LR, BETA, DECAY, BATCH, CLIP = 4e-3, 0.5, 0.01, 12, 1.0


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return pieces of text as numbers of characters, shape (N, 33): those to train on, and those to test on."""
    text = " ".join(topics[name] for name in sorted(topics)).lower()
    codes = torch.tensor([max(0, ALPHABET.find(each)) for each in text])  # others count as ends of lines
    pieces = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    return pieces[order[TEST : TEST + TRAIN]], pieces[order[:TEST]]


class Net(nn.Module):
    """A transformer of two layers."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(len(ALPHABET), width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Logits of the character after each one, shape (N, T, characters)."""
        length = codes.shape[1]
        later = nn.Transformer.generate_square_subsequent_mask(length)
        features = self.characters(codes) + self.places(torch.arange(length))
        return self.head(self.layers(features, mask=later, is_causal=True))


def distributed(faults: Sequence[str] = ()) -> dict[str, Any]:
    """Train with three workers, and return the summary of the run."""
    values = {
        "task": "language_modelling",
        "dataset": {"_target_": "language_model.data"},
        "model": {"_target_": "language_model.Net"},
        "algorithm": "adamw",
        "train": {"epochs": EPOCHS, "lr": LR, "momentum": BETA, "weight_decay": DECAY, "batch_size": BATCH, "clip_norm": CLIP},
        "workers": 3,
        "runtime": {"faults": faults},
        "logger": "none",
    }
    with tempfile.TemporaryDirectory() as folder:
        return train(values, run_dir=folder)


def loss(model: Net, pieces: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of each character but the first."""
    return nn.functional.cross_entropy(model(pieces)[:, :-1].flatten(0, 1), pieces[:, 1:].flatten())


def plain() -> float:
    """Train in one process of plain PyTorch, and return the perplexity on the test set."""
    torch.manual_seed(0)
    pieces, test = data()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), LR, (BETA, 0.999), weight_decay=DECAY)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN).split(BATCH):
            optimizer.zero_grad()
            loss(model, pieces[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    with torch.no_grad():
        return math.exp(loss(model.eval(), test).item())


if __name__ == "__main__":
    if "--plain" in sys.argv:
        print(f"test perplexity {plain():.2f}")
    else:
        summary = distributed(["kill@1:5"] if "--kill" in sys.argv else [])
        print(*(f"evicted: worker {each['worker']}, {each['reason']}\n" for each in summary["evictions"]), sep="", end="")
        print(f"test perplexity {summary['test_perplexity']:.2f}")
