"""What the throughput benchmark computes from its measurements; the measuring itself is no test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import side_by_side, throughput
from benchmarks.peers.common import Job, result, shapes
from ormo_rpc.models.resnet20 import ResNet20, Shortcut


def test_the_many_tensors_are_those_of_resnet20_and_keep_their_proportions() -> None:
    model = ResNet20(3, 10, Shortcut.projection)
    assert sorted(shapes(272_474)) == sorted(parameter.numel() for parameter in model.parameters())
    larger = shapes(2 * 272_474)
    assert sum(larger) == 2 * 272_474
    assert larger == [2 * size for size in shapes(272_474)]
    assert sum(shapes(1_000_003)) == 1_000_003


def test_the_line_of_a_contender() -> None:
    # Two workers; 6 round trips that took 3 s together, so the clock ran for 1.5 s: 4 updates/s, each 8 * 1000 bytes both ways.
    job = Job(parameters=1000, workers=2, seconds=1.0)
    line = result("some", job, [0.25, 0.25, 0.5, 0.5, 0.5, 1.0], 0.6, 10, [20, 30])
    assert line["updates_per_second"] == pytest.approx(4.0)
    assert line["megabytes_per_second"] == pytest.approx(0.032)
    assert line["round_trip_median_seconds"] == 0.5
    assert line["round_trip_99_percent_seconds"] == 1.0
    assert line["server_cpu_seconds_per_update"] == pytest.approx(0.1)
    assert (line["server_peak_bytes"], line["worker_peak_bytes"]) == (10, 30)


def line(contender: str, number: int, rate: float) -> dict[str, Any]:
    job = Job(parameters=1000, workers=1, seconds=1.0)
    return {**result(contender, job, [1 / rate], 0.0, 2_000_000, [3_000_000]), "contender": contender, "round": number}


def test_ratios_are_taken_within_a_round_and_files_are_written(tmp_path: Path) -> None:
    # The machine was twice as slow in the second round: 2 and 1 of raw sockets' 1, not 20 and 5 of their median 7.5.
    lines = [line("raw_sockets", 0, 10), line("ours", 0, 20), line("raw_sockets", 1, 5), line("ours", 1, 5)]
    content: dict[str, Any] = {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"processors": 2},
        "environment": {"torch": "2"},
        "workers": 1,
        "seconds": 1.0,
        "rounds": 2,
        "lines": lines,
        "failures": {"ray": "not installed: make bench-ray"},
    }
    header, sockets, ours = side_by_side.rows(content)
    assert len(header) == len(sockets) == len(ours)
    assert sockets[:5] == ("1,000", "raw_sockets", "7.5", "5.0 - 10.0", "1.00")
    assert ours[:5] == ("1,000", "ours", "12.5", "5.0 - 20.0", "1.50")
    stem = side_by_side.write(content, tmp_path)
    assert stem.name == "throughput-2026-01-02-K1"
    assert "* ray: not installed: make bench-ray" in stem.with_suffix(".md").read_text()
    assert stem.with_suffix(".png").stat().st_size > 1000


def test_a_contender_that_is_not_installed_says_how_to(tmp_path: Path) -> None:
    ray = side_by_side.CONTENDERS["ray"]
    missing = side_by_side.Contender(name=ray.name, module=ray.module, interpreter=tmp_path / "python")
    assert side_by_side.run(missing, 1000, 1, 1.0) == "not installed: make bench-ray"


def test_only_options_that_differ_from_their_defaults_are_given() -> None:
    job = Job(parameters=1000, workers=2, seconds=1.0)
    assert not [option for option in throughput.overrides(job, "auto", "float32") if option.startswith("wire.")]
    assert [option for option in throughput.overrides(job, "uv", "bf16") if option.startswith("wire.")] == [
        "wire.transport=uv",
        "wire.dtype=bf16",
    ]
