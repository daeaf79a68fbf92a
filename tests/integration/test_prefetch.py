"""Working ahead (``worker.prefetch``): to the server a process is then several workers, which compute one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ormo_rpc
from ormo_rpc.composing import compose
from ormo_rpc.errors import ConfigError
from ormo_rpc.messages import Push
from ormo_rpc.options import parts
from ormo_rpc.runtimes.job import Job
from ormo_rpc.server.parameter_server import Status
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import read_trace
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


def test_a_process_that_joins_computes_on_a_machine_of_its_own(tmp_path: Path) -> None:
    options = ("workers=1", "worker.prefetch=1", "runtime.joins={2: 0.0}", "train.max_iterations=100")
    result = simulated(tmp_path, *options)
    # A gradient a second from each of two machines: 98 in 49 s. Of the last two tickets one waits on the first machine then,
    # and the other one goes to the worker there that is answered first: 51 s.
    assert result["virtual_seconds"] == pytest.approx(51.0)
    assert result["pushes_per_worker"] == {"0": 26, "1": 25, "2": 49}
    # Of these two one computes at a time, for all of the 51 s.
    utilisation = result["utilisation_per_worker"]
    assert isinstance(utilisation, dict)
    assert utilisation == pytest.approx({"0": 26 / 51, "1": 25 / 51, "2": 49 / 51})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # One machine, and 10 s a ticket. Both are lost at 1 s, and computed from 2 s on, one after the other.
        (("runtime.leaves={0: 1.0, 1: 1.0}", "runtime.joins={0: 2.0, 1: 2.0}"), [(0, 12.0), (1, 22.0)]),
        # The machine goes on with the other one at 1 s.
        (("runtime.leaves={0: 1.0}",), [(1, 11.0), (1, 21.0)]),
        # Of three the second one is lost while it waits, and what waits behind it is next.
        (("worker.prefetch=2", "runtime.leaves={1: 1.0}"), [(0, 10.0), (2, 20.0)]),
        # The first one is lost: the others keep their order.
        (("worker.prefetch=2", "runtime.leaves={0: 4.0}"), [(1, 14.0), (2, 24.0)]),
        # The replies arrive at 3 s, when the first worker has left: the other one computes until 13 s.
        (("runtime.leaves={0: 1.0}", "runtime.latency_seconds=[3.0]"), [(1, 16.0), (1, 32.0)]),
        # It leaves when it is done and its push is under way: that is lost, and nothing moves.
        (("runtime.leaves={0: 14.0}", "runtime.latency_seconds=[3.0]"), [(1, 26.0), (1, 42.0)]),
    ],
)
def test_what_is_lost_when_a_worker_leaves_does_not_occupy_its_machine(
    options: tuple[str, ...], expected: list[tuple[int, float]], tmp_path: Path
) -> None:
    always = ("workers=1", "worker.prefetch=1", "runtime.compute_seconds=10.0", "train.max_iterations=2")
    simulated(tmp_path, *always, *options)
    found = [(event["worker"], event["seconds"]) for event in read_trace(tmp_path)[1] if event["event"] == "apply"]
    assert found == [(worker, pytest.approx(seconds)) for worker, seconds in expected]


def test_a_worker_that_leaves_has_computed_until_then_and_one_that_waited_has_not(tmp_path: Path) -> None:
    options = ("workers=2", "worker.prefetch=1", "heterogeneity=one_slow", "heterogeneity.factor=10", "train.max_iterations=40")
    result = simulated(tmp_path, *options, "runtime.leaves={1: 5.0, 3: 5.0}")
    # The slow machine computes for worker 1 from 0 to 10 s, and for worker 3 behind it. Those of the other one take turns.
    assert result["utilisation_per_worker"] == {"0": 0.5, "1": 1.0, "2": 0.5, "3": 0.0}


@pytest.mark.parametrize("older", [False, True], ids=["present checkpoint", "of an earlier version"])
def test_an_interrupted_simulation_with_prefetch_resumes_bit_for_bit(
    older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    if older:
        monkeypatch.setattr(checkpoint, "read", read_older)
    rest = simulated(tmp_path / "rest", *options, f"checkpoint.resume={half}")
    assert rest["final_params_sha256"] == whole["final_params_sha256"]
    assert rest["virtual_seconds"] == whole["virtual_seconds"]


def read_older(source: Path, name: str, read: Callable[[Path, str], dict[str, Any]] = checkpoint.read) -> dict[str, Any]:
    """Read a checkpoint of two machines with four workers as one that has the ends of computations only."""
    state = read(source, name)
    ends = {worker: begin + seconds for worker, (begin, seconds) in state["cluster"].pop("work").items()}
    machines = {machine: max(ends[machine], ends[machine + 2]) for machine in (0, 1)}
    state["cluster"] |= {"ends": ends, "computing_until": machines}
    return state


def test_a_simulation_with_joins_and_leaves_of_shared_machines_resumes_bit_for_bit(tmp_path: Path) -> None:
    events = ("runtime.leaves={0: 3.5, 3: 20.25}", "runtime.joins={4: 5.5, 0: 12.5}", "heterogeneity=gamma")
    options = ("workers=2", "worker.prefetch=1", "train.max_iterations=60", "runtime.latency_seconds=[0.3]", *events)
    whole = simulated(tmp_path / "whole", *options)
    simulated(tmp_path / "parts", *options, "checkpoint.every=6", "checkpoint.keep=20")
    parts = sorted((tmp_path / "parts" / "checkpoints").iterdir())
    assert len(parts) > 5
    for part in parts[:-1]:
        rest = simulated(tmp_path / f"from {part.name}", *options, f"checkpoint.resume={part}")
        for key in ("final_params_sha256", "virtual_seconds", "utilisation_per_worker"):
            assert rest[key] == whole[key], part


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
