"""Measure the processor time of a live run that waits: ``python -m benchmarks.idle``.

All workers have joined and their data paths are open, but ``runtime.min_workers`` asks for one more, so that the server
issues no ticket. Prints the cores that each process takes meanwhile; a process that waits as it should takes 0.00. Exits with
status 1 if one takes ``--most`` or more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from benchmarks.machine import load
from benchmarks.measuring import ROOT
from benchmarks.peers.measurement import Job, cpu_seconds
from benchmarks.throughput import overrides
from ormo_rpc import train
from ormo_rpc.report.table import as_markdown

WORKERS = 2
CASES = (
    ("transport=shm",),
    ("transport=gloo",),
    ("transport=rpc",),
    ("transport=shm", "runtime.control=socket"),
    ("transport=tcp",),
)
"""Overrides of each run."""
SETTLE_SECONDS = 3.0
"""From the last join to the measurement."""
START_SECONDS = 120.0


def measure(case: tuple[str, ...], seconds: float) -> dict[str, float]:
    """The cores that each process of a waiting run takes."""
    job = Job(parameters=1_000_000, workers=WORKERS, seconds=seconds + 2 * SETTLE_SECONDS)
    with tempfile.TemporaryDirectory(prefix="idle_") as folder, ThreadPoolExecutor(1) as pool:
        run_dir = Path(folder) / "run"
        found = pool.submit(_watch, run_dir, seconds)
        train([*overrides(job), f"runtime.min_workers={WORKERS + 1}", *case], run_dir=run_dir)
        return found.result()


def _watch(run_dir: Path, seconds: float) -> dict[str, float]:
    """Measure the processes of a run once all have joined.

    Raises:
        TimeoutError: they have not.
    """
    deadline = time.monotonic() + START_SECONDS
    while not (pids := _pids(run_dir)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"got no run after {START_SECONDS:g} s, expected {WORKERS} workers")
        time.sleep(0.1)
    time.sleep(SETTLE_SECONDS)
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    began, before = time.monotonic(), {name: cpu_seconds(process) for name, process in processes.items()}
    time.sleep(seconds)
    elapsed = time.monotonic() - began
    return {name: (cpu_seconds(process) - before[name]) / elapsed for name, process in processes.items()}


def _pids(run_dir: Path) -> dict[str, int]:
    """The processes of a run whose workers have all joined; empty before that."""
    try:
        found = json.loads((run_dir / "processes.json").read_text())
    except (OSError, ValueError):
        return {}
    if len(found["workers"]) < WORKERS:
        return {}
    workers = {f"worker {number}": pid for number, pid in found["workers"].items()}
    return {"launcher": os.getpid(), "server": found["server"], **workers}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S")
    parser.add_argument("--most", type=float, default=0.01, help="cores that a process may take (%(default)s)")
    parser.add_argument("--case", nargs="+", action="append", metavar="KEY=VALUE", help="overrides of one run")
    a = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    rows: list[tuple[str, ...]] = []
    busy: list[str] = []
    for case in a.case or CASES:
        found = measure(tuple(case), a.seconds)
        rows = rows or [("run", *(f"{name}, cores" for name in found))]
        rows.append((" ".join(case), *(f"{cores:.4f}" for cores in found.values())))
        busy += [f"{name} of {' '.join(case)}" for name, cores in found.items() if cores >= a.most]
        print(f"{' '.join(case)}: {found}", flush=True)
    print(f"\nload {load()}\n\n{as_markdown(rows)}")
    if busy:
        sys.exit(f"idle: {a.most:g} of a core or more: {', '.join(busy)}")


if __name__ == "__main__":
    main()
