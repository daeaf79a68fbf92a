"""Working ahead (``worker.prefetch``): to the server a process is then several workers, which compute one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

import ormo_rpc
from ormo_rpc.cli import compose
from ormo_rpc.errors import ConfigError
from ormo_rpc.options import parts
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
