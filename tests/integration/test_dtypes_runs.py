"""Runs of models with several dtypes: to the bit a plain loop with explicit masters; resumed, replayed, exported, evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from ormo_rpc import train
from ormo_rpc.config.parsing import load_config
from ormo_rpc.evaluate import evaluate_checkpoint
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.runtimes.job import Job
from ormo_rpc.seeding import generator, seed_for
from ormo_rpc.storage import checkpoint
from tests.support.dtypes import Masters

MODELS = "tests.support.dtypes"
ITERATIONS = 40
LR, MOMENTUM = 2**-4, 0.5  # powers of two, by which every product is exact: the order of the operations does not matter
CASES: dict[str, dict[str, Any]] = {
    "bf16": {"_target_": f"{MODELS}.Homogeneous", "dtype": "bfloat16"},
    "float64": {"_target_": f"{MODELS}.Homogeneous", "dtype": "float64"},
    "float32": {"_target_": f"{MODELS}.Homogeneous", "dtype": "float32"},
    "bf16 and float32": {"_target_": f"{MODELS}.Mixed"},
    "bf16, float32 and float64": {"_target_": f"{MODELS}.Mixed", "shift": "float64"},
}


def options(case: str, **more: Any) -> dict[str, Any]:
    training = {"max_iterations": ITERATIONS, "batch_size": 32, "lr": LR, "momentum": MOMENTUM, **more.pop("train", {})}
    return {
        "workers": 1,
        "algorithm": "naive",
        "runtime": "sim",
        "logger": "none",
        "model": CASES[case],
        "train": training,
        **more,
    }


def plain_pytorch(job: Job) -> tuple[nn.Module, Masters]:
    """Train by hand at masters of the widest dtype; return the model, with its casts, and them."""
    model, seed = job.model(), job.config.seed
    module = model.module.train()
    masters = Masters(module, LR, MOMENTUM, model.dtype)
    for ticket in range(ITERATIONS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, "forward", ticket))
            inputs, targets = job.data.train.batch(job.epochs.indices(ticket), generator(seed, "augment", ticket))
            masters.step(masters.gradients(lambda: F.cross_entropy(module(inputs), targets).backward()))  # noqa: B023 - called at once
    with torch.no_grad():
        for name, parameter in masters.trained.items():
            parameter.copy_(masters.values[name])
    return module, masters


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_one_worker_is_a_plain_loop_with_masters_to_the_bit(case: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = train(options(case), run_dir=run)
    job = Job(load_config(run / "config.yaml"))
    module, masters = plain_pytorch(job)
    saved = checkpoint.locate(run)
    state = checkpoint.read(saved, "server.pt")
    params: Tensor = state["params"]
    assert params.dtype == masters.dtype
    for name, value in job.model().params.views(params).items():
        assert torch.equal(value, masters.values[name]), name
    exported: dict[str, Tensor] = checkpoint.read(saved, "model.pt")
    for name, expected in module.state_dict().items():
        assert exported[name].dtype == expected.dtype
        if name.removeprefix("norm.") not in ("running_mean", "running_var"):  # averaged on the server, in another order
            assert torch.equal(exported[name], expected), name
    module.load_state_dict(exported)
    inputs, targets = job.data.test.batch(torch.arange(len(job.data.test)), None)
    with torch.no_grad():
        logits: Tensor = module.eval()(inputs)
    assert summary["test_loss"] == pytest.approx(F.cross_entropy(logits.float(), targets).item(), rel=1e-3)
    assert evaluate_checkpoint(run)[1].test["loss"] == summary["test_loss"]


def test_a_run_continues_from_its_masters_and_not_from_what_is_exported(tmp_path: Path) -> None:
    whole = train(options("bf16"), run_dir=tmp_path / "whole")
    half = {"train": {"max_iterations": ITERATIONS // 2}}
    train(options("bf16", **half), run_dir=tmp_path / "half")
    saved = checkpoint.locate(tmp_path / "half")
    masters: Tensor = checkpoint.read(saved, "server.pt")["params"]
    assert not torch.equal(masters, masters.bfloat16().float())
    rest = train(options("bf16", checkpoint={"resume": str(tmp_path / "half")}), run_dir=tmp_path / "rest")
    assert rest["final_params_sha256"] == whole["final_params_sha256"]


def test_a_run_of_several_workers_with_a_rounded_wire_is_replayed_to_the_bit(tmp_path: Path) -> None:
    several = {"workers": 3, "algorithm": "ormo", "wire": {"dtype": "bf16", "params": "bf16"}}
    summary = train({**options("bf16 and float32"), **several}, run_dir=tmp_path / "run")
    again = train(["runtime=replay", f"replay.run={tmp_path / 'run'}", "logger=none"], run_dir=tmp_path / "again")
    assert again["identical"] is True
    assert summary["wire"] == "bf16 params=bf16"


def test_another_dtype_of_a_parameter_is_another_model(tmp_path: Path) -> None:
    train(options("bf16"), run_dir=tmp_path / "run")
    then = checkpoint.fingerprint_of(checkpoint.locate(tmp_path / "run"))
    now = Fingerprint.of(Job(load_config(tmp_path / "run" / "config.yaml")).model().module.float())
    assert "net.1.weight bfloat16 (16, 64)" in str(then.layout_difference(now, "the checkpoint", "now"))


def test_gradients_of_the_parts_of_a_batch_add_up_in_float32(tmp_path: Path) -> None:
    train(options("bf16", worker={"accumulate": 2}), run_dir=tmp_path / "run")
    job = Job(load_config(tmp_path / "run" / "config.yaml"))
    model, seed = job.model(), job.config.seed
    module = model.module.train()
    masters = Masters(module, LR, MOMENTUM)
    for ticket in range(ITERATIONS):
        total = {name: torch.zeros_like(value) for name, value in masters.values.items()}
        inputs, targets = job.data.train.batch(job.epochs.indices(ticket), generator(seed, "augment", ticket))
        for part in range(2):
            torch.manual_seed(seed_for(seed, f"forward of part {part}", ticket))
            x, y = (each[16 * part : 16 * (part + 1)] for each in (inputs, targets))
            for name, grad in masters.gradients(lambda: (F.cross_entropy(module(x), y) * 0.5).backward()).items():  # noqa: B023 - called at once
                total[name] += grad
        masters.step(total)
    params: Tensor = checkpoint.read(checkpoint.locate(tmp_path / "run"), "server.pt")["params"]
    for name, value in model.params.views(params).items():
        assert torch.equal(value, masters.values[name]), name
