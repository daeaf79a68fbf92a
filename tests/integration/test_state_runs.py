"""Runs of models whose forward passes change buffers and draw from every generator: replayed, resumed, evaluated, exported."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from typing_extensions import override

from ormo_rpc import train
from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import load_config
from ormo_rpc.evaluate import evaluate_checkpoint
from ormo_rpc.runtimes.job import Job
from ormo_rpc.storage import checkpoint

HERE = "model._target_=tests.integration.test_state_runs.Net"
RUN = ("model=custom", HERE, "logger=none", "logger.progress=false", "train.max_iterations=60", "workers=3", "train.lr=0.02")


class Net(nn.Module):
    """Spectral norms of both kinds, a norm that is skipped at random, averages of its own, and frozen weights from numpy."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        size = int(np.prod(input_shape))
        self.frozen = nn.Parameter(torch.from_numpy(np.random.randn(size)).float(), requires_grad=False)
        self.register_buffer("offset", torch.tensor([random.gauss(0, 1) for _ in range(size)]), persistent=False)
        self.register_buffer("average", torch.zeros(16))
        self.register_buffer("calls", torch.tensor(0))
        self.first = nn.utils.spectral_norm(nn.Linear(size, 16))
        self.norm = nn.BatchNorm1d(16)
        self.second = parametrizations.spectral_norm(nn.Linear(16, 16))
        self.last = nn.Linear(16, num_classes)
        self.offset: Tensor
        self.average: Tensor
        self.calls: Tensor

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        features = self.first(inputs.flatten(1) * self.frozen + self.offset)
        if not self.training or random.random() < 0.5:
            features = self.norm(features)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * features.detach().mean(0)
            self.calls += 1 + np.random.randint(2)
        return self.last(self.second(features.relu()).relu() + self.average)


class Unsaved(nn.Module):
    """An average that ``state_dict`` leaves out, and extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.register_buffer("average", torch.zeros(64), persistent=False)
        self.average: Tensor

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.flatten(1)
        if self.training:
            self.average = self.average.lerp(inputs.mean(0), 0.1)
        return self.layer(inputs - 3 * self.average)

    @override
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    @override
    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


def check(run_dir: Path, tmp_path: Path, summary: dict[str, Any]) -> dict[str, Tensor]:
    """Replay a run, evaluate what it exports, and return that."""
    again = train(["runtime=replay", f"replay.run={run_dir}", "logger=none"], run_dir=tmp_path / "again")
    assert again["identical"] is True
    assert evaluate_checkpoint(run_dir)[1].test["accuracy"] == summary["test_accuracy"]
    return torch.load(checkpoint.locate(run_dir) / "model.pt", weights_only=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_the_calling_program_change_nothing(mode: Callable[[], AbstractContextManager[None]], tmp_path: Path) -> None:
    overrides = ["runtime=sim", *RUN]
    expected = train(overrides, run_dir=tmp_path / "plain")
    with mode():
        found = train(overrides, run_dir=tmp_path / "run")
        assert train(["runtime=replay", f"replay.run={tmp_path / 'run'}", "logger=none"], run_dir=tmp_path / "again")[
            "identical"
        ]
    for entry in ("final_params_sha256", "final_buffers_sha256", "test_loss"):
        assert found[entry] == expected[entry]


def test_state_that_is_not_saved_by_the_model_is_evaluated(tmp_path: Path) -> None:
    overrides = ["runtime=sim", "model=custom", f"model._target_={__name__}.Unsaved", *RUN[2:]]
    summary = train(overrides, run_dir=tmp_path / "run")
    assert evaluate_checkpoint(tmp_path / "run")[1].test["loss"] == summary["test_loss"]
    state = checkpoint.read(checkpoint.locate(tmp_path / "run"), "model.pt")
    assert list(state) == ["_extra_state", "layer.weight", "layer.bias"]
    Unsaved().load_state_dict(state)


@pytest.mark.slow
def test_a_simulation_is_replayed_and_evaluated(tmp_path: Path) -> None:
    summary = train([*RUN, "runtime=sim", "train.max_iterations=600", "train.lr=0.0003"], run_dir=tmp_path / "run")
    state = check(tmp_path / "run", tmp_path, summary)
    net = Job(load_config(tmp_path / "run" / "config.yaml")).model().module
    net.load_state_dict(state)
    assert isinstance(net, Net)
    net.eval()(torch.zeros(1, 1, 8, 8))
    for layer in (net.first, net.second):
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-3)  # 200 power iterations each
    assert state["norm.num_batches_tracked"] == pytest.approx(300, abs=60)  # 5 standard deviations of 600 tosses
    assert state["calls"] > 0
    other = train([*RUN, "runtime=sim", "seed=1"], run_dir=tmp_path / "other")
    assert other["final_buffers_sha256"] != summary["final_buffers_sha256"]


@pytest.mark.slow
def test_a_simulation_that_is_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = train([*RUN, "runtime=sim"], run_dir=tmp_path / "whole")
    train([*RUN, "runtime=sim", "train.max_iterations=30"], run_dir=tmp_path / "half")
    rest = train([*RUN, "runtime=sim", f"checkpoint.resume={tmp_path / 'half'}"], run_dir=tmp_path / "rest")
    assert rest["iterations"] == whole["iterations"]
    state = torch.load(checkpoint.locate(tmp_path / "rest") / "model.pt", weights_only=True)
    assert state["norm.num_batches_tracked"] > 0
    check(tmp_path / "rest", tmp_path, rest)


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_a_live_run_is_replayed_and_evaluated(transport: str, tmp_path: Path) -> None:
    summary = train([*RUN, f"transport={transport}"], run_dir=tmp_path / "run")
    assert summary["status"] == "completed"
    state = check(tmp_path / "run", tmp_path, summary)
    assert state["calls"] > 0


@pytest.mark.slow
def test_every_construction_draws_the_same_from_every_generator() -> None:
    job = Job(compose([*RUN, "runtime=sim"]))
    expected = dict(job.model().module.named_buffers()), dict(job.model().module.named_parameters())
    for seed in (5, 6):  # wherever the global generators stand
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        draws = random.random(), np.random.rand(), torch.rand(()).item()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        module = Job(compose([*RUN, "runtime=sim"])).model().module
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == draws, "they are left alone"
        for found, values in zip((module.named_buffers(), module.named_parameters()), expected, strict=True):
            assert all(torch.equal(value, values[name]) for name, value in found)
