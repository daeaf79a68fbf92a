"""Simulated runs with a moving average of the parameters: what is evaluated, kept, resumed and replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_rpc import RunFailed, train
from ormo_rpc.config.parsing import load_config
from ormo_rpc.evaluate import evaluate_checkpoint
from ormo_rpc.models.flat import sha256
from ormo_rpc.runtimes.job import Job
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.checkpoint import complete

DIGITS = ("runtime=sim", "logger=none", "model.hidden=8", "train.max_iterations=60", "workers=3", "heterogeneity=gamma")
EVERY = ("checkpoint.every=20", "checkpoint.keep=100", "evaluate.ema=0.9")


def replay(run_dir: Path, source: Path) -> dict[str, Any]:
    return train(["runtime=replay", f"replay.run={source}", "logger=none"], run_dir=run_dir)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("averaged") / "run"
    return run_dir, train([*DIGITS, *EVERY], run_dir=run_dir)


def test_evaluations_use_the_average_and_training_does_not(averaged: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run_dir, summary = averaged
    plain = train(DIGITS, run_dir=tmp_path / "plain")
    assert summary["final_params_sha256"] == plain["final_params_sha256"]
    assert (summary["evaluated"], plain["evaluated"], plain["final_ema_sha256"]) == ("ema", "parameters", None)
    last = complete(run_dir)[-1]
    state = checkpoint.read(last, "server.pt")
    assert sha256(state["ema"]["params"]) == summary["final_ema_sha256"] != summary["final_params_sha256"]
    evaluator = Job(load_config(run_dir / "config.yaml")).evaluator()
    assert evaluator is not None
    assert evaluator(state["ema"]["params"], state["buffers"]).test["loss"] == summary["test_loss"]
    assert evaluator(state["params"], state["buffers"]).test["loss"] == plain["test_loss"] != summary["test_loss"]


def test_a_checkpoint_has_both_models_as_plain_state_dicts(averaged: tuple[Path, dict[str, Any]]) -> None:
    last = complete(averaged[0])[-1]
    state = checkpoint.read(last, "server.pt")
    for name, expected in (("model.pt", state["params"]), ("model_ema.pt", state["ema"]["params"])):
        values = torch.load(last / name, weights_only=True)
        assert torch.equal(torch.cat([value.reshape(-1) for value in values.values()]), expected)
    (last / "model_ema.pt").write_bytes(b"")
    assert "model_ema.pt" in str(checkpoint.damage_of(last))


def test_it_is_resumed_and_replayed_to_the_bit(averaged: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run_dir, whole = averaged
    resumed = train([*DIGITS, *EVERY, f"checkpoint.resume={complete(run_dir)[0]}"], run_dir=tmp_path / "resumed")
    assert resumed["final_ema_sha256"] == whole["final_ema_sha256"]
    for source in (run_dir, tmp_path / "resumed"):
        assert replay(tmp_path / f"{source.name} again", source)["identical"] is True
    summary = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").write_text(json.dumps({**summary, "final_ema_sha256": "0" * 64}))
    with pytest.raises(RunFailed, match="differs: final_ema_sha256: was 0000"):
        replay(tmp_path / "differs", run_dir)


def test_an_average_begins_in_a_run_that_resumes_one_without(tmp_path: Path) -> None:
    first = train([*DIGITS, "train.max_iterations=20"], run_dir=tmp_path / "first")
    resumed = train([*DIGITS, "evaluate.ema=0.5", f"checkpoint.resume={tmp_path / 'first'}"], run_dir=tmp_path / "resumed")
    assert (first["iterations"], resumed["iterations"], resumed["evaluated"]) == (20, 60, "ema")
    assert replay(tmp_path / "again", tmp_path / "resumed")["identical"] is True
    plain = train([*DIGITS, f"checkpoint.resume={tmp_path / 'resumed'}", "train.max_iterations=70"], run_dir=tmp_path / "plain")
    assert (plain["evaluated"], plain["final_ema_sha256"]) == ("parameters", None)


def test_the_command_evaluates_the_average(averaged: tuple[Path, dict[str, Any]]) -> None:
    run_dir, summary = averaged
    found, result = evaluate_checkpoint(complete(run_dir)[-2])
    state = checkpoint.read(found, "server.pt")
    evaluator = Job(load_config(found / "config.yaml")).evaluator()
    assert evaluator is not None
    assert result == evaluator(state["ema"]["params"], state["buffers"])
    assert result.test["loss"] != summary["test_loss"]
