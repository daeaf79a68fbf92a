"""Runs of tasks by several workers: replayed and resumed to the bit, under barriers, local steps and changing membership."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ormo_rpc import ConfigError, train
from tests.support.tasks import ROWS

HERE = "tests.support.tasks"
WAYS: dict[str, dict[str, Any]] = {
    "ordered momentum, prefetch": {"worker": {"prefetch": 1}},
    "synchronous": {"scheduler": "sync"},
    "local steps": {"algorithm": {"name": "orlomo", "local_steps": 3}},
    "workers come and go, in parts": {
        "runtime": {"name": "sim", "joins": {7: 0.3}, "leaves": {1: 0.4}},
        "worker": {"accumulate": 3},
    },
}


def simulate(row: str, run_dir: Path, **options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "runtime": "sim",
        "logger": "none",
        "workers": 3,
        "task": dict(ROWS[row].task),
        "dataset": {"_target_": f"{HERE}.data", "row": row},
        "model": {"_target_": f"{HERE}.network", "row": row},
        **options,
    }
    values["train"] = {"lr": 0.01, "epochs": 4, "batch_size": 5, **options.get("train", {})}
    return train(values, run_dir=run_dir)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", ["regression", "segmentation", "language modelling, padded", "model loss", "custom, all of it"])
def test_a_run_is_replayed_to_the_bit(row: str, way: str, tmp_path: Path) -> None:
    summary = simulate(row, tmp_path / "run", **WAYS[way])
    assert summary["status"] == "completed"
    again = train(["runtime=replay", f"replay.run={tmp_path / 'run'}", "logger=none"], run_dir=tmp_path / "again")
    assert again["identical"] is True
    assert again["final_params_sha256"] == summary["final_params_sha256"]


def test_a_run_resumes_with_the_same_bits_but_not_with_another_task(tmp_path: Path) -> None:
    row = "regression, huber"
    whole = simulate(row, tmp_path / "whole", checkpoint={"every": 7, "keep": 9})
    resume = {"resume": str(min((tmp_path / "whole" / "checkpoints").iterdir()))}
    measured = {**ROWS[row].task, "torchmetrics": {"largest": {"_target_": f"{HERE}.Largest"}}}
    with pytest.raises(
        ConfigError, match=r"^checkpoint\.resume: task: got task=regression .*task\.error=l1.*, expected task=.*"
    ):
        simulate(row, tmp_path / "other", checkpoint=resume, task={**ROWS[row].task, "error": "l1"})
    rest = simulate(row, tmp_path / "rest", checkpoint=resume, task=measured)
    assert rest["test_largest"] > 0
    assert rest["final_params_sha256"] == whole["final_params_sha256"]
