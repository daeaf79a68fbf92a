"""One measurement: what is computed from round trips, traces and samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, throughput
from benchmarks.peers.harness import shapes
from benchmarks.peers.measurement import Job, measurement
from ormo_rpc.models.resnet20 import ResNet20
from ormo_rpc.models.shortcut import Shortcut
from tests.unit.benchmarks.made_up import sample


def test_the_many_tensors_are_those_of_resnet20_and_keep_their_proportions() -> None:
    model = ResNet20(shortcut=Shortcut.projection).build((3, 32, 32), 10)
    assert sorted(shapes(272_474)) == sorted(parameter.numel() for parameter in model.parameters())
    larger = shapes(2 * 272_474)
    assert sum(larger) == 2 * 272_474
    assert larger == [2 * size for size in shapes(272_474)]
    assert sum(shapes(1_000_003)) == 1_000_003


def test_a_measurement_is_computed_from_round_trips() -> None:
    # Two workers; 6 round trips that took 3 s together, so the time was 1.5 s: 4 updates/s, each 8 * 1000 bytes both ways.
    job = Job(parameters=1000, workers=2, seconds=1.0)
    found = measurement("some", job, [0.25, 0.25, 0.5, 0.5, 0.5, 1.0], 0.6, 10, [20, 30])
    assert found["updates_per_second"] == pytest.approx(4.0)
    assert found["megabytes_per_second"] == pytest.approx(0.032)
    assert found["round_trip_median_seconds"] == 0.5
    assert found["round_trip_99_percent_seconds"] == 1.0
    assert found["server_cpu_seconds_per_update"] == pytest.approx(0.1)
    assert (found["server_peak_bytes"], found["worker_peak_bytes"]) == (10, 30)


def apply(iteration: int, worker: int, seconds: float, delay: int = 1) -> dict[str, Any]:
    return {"event": "apply", "iteration": iteration, "worker": worker, "seconds": seconds, "delay": delay}


def test_our_own_measurement_is_read_from_the_trace_and_the_samples(tmp_path: Path) -> None:
    # The time runs from 1 s to 3 s. Worker 0 pushes at 0.5 and then every half second to 3.5, worker 1 at 1.25 and 2.25: five
    # round trips that begin in time, 4 of half a second and one of a whole; 3 s of two workers, so 5 / 1.5 updates/s.
    times = sorted([(0.5 * n, 0) for n in range(1, 8)] + [(1.25, 1), (2.25, 1), (3.3, 1)])
    applied = [apply(n, worker, seconds) for n, (seconds, worker) in enumerate(times)]
    job = Job(parameters=1000, workers=2, seconds=2.0)
    sampler = throughput.Sampler(tmp_path)
    points = ((0, 9.0, 1), (2, 10.0, 2), (4, 10.2, 3), (6, 10.4, 4), (9, 99.0, 99))  # updates, CPU, bytes; the first applied in
    sampler.samples = [  # time is number 1, the last is number 6
        sample(n, cpu_seconds=cpu, workers_cpu_seconds=3 * cpu, server_bytes=size, worker_bytes=10 * size)
        for n, cpu, size in points
    ]
    summary = {"lock_wait_seconds": 0.1, "lock_held_seconds": 2.0, "step_seconds": 1.8}
    found = throughput.from_records(job, applied, sampler, summary)
    assert [event["seconds"] for event in applied[1:7]] == [1.0, 1.25, 1.5, 2.0, 2.25, 2.5]
    assert found["updates_per_second"] == pytest.approx(6 / ((4 * 0.5 + 1.0 + 1.05) / 2))
    assert found["round_trip_median_seconds"] == pytest.approx(0.5)
    assert found["server_cpu_seconds_per_update"] == pytest.approx(0.1)  # 0.4 s for 4 updates
    assert found["workers_cpu_seconds_per_update"] == pytest.approx(0.3)
    assert (found["server_peak_bytes"], found["worker_peak_bytes"]) == (4, 40)  # what the end of the run needs is left out
    assert found["lock_held_seconds_per_update"] == pytest.approx(0.2)  # 10 updates in all
    assert found["step_part_of_lock"] == pytest.approx(0.9)
    assert found["spread_of_workers"] == pytest.approx(1 / 3)  # 4 and 2: 1 off their mean of 3
    assert (found["delay_mean"], found["delay_99_percent"]) == (1, 1)


def test_too_short_a_measurement_says_so(tmp_path: Path) -> None:
    job = Job(parameters=1000, workers=2, seconds=2.0)
    with pytest.raises(ValueError, match=r"^got 1 updates in 2 s, expected two of one worker; measure for longer$"):
        throughput.from_records(job, [apply(0, 0, 1.5)], throughput.Sampler(tmp_path), {})


def test_only_overrides_that_differ_from_their_defaults_are_given() -> None:
    job = Job(parameters=1000, workers=2, seconds=1.0)
    assert not [each for each in throughput.overrides(job) if each.startswith(("transport", "wire."))]
    assert [each for each in throughput.overrides(job, "rpc", "bf16") if each.startswith(("transport", "wire."))] == [
        "transport=rpc",
        "wire.dtype=bf16",
        "wire.params=bf16",
    ]


def test_the_machine_is_described(tmp_path: Path) -> None:
    for number, (kind, level, size) in enumerate((("Data", "1", "32K"), ("Instruction", "1", "64K"), ("Unified", "2", "1M"))):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(value + "\n")
    assert machine.caches(tmp_path) == {"L1": "32K", "L2": "1M"}
    assert machine.machine()["cores"] == os.cpu_count()
    package = tmp_path / "lib" / "python3" / "site-packages" / "ray-2.1.0.dist-info"
    package.mkdir(parents=True)
    found = machine.versions({"ray": tmp_path, "tensorflow": tmp_path / "nowhere"})
    assert found["ray"] == "2.1.0"
    assert "tensorflow" not in found
