"""The job that is measured, and the measurement that every system prints; imports neither torch nor our package.

(Ray and TensorFlow run in environments of their own, which have neither.)
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True, kw_only=True)
class Job:
    """The size and length of a measurement.

    Attributes:
        parameters: D, float32 values in the gradient and in the parameters.
        workers: K, processes that push.
        seconds: Time that is measured.
    """

    parameters: int
    workers: int
    seconds: float


def job_from_command_line() -> Job:
    """Parse the arguments that every system takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, default=272_474, metavar="D")
    parser.add_argument("--workers", type=int, default=2, metavar="K")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    arguments = parser.parse_args()
    return Job(parameters=arguments.parameters, workers=arguments.workers, seconds=arguments.seconds)


def measurement(
    system: str,
    job: Job,
    durations: list[float],
    cpu_seconds: float | None,
    server_bytes: int | None,
    worker_bytes: list[int],
    elapsed: float | None = None,
) -> dict[str, Any]:
    """The measurement of a system.

    Args:
        system: Its name.
        job: What was measured.
        durations: Seconds of each round trip, of all workers.
        cpu_seconds: Processor time of the server; None if it is not known.
        server_bytes: Its peak memory; None if it is not known.
        worker_bytes: Peak memory of each worker.
        elapsed: Seconds in which all round trips were done; by default the mean over the workers of the sum of theirs, since
            each goes from one round trip to the next without a pause.
    """
    durations = sorted(durations)
    updates = len(durations)
    # A worker's last round trip may end after the time, hence not job.seconds.
    elapsed = elapsed or (sum(durations) / job.workers if durations else job.seconds)
    return {
        "system": system,
        "parameters": job.parameters,
        "workers": job.workers,
        "seconds": job.seconds,
        "updates_per_second": updates / elapsed,
        "megabytes_per_second": 8 * job.parameters * updates / elapsed / 1e6,
        "round_trip_median_seconds": statistics.median(durations) if durations else None,
        "round_trip_99_percent_seconds": durations[min(updates - 1, int(0.99 * updates))] if durations else None,
        "server_cpu_seconds_per_update": None if cpu_seconds is None or not updates else cpu_seconds / updates,
        "server_peak_bytes": server_bytes,
        "worker_peak_bytes": max(worker_bytes, default=None),
    }


def peak_bytes(pid: int) -> int:
    """The peak memory of a process so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(process: psutil.Process) -> float:
    """The processor time of a process so far."""
    times = process.cpu_times()
    return times.user + times.system
