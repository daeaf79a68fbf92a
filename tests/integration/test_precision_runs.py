"""Runs under autocast: to the bit those of plain PyTorch, with `GradScaler` where it computes in float16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from ormo_rpc import train
from ormo_rpc.config.parsing import load_config
from ormo_rpc.evaluate import evaluate_checkpoint
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.runtimes.job import Job
from ormo_rpc.seeding import generator, seed_for
from ormo_rpc.server.parameter_server import OVERFLOW
from ormo_rpc.storage import checkpoint
from tests.support.precision import Shared

MODELS = "tests.support.precision"
ITERATIONS = 40
LR, MOMENTUM = 2**-4, 0.5  # powers of two, by which every product is exact: the order of the operations does not matter
HUGE, INTERVAL = 2.0**30, 5
"""A first scale at which gradients overflow, and an interval at which it grows often enough for them to do so again."""


def options(model: str = f"{MODELS}.Shared", **more: Any) -> dict[str, Any]:
    training = {"max_iterations": ITERATIONS, "batch_size": 32, "lr": LR, "momentum": MOMENTUM, **more.pop("train", {})}
    chosen = {"_target_": model, **more.pop("keywords", {})}
    return {"workers": 1, "algorithm": "naive", "runtime": "sim", "logger": "none", "model": chosen, "train": training, **more}


def fp16(**more: Any) -> dict[str, Any]:
    return {"autocast": "fp16", "loss_scale": HUGE, "loss_scale_interval": INTERVAL, **more}


def batches(job: Job) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The batches of a job by ticket; each call seeds the draws of the ticket's pass."""

    def batch(ticket: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed_for(job.config.seed, "forward", ticket))
        return job.data.train.batch(job.epochs.indices(ticket), generator(job.config.seed, "augment", ticket))

    return batch


def saved_params(run: Path) -> dict[str, Tensor]:
    model = Job(load_config(run / "config.yaml")).model()
    return model.params.views(checkpoint.read(checkpoint.locate(run), "server.pt")["params"])


def overflows(run: Path) -> list[float]:
    """The scales at which gradients were discarded."""
    events = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
    return [float(each["reason"].removeprefix(OVERFLOW)) for each in events if each.get("event") == "discard"]


@pytest.mark.parametrize("name", ["Shared", "OwnAutocast"])
def test_a_run_of_one_worker_under_autocast_is_plain_pytorch_to_the_bit(name: str, tmp_path: Path) -> None:
    own = name == "OwnAutocast"
    worker: dict[str, str] = {} if own else {"autocast": "bf16"}
    summary = train(options(f"{MODELS}.{name}", worker=worker), run_dir=tmp_path / "run")
    job = Job(load_config(tmp_path / "run" / "config.yaml"))
    module, batch = job.model().module.train(), batches(job)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM)
    for ticket in range(ITERATIONS):
        inputs, targets = batch(ticket)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not own):
            loss = F.cross_entropy(module(inputs), targets)
        loss.backward()
        optimizer.step()
    for name_, value in saved_params(tmp_path / "run").items():
        assert torch.equal(value, module.get_parameter(name_)), name_
    inputs, targets = job.data.test.batch(torch.arange(len(job.data.test)), None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not own):
        logits: Tensor = module.eval()(inputs)
    assert logits.dtype == (torch.float32 if own else torch.bfloat16)
    assert summary["test_loss"] == pytest.approx(F.cross_entropy(logits.float(), targets).item(), rel=1e-5)
    assert evaluate_checkpoint(tmp_path / "run")[1].test["loss"] == summary["test_loss"]


def test_a_run_of_one_worker_in_float16_is_grad_scaler_to_the_bit(tmp_path: Path) -> None:
    summary = train(options(worker=fp16()), run_dir=tmp_path / "run")
    job = Job(load_config(tmp_path / "run" / "config.yaml"))
    module, batch = job.model().module.train(), batches(job)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM)
    scaler = torch.amp.GradScaler("cpu", init_scale=HUGE, growth_interval=INTERVAL)
    skipped = with_scaler(scaler, optimizer, module, batch)
    assert len(skipped) > 10
    assert max(skipped) == HUGE
    assert overflows(tmp_path / "run") == skipped
    for name, value in saved_params(tmp_path / "run").items():
        assert torch.equal(value, module.get_parameter(name)), name
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss_scale"] for row in rows if "loss_scale" in row][-1] == summary["loss_scale"] == scaler.get_scale()
    state = checkpoint.read(checkpoint.locate(tmp_path / "run"), "server.pt")["loss_scale"]
    assert state == {"value": scaler.get_scale(), "finite": scaler.state_dict()["_growth_tracker"]}


def with_scaler(
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    batch: Callable[[int], tuple[Tensor, Tensor]],
) -> list[float]:
    """Train under autocast; a batch whose step is skipped is computed again. Return the scales of these."""
    skipped, ticket = list[float](), 0
    while ticket < ITERATIONS:
        inputs, targets = batch(ticket)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(module(inputs), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() < scale:
            skipped.append(scale)
        else:
            ticket += 1
    return skipped


def test_parameters_of_float16_have_masters_and_a_loss_scale(tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"keywords": {"dtype": "float16"}, "worker": fp16(autocast="none")}
    train(options("tests.support.dtypes.Homogeneous", **chosen), run_dir=tmp_path / "run")
    job = Job(load_config(tmp_path / "run" / "config.yaml"))
    module, batch = job.model().module.train(), batches(job)
    masters = {name: nn.Parameter(each.detach().float()) for name, each in module.named_parameters()}
    optimizer = torch.optim.SGD(masters.values(), lr=LR, momentum=MOMENTUM)
    scaler = torch.amp.GradScaler("cpu", init_scale=HUGE, growth_interval=INTERVAL)
    skipped, ticket = list[float](), 0
    while ticket < ITERATIONS:
        inputs, targets = batch(ticket)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.grad = None
                parameter.copy_(masters[name])
        scaler.scale(F.cross_entropy(module(inputs), targets)).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            masters[name].grad = parameter.grad.float()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() < scale:
            skipped.append(scale)
        else:
            ticket += 1
    assert overflows(tmp_path / "run") == skipped
    assert len(skipped) > 10
    for name, value in saved_params(tmp_path / "run").items():
        assert torch.equal(value, masters[name]), name


@pytest.mark.parametrize("algorithm", ["ormo", "fedbuff", "orlomo", "easgd", "heloco", "ringleader", "ringmaster_lmo"])
def test_runs_in_float16_are_replayed_and_resumed_to_the_bit(algorithm: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"workers": 3, "algorithm": algorithm, "worker": fp16(), "train": {"lr": 0.01, "clip_norm": 1.0}}
    whole = train(options(**settings), run_dir=tmp_path / "whole")
    assert whole["status"] == "completed"
    assert HUGE in overflows(tmp_path / "whole")
    again = train(["runtime=replay", f"replay.run={tmp_path / 'whole'}", "logger=none"], run_dir=tmp_path / "again")
    assert again["identical"] is True
    first: dict[str, Any] = {**settings, "train": {"lr": 0.01, "clip_norm": 1.0, "max_iterations": ITERATIONS // 2}}
    train(options(**first), run_dir=tmp_path / "first")
    rest = train(options(**settings, checkpoint={"resume": str(tmp_path / "first")}), run_dir=tmp_path / "rest")
    saved = [checkpoint.read(checkpoint.locate(tmp_path / name), "server.pt")["loss_scale"] for name in ("first", "rest")]
    assert saved[0]["value"] < HUGE
    assert max(overflows(tmp_path / "rest"), default=0.0) < HUGE, "the scale was not begun anew"
    assert rest["status"] == "completed"


def test_weight_decay_and_clipping_see_the_gradient_as_it_is(tmp_path: Path) -> None:
    regularised = {"clip_norm": 0.5, "weight_decay": 2.0**-6}
    scaled = train(options(worker=fp16(loss_scale=1024.0), train=regularised), run_dir=tmp_path / "scaled")
    plain = train(options(worker=fp16(loss_scale=1.0), train=regularised), run_dir=tmp_path / "plain")
    assert scaled["test_loss"] == pytest.approx(plain["test_loss"], rel=0.02)
    assert scaled["train_loss"] == pytest.approx(plain["train_loss"], rel=0.02)


def test_gradients_that_overflow_at_every_scale_end_the_run_with_the_reason(tmp_path: Path) -> None:
    summary = train(options(f"{__name__}.Overflowing", worker=fp16()), run_dir=tmp_path / "run")
    assert summary["status"] == "diverged"
    assert summary["reason"] == "gradients overflow float16 at every loss scale down to 0.0009765625"
    assert overflows(tmp_path / "run") == [2.0**power for power in range(30, -11, -1)]


class Overflowing(Shared):
    """Its output is not finite, at any parameters."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * (float("inf") if inputs.sum() > 0 else 1.0)


def test_the_same_parameter_in_other_memory_is_cast_anew() -> None:
    model = FlatModel(Shared())
    inputs = torch.rand(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        for seed in (0, 1):
            torch.manual_seed(seed)
            params = torch.randn(model.params.size)
            model.bind(params)
            torch.manual_seed(2)
            found = model.module(inputs)
            twin = Shared()
            torch.nn.utils.vector_to_parameters(params, twin.parameters())
            torch.manual_seed(2)
            assert torch.equal(found, twin(inputs))
