"""How long the server takes per gradient, in copies of the parameters: ``python -m benchmarks.server_step``.

Times are ratios to a copy of D float32 values (``torch.Tensor.copy_``) measured in the same run, interleaved, with the median
and the spread over the rounds. No network and no workers: this is the part that runs under the lock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from ormo_rpc import Push, build_server
from ormo_rpc.algorithms import NAMES
from ormo_rpc.storage.run_directory import environment


def server_step(algorithm: str, dimension: int) -> Callable[[], None]:
    """A function that pushes one gradient to a server of 4 workers and takes the reply, its snapshot included."""
    server = build_server(algorithm=algorithm, params=torch.zeros(dimension), num_workers=4, lr=1e-6)
    grad = torch.randn(dimension)
    replies = server.start()

    def step() -> None:
        reply = replies.pop(0)
        assert reply.ticket is not None
        replies.extend(server.receive(Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=grad)))

    return step


def copy(dimension: int) -> Callable[[], None]:
    """A function that copies D values into a buffer that exists already."""
    source, target = torch.randn(dimension), torch.zeros(dimension)

    def step() -> None:
        target.copy_(source)

    return step


def seconds(function: Callable[[], None], repeats: int) -> float:
    """Mean seconds of one call."""
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began) / repeats


def measure(dimension: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """One row per algorithm: how many copies its step costs."""
    contenders = {algorithm: server_step(algorithm, dimension) for algorithm in NAMES}
    baseline = copy(dimension)
    ratios: dict[str, list[float]] = {algorithm: [] for algorithm in contenders}
    for step in contenders.values():
        seconds(step, 4)
    for _ in tqdm(range(rounds), desc=f"D = {dimension:,}"):
        for algorithm, step in contenders.items():
            one_copy = seconds(baseline, repeats)
            ratios[algorithm].append(seconds(step, repeats) / one_copy)
    return [
        {
            "algorithm": algorithm,
            "dimension": dimension,
            "copies": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
        }
        for algorithm, found in ratios.items()
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, nargs="+", default=[272_474, 2_000_000], metavar="D")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for dimension in arguments.parameters for row in measure(dimension, arguments.rounds, 20)]
    if arguments.json:
        print(json.dumps({"environment": environment(), "rows": rows}, indent=2))
        return
    print(f"{'algorithm':<14}{'D':>12}{'copies per gradient: median':>30}{'lowest':>9}{'highest':>9}")
    for row in rows:
        print(f"{row['algorithm']:<14}{row['dimension']:>12,}{row['copies']:>30.1f}{row['lowest']:>9.1f}{row['highest']:>9.1f}")


if __name__ == "__main__":
    main()
