"""Simulations on the GPU: against the CPU, again to the bit, and with streams that are late."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from ormo_rpc import train
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes import job as jobs
from ormo_rpc.storage import checkpoint
from ormo_rpc.worker.graphs import GraphWorker
from ormo_rpc.worker.slots import Slot
from tests.gpu.graph_models import distance

RUN = ("runtime=sim", "logger=none", "workers=8", "train.batch_size=64", "train.lr=0.02", "heterogeneity=gamma")
GPU = ("worker.device=cuda", "server.device=cuda", "worker.cuda_graph=true")
DROPPING = "model._target_=tests.gpu.graph_models.dropping"


@pytest.fixture(autouse=True)
def arithmetic(gpu: torch.device) -> Any:
    """Undo what a run has set for this process."""
    del gpu
    yield
    torch.use_deterministic_algorithms(False)


def parameters(run_dir: Path) -> torch.Tensor:
    """The parameters at the end of a run."""
    state: dict[str, Any] = checkpoint.read(checkpoint.complete(run_dir)[-1], "server.pt")
    return state["params"].cpu()


def test_fifty_tickets_end_where_they_do_on_the_cpu(tmp_path: Path) -> None:
    options = (*RUN, DROPPING, "+model.p=0", "train.max_iterations=50", "worker.deterministic=true")
    there = train([*options, *GPU], run_dir=tmp_path / "gpu")
    here = train([*options, "worker.device=cpu"], run_dir=tmp_path / "cpu")
    assert there["iterations"] == here["iterations"] == 50
    assert distance(parameters(tmp_path / "gpu"), parameters(tmp_path / "cpu")) < 1e-3
    assert there["train_loss"] == pytest.approx(here["train_loss"], rel=1e-3)


@pytest.mark.parametrize("compression", ["topk", "powersgd"])
def test_compressed_pushes_come_to_a_server_on_the_cpu(compression: str, tmp_path: Path) -> None:
    options = (*RUN, "model=mlp", f"compression={compression}", "train.max_iterations=30", "server.device=cpu")
    there, here = (train([*options, f"worker.device={name}"], run_dir=tmp_path / name) for name in ("cuda", "cpu"))
    assert there["iterations"] == here["iterations"] == 30
    assert distance(parameters(tmp_path / "cuda"), parameters(tmp_path / "cpu")) < 0.05


@pytest.mark.parametrize("scheme", [(), ("worker.autocast=bf16", "worker.channels_last=true")])
def test_it_is_the_same_again_and_replayed_to_the_bit(scheme: tuple[str, ...], tmp_path: Path) -> None:
    options = (*RUN, *GPU, DROPPING, *scheme, "train.max_iterations=40", "worker.deterministic=true")
    first = train(options, run_dir=tmp_path / "first")
    again = train(options, run_dir=tmp_path / "again")
    replayed = train(["runtime=replay", f"replay.run={tmp_path / 'first'}", "logger=none"], run_dir=tmp_path / "replayed")
    assert again["final_params_sha256"] == replayed["final_params_sha256"] == first["final_params_sha256"]
    assert again["final_buffers_sha256"] == first["final_buffers_sha256"]


def test_gradients_that_overflow_leave_those_begun_meanwhile_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*RUN, *GPU, DROPPING, "worker.autocast=fp16", "worker.loss_scale=1e10", "train.max_iterations=40")
    options = (*options, "worker.deterministic=true")
    ahead = train(options, run_dir=tmp_path / "ahead")
    monkeypatch.setattr(GraphWorker, "AHEAD", 0)
    plain = train(options, run_dir=tmp_path / "plain")
    assert ahead["status"] == plain["status"] == "completed"
    assert ahead["gradients_computed"] == plain["gradients_computed"] > 45
    assert ahead["final_params_sha256"] == plain["final_params_sha256"]


class Delayed(GraphWorker):
    """Streams wait at random, up to some milliseconds."""

    randomness = random.Random(0)

    @override
    def _start(self, slot: Slot, reply: Reply) -> None:
        if self.randomness.random() < 0.3:
            with self._stream.entered():
                self._sleep()
        super()._start(slot, reply)

    @override
    def compute(self, reply: Reply) -> Push:
        push = super().compute(reply)
        if self.randomness.random() < 0.3:
            self._sleep()  # before the server's step
        return push

    def _sleep(self) -> None:
        torch.cuda._sleep(self.randomness.randrange(3_000_000))  # pyright: ignore[reportPrivateUsage] # nothing public waits on a GPU


class Synchronized(GraphWorker):
    """Everything waits for everything."""

    AHEAD = 0

    @override
    def compute(self, reply: Reply) -> Push:
        torch.cuda.synchronize()
        push = super().compute(reply)
        torch.cuda.synchronize()
        return push


def test_late_streams_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*RUN, *GPU, DROPPING, "train.max_iterations=300", "worker.deterministic=true")
    options = (*options, "runtime.leaves={3: 1.0}", "runtime.joins={3: 2.0}")

    def result(kind: Callable[..., GraphWorker]) -> tuple[str, str]:
        monkeypatch.setattr(jobs, "GraphWorker", kind)
        summary = train(options, run_dir=tmp_path / getattr(kind, "__name__", "run"))
        return summary["final_params_sha256"], summary["final_buffers_sha256"]

    assert result(Delayed) == result(Synchronized)
