"""Evaluations that fail: the cause in one line of the log, and a summary that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ormo_rpc import train
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
    reason = None if works else f"every evaluation failed (3), the last with {CAUSE}"
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
