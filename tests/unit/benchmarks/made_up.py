"""Samples, measurements and results that are made up."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks import throughput
from benchmarks.peers.measurement import Job, measurement


def sample(updates: int, **values: Any) -> throughput.Sample:
    zeros: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(throughput.Sample)), 0)
    return throughput.Sample(**{**zeros, "updates": updates, **values})


def measured(name: str, number: int, rate: float, **more: Any) -> dict[str, Any]:
    job = Job(parameters=1000, workers=1, seconds=1.0)
    return {**measurement(name, job, [1 / rate], 0.0, 2_000_000, [3_000_000]), "system": name, "round": number, **more}


def content(measurements: list[dict[str, Any]], failures: dict[str, str]) -> dict[str, Any]:
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cores": 2, "caches": {"L1": "32K", "L2": "1024K"}},
        "versions": {"torch": "2", "commit": "abc+changes"},
        "load_at_start": [0.5, 1.0, 1.5],
        "load_at_end": [2.5, 3.0, 3.5],
        "workers": 1,
        "seconds": 1.0,
        "rounds": 2,
        "measurements": measurements,
        "failures": failures,
    }
