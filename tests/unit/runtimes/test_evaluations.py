"""Evaluations of a run: dense targets against plain PyTorch, and failures with their cause in log and summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from typing_extensions import override

from ormo_rpc import evaluate, train
from ormo_rpc.storage.run_directory import read_metrics

CAUSE = r"RuntimeError: no such file of the evaluation"


class Failing(nn.Module):
    """Cannot be evaluated on more than a batch of the trial, until a number of passes was made."""

    fails_from = 0
    passes = 0

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(input_shape[0], num_classes)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training and len(inputs) > 4:
            Failing.passes += 1
            if Failing.passes > Failing.fails_from:
                raise RuntimeError("no such file\nof the evaluation")
        return self.layer(inputs)


def data() -> tuple[TensorDataset, TensorDataset]:
    half = TensorDataset(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 4)
    return half, half


OPTIONS: dict[str, Any] = {
    "workers": 2,
    "runtime": "sim",
    "logger": "none",
    "train": {"batch_size": 4, "epochs": 3},
    "dataset": {"_target_": f"{__name__}.data"},
    "model": {"_target_": f"{__name__}.Failing"},
}


@pytest.mark.parametrize("works", [0, 1])
def test_an_evaluation_that_fails_does_not_end_the_run_and_says_why(
    works: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Failing, "fails_from", works)
    monkeypatch.setattr(Failing, "passes", 0)
    summary = train(OPTIONS, run_dir=tmp_path)
    failed = 3 - works
    assert (summary["status"], summary["iterations"], summary["failed_evaluations"]) == ("completed", 15, failed)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == [f"evaluation at iteration {at} failed: {CAUSE}" for at in (5, 10, 15)[works:]]
    assert len([row for row in read_metrics(tmp_path) if "test_loss" in row]) == works
    reason = f"every evaluation failed (3), the last with {CAUSE}"
    if works:
        reason = f"the last evaluation, at iteration 15, failed with {CAUSE}; the metrics are those of an earlier one"
    assert summary["reason"] == reason
    assert (summary["test_accuracy"] is None) is (works == 0)
    assert json.loads((tmp_path / "summary.json").read_text())["reason"] == reason


def test_metrics_and_summary_have_the_validation_split_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "fails_from", 100)
    with_split = {**OPTIONS, "dataset": {**OPTIONS["dataset"], "validation": 0.2}}
    for options, there in ((OPTIONS, False), (with_split, True)):
        folder = tmp_path / str(there)
        summary = train(options, run_dir=folder)
        rows = [row for row in read_metrics(folder) if "test_loss" in row]
        assert [("val_loss" in row, "val_accuracy" in row) for row in rows] == [(there, there)] * 3
        assert (summary["val_loss"] is not None, summary["val_accuracy"] is not None) == (there, there)
        assert (summary["failed_evaluations"], summary["reason"]) == (0, None)
        if there:
            assert (rows[-1]["val_loss"], rows[-1]["val_accuracy"]) == (summary["val_loss"], summary["val_accuracy"])
            assert summary["iterations"] == 12  # 16 training samples


# -- dense targets ---------------------------------------------------------------------------------------------------------

TOKENS, LENGTH, SIDE = 7, 6, 5


def drawn(*shape: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(sum(shape)))


def masks() -> tuple[TensorDataset, TensorDataset]:
    """Pixels of four classes, some of which do not count."""

    def half(count: int) -> TensorDataset:
        classes = drawn(count, SIDE, SIDE, below=4)
        noise = torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(count))
        return TensorDataset(classes[:, None] + noise, classes.masked_fill(classes == 3, -100))

    return half(22), half(13)


def texts() -> tuple[TensorDataset, TensorDataset]:
    """The next token is to be predicted, up to the end of a text."""

    def half(count: int) -> TensorDataset:
        tokens = drawn(count, LENGTH + 1, below=TOKENS)
        after_the_end = torch.arange(LENGTH) >= drawn(count, below=LENGTH)[:, None]
        return TensorDataset(tokens[:, :-1], tokens[:, 1:].masked_fill(after_the_end, -100))

    return half(22), half(13)


def segmenter(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, num_classes, 1))


class Language(nn.Module):
    """Logits of the next token, shape (N, C, T)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(TOKENS, 8), nn.Linear(8, num_classes))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs).transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "num_classes"), [("masks", segmenter, 3), ("texts", Language, TOKENS)], ids=["segmentation", "language"]
)
def test_accuracy_and_loss_of_dense_targets_are_those_of_plain_pytorch(
    name: str,
    model: Callable[[int], nn.Module],
    num_classes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {
        **OPTIONS,
        "dataset": {"_target_": f"{__name__}.{name}", "validation": 5},
        "model": {"_target_": f"{__name__}.{model.__name__}"},
    }
    summary = train(options, run_dir=tmp_path)
    net = model(num_classes).eval()
    net.load_state_dict(torch.load(Path(summary["checkpoint"]) / "model.pt", weights_only=True))
    inputs, targets = globals()[name]()[1].tensors
    with torch.no_grad():
        logits = net(inputs)
    counted = targets != -100
    assert summary["test_loss"] == pytest.approx(functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert summary["test_accuracy"] == pytest.approx((logits.argmax(1) == targets)[counted].float().mean().item(), rel=1e-6)
    assert 0 < summary["val_accuracy"] < 1
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path)])
    evaluate.main()
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"test accuracy {summary['test_accuracy']:.2%}, test loss {summary['test_loss']:.4f}",
        f"validation accuracy {summary['val_accuracy']:.2%}, validation loss {summary['val_loss']:.4f}",
    ]
