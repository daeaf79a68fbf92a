"""What is measured, and the line of JSON that every contender prints; it knows no torch, which not every environment has."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is measured.

    Attributes:
        parameters: D, float32 values in the gradient and in the parameters.
        workers: K, processes that push.
        seconds: How long the clock runs.
    """

    parameters: int
    workers: int
    seconds: float


def job_from_command_line() -> Job:
    """The arguments that every contender takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, default=272_474, metavar="D")
    parser.add_argument("--workers", type=int, default=2, metavar="K")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    arguments = parser.parse_args()
    return Job(parameters=arguments.parameters, workers=arguments.workers, seconds=arguments.seconds)


def result(
    name: str,
    job: Job,
    durations: list[float],
    cpu_seconds: float | None,
    server_bytes: int | None,
    worker_bytes: list[int],
    used: float | None = None,
) -> dict[str, Any]:
    """The line of a contender.

    Args:
        name: The contender's.
        job: What was measured.
        durations: Of the round trips, in seconds.
        cpu_seconds: What the server has used of processors; None where that is not known.
        server_bytes: Its peak memory; None likewise.
        worker_bytes: Those of the workers.
        used: The time in which all that was done, where workers do not go from one round trip to the next without a pause.
    """
    durations = sorted(durations)
    updates = len(durations)
    # Each worker's last round trip may end after the time; the mean of what all have taken is the time that was used.
    used = used or (sum(durations) / job.workers if durations else job.seconds)
    return {
        "contender": name,
        "parameters": job.parameters,
        "workers": job.workers,
        "seconds": job.seconds,
        "updates_per_second": updates / used,
        "megabytes_per_second": 8 * job.parameters * updates / used / 1e6,
        "round_trip_median_seconds": statistics.median(durations) if durations else None,
        "round_trip_99_percent_seconds": durations[min(updates - 1, int(0.99 * updates))] if durations else None,
        "server_cpu_seconds_per_update": None if cpu_seconds is None or not updates else cpu_seconds / updates,
        "server_peak_bytes": server_bytes,
        "worker_peak_bytes": max(worker_bytes, default=None),
    }


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
