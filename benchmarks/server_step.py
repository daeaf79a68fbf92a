"""Measure the server's time per gradient in copies of the parameters: ``python -m benchmarks.server_step``.

Times are ratios to a copy of D float32 values (``torch.Tensor.copy_``) within the same round: median, lowest and highest. No
network and no workers: check, step and snapshot of every algorithm, most of which runs under the server's lock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measuring import parser, seconds_per_call, show
from ormo_rpc import Push, build_server
from ormo_rpc.options import parts

SIZES = (272_474, 2_000_000)
REPEATS = 20
"""Calls for each time."""


def server_step(algorithm: str, dimension: int) -> Callable[[], None]:
    """Make a server of 4 workers: a function that pushes one gradient and takes the reply, its snapshot included."""
    server = build_server(algorithm=algorithm, params=torch.zeros(dimension), num_workers=4, lr=1e-6)
    grad = torch.randn(server.algorithm.VECTORS_PUSHED * dimension)
    replies = server.start()

    def step() -> None:
        reply = replies.pop(0)
        assert reply.ticket is not None
        replies.extend(server.receive(Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=grad)))

    return step


def copy(dimension: int) -> Callable[[], None]:
    """A function that copies D values into an existing buffer."""
    source, target = torch.randn(dimension), torch.zeros(dimension)

    def step() -> None:
        target.copy_(source)

    return step


def measure(dimension: int, rounds: int, algorithms: list[str]) -> list[dict[str, Any]]:
    """One row for each algorithm; they take turns."""
    steps = {algorithm: server_step(algorithm, dimension) for algorithm in algorithms}
    baseline = copy(dimension)
    ratios: dict[str, list[float]] = {algorithm: [] for algorithm in steps}
    for step in steps.values():
        seconds_per_call(step, 4)  # every worker's snapshot exists from then on
    for _ in tqdm(range(rounds), desc=f"D = {dimension:,}"):
        for algorithm, step in steps.items():
            one_copy = seconds_per_call(baseline, REPEATS)
            ratios[algorithm].append(seconds_per_call(step, REPEATS) / one_copy)
    return [
        {
            "algorithm": algorithm,
            "parameters": dimension,
            "copies": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
        }
        for algorithm, found in ratios.items()
    ]


def main() -> None:
    """Run the command line."""
    arguments = parser(__doc__, SIZES)
    arguments.add_argument(
        "--algorithms", nargs="+", choices=parts("algorithm"), default=list(parts("algorithm")), metavar="NAME"
    )
    given = arguments.parse_args()
    torch.set_num_threads(1)
    show([row for dimension in given.parameters for row in measure(dimension, given.rounds, given.algorithms)], given)


if __name__ == "__main__":
    main()
