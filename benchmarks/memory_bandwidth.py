"""How fast this machine moves memory: ``python -m benchmarks.memory_bandwidth``; the bound that other benchmarks refer to.

A copy reads and writes 4 D bytes (8 D), ``y <- a x + y`` reads 8 D and writes 4 D (12 D), a sum reads 4 D. Reading the lines
that a store is about to write over is not counted, so a store past the caches can beat the copy. Figures are the median, the
best and the worst round, in GB/s, in cache (256 KiB, 1 MB, 8 MB) and out of it (100 MB), by one thread and by two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ormo_rpc.storage.run_directory import environment

SIZES = (65_536, 272_474, 2_000_000, 25_000_000)
SECONDS = 0.05
"""How long one round of one operation takes, at least."""


def operations(dimension: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """By name, how many bytes an operation moves, and the operation."""
    x, y = torch.randn(dimension), torch.zeros(dimension)
    return {
        "copy": (8 * dimension, lambda: y.copy_(x)),
        "axpy": (12 * dimension, lambda: y.add_(x, alpha=1e-9)),
        "sum": (4 * dimension, x.sum),
    }


def measure(dimension: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Bytes per second of each operation in each round; the operations take turns."""
    torch.set_num_threads(threads)
    found = operations(dimension)
    rates: dict[str, list[float]] = {name: [] for name in found}
    repeats = {name: max(1, int(SECONDS / _seconds(function, 3))) for name, (_, function) in found.items()}
    for _ in range(rounds):
        for name, (moved, function) in found.items():
            rates[name].append(moved / _seconds(function, repeats[name]))
    return rates


def axpy_bandwidth(dimension: int, threads: int = 1, rounds: int = 5) -> float:
    """The best bytes per second of ``y <- a x + y`` at this size."""
    return max(measure(dimension, rounds, threads)["axpy"])


def _seconds(function: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began) / repeats


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    rows = [
        {
            "operation": name,
            "parameters": dimension,
            "threads": threads,
            "gigabytes_per_second": statistics.median(rates) / 1e9,
            "best": max(rates) / 1e9,
            "worst": min(rates) / 1e9,
        }
        for threads in arguments.threads
        for dimension in arguments.parameters
        for name, rates in measure(dimension, arguments.rounds, threads).items()
    ]
    if arguments.json:
        print(json.dumps({"environment": environment(), "rows": rows}, indent=2))
        return
    print(f"{'operation':<11}{'D':>12}{'threads':>9}{'GB/s: median':>14}{'best':>8}{'worst':>8}")
    for row in rows:
        print(
            f"{row['operation']:<11}{row['parameters']:>12,}{row['threads']:>9}{row['gigabytes_per_second']:>14.1f}"
            f"{row['best']:>8.1f}{row['worst']:>8.1f}"
        )


if __name__ == "__main__":
    main()
