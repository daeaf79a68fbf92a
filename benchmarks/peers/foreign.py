"""The command line and the line of JSON for peers in environments without torch; the same keys as in `common`."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """As `benchmarks.peers.common.Job`."""

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
    return Job(arguments.parameters, arguments.workers, arguments.seconds)


def report(
    name: str,
    job: Job,
    durations: list[float],
    cpu: float,
    server_bytes: int,
    worker_bytes: list[int],
    used: float | None = None,
) -> None:
    """Print the line.

    Args:
        name: The contender's.
        job: What was measured.
        durations: Of the round trips, in seconds.
        cpu: Seconds that the server has used of processors.
        server_bytes: Its peak memory.
        worker_bytes: Those of the workers.
        used: The time in which all that was done, where workers do not go from one round trip to the next without a pause.
    """
    durations, updates = sorted(durations), len(durations)
    used = used or sum(durations) / job.workers
    line = {
        "contender": name,
        "parameters": job.parameters,
        "workers": job.workers,
        "seconds": job.seconds,
        "updates_per_second": updates / used,
        "megabytes_per_second": 8 * job.parameters * updates / used / 1e6,
        "round_trip_median_seconds": statistics.median(durations),
        "round_trip_99_percent_seconds": durations[min(updates - 1, int(0.99 * updates))],
        "server_cpu_seconds_per_update": cpu / updates,
        "server_peak_bytes": server_bytes,
        "worker_peak_bytes": max(worker_bytes, default=0),
    }
    print(json.dumps(line), flush=True)


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
