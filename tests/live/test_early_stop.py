"""A live run that is evaluated often, whose server dies, and that stops early; it is replayed, and its best model evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ormo_rpc.evaluate import evaluate_checkpoint
from tests.support.processes import QUIET, check_lineage, events, launch, replayed, summary

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]


def test_a_run_stops_early_although_its_server_was_killed_meanwhile(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = (
        "workers=3",
        "dataset.validation=0.2",
        "train.max_iterations=20000",
        "checkpoint.every=30",
        "checkpoint.journal=true",
    )
    choice = ("evaluate.every=25", "evaluate.patience=4", "evaluate.min_delta=100", "evaluate.ema=0.9")
    status, out, err = launch(run_dir, *QUIET, *options, *choice, "runtime.faults=[kill@server:60]")
    assert status == 0, err
    found = summary(run_dir)
    assert (found["status"], found["incarnations"], found["rolled_back"], found["evaluated"]) == ("completed", 2, 0, "ema")
    assert found["reason"].startswith("evaluate.patience=4: for ")
    assert found["reason"] in out
    assert f"at iteration {found['best']['iteration']}: {run_dir / 'checkpoints' / 'best'}\n" in out
    # The first evaluation that was remembered is the best, and the fourth after it ends the run.
    assert 100 < found["iterations"] < 5000
    check_lineage(run_dir, found["iterations"])
    assert len(events(run_dir, "finish")) == 1
    folder = run_dir / "checkpoints" / "best"
    record = json.loads((folder / "manifest.json").read_text())["best"]
    assert found["best"] == {**{key: record[key] for key in ("metric", "value", "iteration")}, "path": str(folder)}
    _, result = evaluate_checkpoint(folder)
    assert result.validation is not None
    assert result.validation["loss"] == pytest.approx(record["value"], rel=1e-6)
    assert replayed(run_dir, tmp_path / "again") == found["final_params_sha256"]
