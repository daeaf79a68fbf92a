"""Runs on data sets of a user's own do what plain PyTorch does with a `DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from ormo_rpc import train
from ormo_rpc.config.parsing import load_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.linux import LINUX
from ormo_rpc.seeding import generator
from ormo_rpc.storage import checkpoint
from tests.support.user_sets import Counting, Rows

LR, BATCH, WORDS = 0.2, 8, 12
SENTENCES = 44
SHAPE = {"in_features": 3, "out_features": 3}
_DRAWN = torch.Generator().manual_seed(3)
LENGTHS = torch.randint(1, 7, (SENTENCES,), generator=_DRAWN).tolist()
TOKENS = [torch.randint(1, WORDS, (length,), generator=_DRAWN).tolist() for length in LENGTHS]
"""Sentences of different lengths."""
LABELS = [int(sum(sentence) % 2) for sentence in TOKENS]
WEIGHTS = [float(1 + label) for label in LABELS]


class Bag(nn.Module):
    """Classes of sentences by the mean of their words, which the mask tells from padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits of two classes."""
        words = self.embedding(input_ids) * attention_mask[..., None]
        return self.head(words.sum(1) / attention_mask.sum(1, keepdim=True))


def sentences() -> dict[str, Rows]:
    columns = {"text": [str(each) for each in TOKENS], "input_ids": TOKENS, "label": LABELS}
    return {"train": Rows(columns), "test": Rows(columns)}


def weights(train: Any) -> list[float]:
    return [1.0 + train[number]["label"] for number in range(len(train))]


def padded(items: Sequence[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad as torch does, for the plain loop."""
    ids = nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(item["input_ids"])) for item in items], batch_first=True)
    return ids, mask, torch.stack([item["label"] for item in items])


def run(folder: Path, **values: Any) -> dict[str, Any]:
    """Train for two epochs."""
    optimizer = {"lr": LR, "momentum": 0.0, "batch_size": BATCH, "epochs": 2, "lr_schedule": "constant"}
    common = {"workers": 1, "algorithm": "asgd", "runtime": "sim", "logger": "none", "train": optimizer}
    return train(common | values, run_dir=folder)


def step(model: nn.Module) -> None:
    """Plain SGD."""
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= LR * parameter.grad


def same(folder: Path, module: nn.Module) -> None:
    """Compare the parameters of a finished run with those of a module."""
    exported: dict[str, torch.Tensor] = checkpoint.read(checkpoint.locate(folder), "model.pt")
    for name, value in module.state_dict().items():
        torch.testing.assert_close(exported[name], value, rtol=1e-5, atol=1e-6)


def initial(folder: Path, module: nn.Module) -> nn.Module:
    """Give a module the initial parameters of a run."""
    module.load_state_dict(Job(load_config(folder / "config.yaml")).model().module.state_dict())
    return module


def test_rows_of_different_lengths_with_weights_are_trained_on_as_in_plain_pytorch(tmp_path: Path) -> None:
    target = {"_target_": f"{__name__}.sentences", "collate": "pad", "weights": f"{__name__}.weights"}
    summary = run(tmp_path / "run", dataset=target, model={"_target_": f"{__name__}.Bag"}, seed=5)
    model = initial(tmp_path / "run", Bag())
    rows: Any = sentences()["train"].with_format("torch", columns=["input_ids", "label"])
    for epoch in range(2):
        sampler = WeightedRandomSampler(WEIGHTS, SENTENCES, generator=generator(5, "order", epoch))
        for ids, mask, labels in DataLoader(rows, BATCH, sampler=sampler, collate_fn=padded):
            model.zero_grad()
            F.cross_entropy(model(ids, mask), labels).backward()
            step(model)
    same(tmp_path / "run", model)
    ids, mask, labels = padded([rows[number] for number in range(SENTENCES)])
    logits = model(ids, mask)
    assert summary["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert summary["test_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


class Lines(IterableDataset[tuple[torch.Tensor, int]]):
    """Samples that are read from a file, line by line."""

    def __init__(self, file: str, length: int) -> None:
        self.file = file
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        with Path(self.file).open() as lines:
            for line in lines:
                *inputs, label = line.split()
                yield torch.tensor([float(each) for each in inputs]), int(label)


def lines(file: str) -> tuple[Lines, Lines]:
    return Lines(file, 30), Lines(file, 30)


def written(folder: Path) -> str:
    """Write 30 samples of three numbers, with the place of the largest one."""
    inputs = torch.randn(30, 3, generator=_DRAWN)
    rows = [" ".join(f"{each:.4f}" for each in row) + f" {int(row.argmax())}\n" for row in inputs]
    (folder / "samples.txt").write_text("".join(rows))
    return str(folder / "samples.txt")


@pytest.mark.parametrize("workers", [1, 3])
def test_an_iterable_set_is_trained_on_in_its_own_order(workers: int, tmp_path: Path) -> None:
    data = {"_target_": f"{__name__}.lines", "file": written(tmp_path)}
    scheduler = "async" if workers == 1 else "sync"
    run(tmp_path / "run", dataset=data, model={"_target_": "torch.nn.Linear", **SHAPE}, workers=workers, scheduler=scheduler)
    model = initial(tmp_path / "run", nn.Linear(3, 3))
    batches = [batch for _ in range(2) for batch in DataLoader(lines(data["file"])[0], BATCH)]
    for start in range(0, len(batches), workers):  # the gradients of a round are all at the same parameters
        model.zero_grad()
        for inputs, labels in batches[start : start + workers]:
            F.cross_entropy(model(inputs), labels).backward()
        step(model)
    same(tmp_path / "run", model)


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="processes are forked on Linux alone")
def test_live_workers_read_the_file_for_themselves(tmp_path: Path) -> None:
    data = {"_target_": f"{__name__}.lines", "file": written(tmp_path)}
    summary = run(tmp_path / "run", dataset=data, model={"_target_": "torch.nn.Linear", **SHAPE}, workers=3, runtime="rpc")
    assert summary["start"] == "fork"  # nothing was open when the processes were forked
    assert summary["iterations"] == 8


def too_long() -> tuple[Counting, Counting]:
    return Counting(20, 17), Counting(5)


def test_a_set_that_is_shorter_than_its_length_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^dataset: Counting has the length 20, but ended after 17 samples in epoch 0; .*$"):
        run(tmp_path / "run", dataset={"_target_": f"{__name__}.too_long"}, model={"name": "mlp", "depth": 1})
