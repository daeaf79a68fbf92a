"""Working ahead (``worker.prefetch``): to the server a process is then several workers, which compute one at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import ormo_rpc
from ormo_rpc.cli import compose
from ormo_rpc.errors import ConfigError
from ormo_rpc.messages import Push
from ormo_rpc.options import parts
from ormo_rpc.runtimes.job import Job
from ormo_rpc.server.parameter_server import Status
from tests.support.processes import replayed

SIM = ("runtime=sim", "runtime.gradient=quadratic", "logger=none", "runtime.compute_seconds=1.0")


def simulated(run_dir: Path, *overrides: str) -> dict[str, object]:
    return ormo_rpc.train([*SIM, *overrides], run_dir=run_dir)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 3])
@pytest.mark.parametrize("latency", [0.25, 1.0, 2.5])
def test_the_network_is_hidden_as_far_as_the_processor_allows(prefetch: int, latency: float, tmp_path: Path) -> None:
    # One machine; a ticket computes for 1 s and is 2 L under way, so n tickets at a time are min(n / (1 + 2 L), 1) a second.
    count = 200
    result = simulated(
        tmp_path,
        "workers=1",
        f"worker.prefetch={prefetch}",
        f"runtime.latency_seconds=[{latency}]",
        f"train.max_iterations={count}",
    )
    rate = min((1 + prefetch) / (1 + 2 * latency), 1.0)
    assert result["virtual_seconds"] == pytest.approx(count / rate, rel=0.05)
    assert result["num_workers"] == 1 + prefetch


def test_a_slow_process_is_slow_for_each_of_its_workers(tmp_path: Path) -> None:
    options = ("workers=2", "worker.prefetch=1", "heterogeneity=one_slow", "heterogeneity.factor=4", "train.max_iterations=500")
    pushes = simulated(tmp_path, *options)["pushes_per_worker"]
    assert isinstance(pushes, dict)
    fast, slow = pushes["0"] + pushes["2"], pushes["1"] + pushes["3"]
    assert fast / slow == pytest.approx(4, rel=0.1)


def test_an_interrupted_simulation_with_prefetch_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = (
        "workers=2",
        "worker.prefetch=1",
        "runtime.latency_seconds=[0.3]",
        "train.max_iterations=120",
        "heterogeneity=gamma",
    )
    whole = simulated(tmp_path / "whole", *options)
    simulated(tmp_path / "half", *options, "checkpoint.every=60", "checkpoint.keep=10")
    (half,) = [each for each in (tmp_path / "half" / "checkpoints").iterdir() if each.name.endswith("0060")]
    rest = simulated(tmp_path / "rest", *options, f"checkpoint.resume={half}")
    assert rest["final_params_sha256"] == whole["final_params_sha256"]
    assert rest["virtual_seconds"] == whole["virtual_seconds"]


def test_a_simulation_is_replayed(tmp_path: Path) -> None:
    options = ("workers=3", "worker.prefetch=1", "runtime.latency_seconds=[0.3]", "train.max_iterations=90")
    assert replayed_sha(tmp_path, *options)


def replayed_sha(tmp_path: Path, *options: str) -> bool:
    first = simulated(tmp_path / "run", *options)
    return replayed(tmp_path / "run", tmp_path / "again") == first["final_params_sha256"]


@pytest.mark.parametrize("scheduler", list(parts("scheduler")))
def test_prefetch_is_refused_with_a_barrier(scheduler: str) -> None:
    overrides = [f"scheduler={scheduler}", "worker.prefetch=1"]
    if scheduler in ("sync", "partial"):
        with pytest.raises(ConfigError, match=rf"^worker.prefetch: got 1 with scheduler={scheduler}, whose barrier "):
            compose(overrides)
    else:
        assert compose([*overrides, "workers=3"]).num_workers == 6


@pytest.mark.parametrize("value", [-1, 101, 40_000])
def test_too_large_a_prefetch_is_refused(value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^worker.prefetch: got {value}, expected a whole number from 0 to 100"):
        compose([f"worker.prefetch={value}"])
    assert compose(["worker.prefetch=100", "workers=4"]).num_workers == 404


@pytest.mark.parametrize("loaded", [False, True])
def test_non_finite_gradients_of_two_workers_of_one_process_do_not_end_the_run(loaded: bool) -> None:
    some = Job(compose(["workers=2", "worker.prefetch=1", "model.hidden=4", "train.max_iterations=6"]))
    server = some.server(lambda _: None, lambda: 0.0)
    held = {reply.worker: reply for reply in server.start()}
    if loaded:
        server.load_state_dict(server.state_dict(replies=True))
    grad, bad = torch.zeros_like(server.params), torch.full_like(server.params, math.nan)

    def push(worker: int, what: torch.Tensor) -> None:
        reply = held.pop(worker)
        assert reply.ticket is not None
        sent = Push(worker=worker, ticket=reply.ticket, stamp=reply.stamp, grad=what, incarnation=reply.incarnation)
        replies = server.receive(sent)
        held.update({reply.worker: reply for reply in replies if reply.ticket is not None})

    spoiled = held[1].ticket
    for worker in (1, 3, 1):  # those of process 1
        push(worker, bad)
        assert server.status is Status.running
        assert spoiled not in {held[worker].ticket for worker in (1, 3) if worker in held}
    push(0, grad)
    assert held[0].ticket == spoiled
    push(0, bad)
    assert server.status is Status.diverged, "processes 0 and 1 agree"
