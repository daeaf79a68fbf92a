"""Measure memory bandwidth, and what OrMo's fused step reaches of it: ``python -m benchmarks.memory_bandwidth``.

A copy reads and writes 4 D bytes (8 D), ``y <- a x + y`` reads 8 D and writes 4 D (12 D), a sum reads 4 D. OrMo's step has to
move at least 20 D bytes: it reads gradient, momentum and parameters, and writes momentum and the new parameters, which are the
snapshot; it is measured with a shift in every step, as with one worker, into vectors of the server's pool. The cache lines that
an ordinary store reads before it overwrites them are not counted, so a store past the caches can beat the copy. Figures are
GB/s of a single operation, which take turns: median, best and worst round, in cache (256 KiB, 1 MB, 8 MB) and out of it (100
MB), by one thread and by two.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measuring import parser, seconds_per_call, show
from ormo_rpc.kernels.compiled import compiled_steps
from ormo_rpc.kernels.kernel import Kernel
from ormo_rpc.kernels.pool import pooled
from ormo_rpc.kernels.steps import OrMoStep, Steps, TorchSteps
from ormo_rpc.kernels.threads import Threaded

SIZES = (65_536, 272_474, 2_000_000, 25_000_000)
SECONDS = 0.05
"""Least time of one operation in one round."""
STEP = OrMoStep(scale=1.0, shifts=1, beta=0.9, u_scale=1e-9, w_scale=1.9e-9)


def ormo_step(steps: Steps, dimension: int) -> Callable[[], None]:
    """A step out of place, from one vector of a pool into another one, as the server takes it."""
    kernel = Kernel(steps=steps, empty=pooled())
    grad, u = torch.randn(dimension), torch.zeros(dimension)
    params = [torch.zeros(dimension)]

    def step() -> None:
        params[0] = kernel.apply(STEP, grad, params[0], u)

    return step


def operations(dimension: int, threads: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """The bytes that an operation moves, and the operation, by name."""
    x, y = torch.randn(dimension), torch.zeros(dimension)
    found: dict[str, tuple[int, Callable[[], Any]]] = {
        "copy": (8 * dimension, lambda: y.copy_(x)),
        "axpy": (12 * dimension, lambda: y.add_(x, alpha=1e-9)),
        "sum": (4 * dimension, x.sum),
        "OrMo step, torch": (20 * dimension, ormo_step(TorchSteps(), dimension)),
    }
    if (compiled := compiled_steps()) is not None:
        found["OrMo step, compiled"] = (20 * dimension, ormo_step(Threaded(compiled, threads), dimension))
    return found


def measure(dimension: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Bytes per second of each operation in each round; the operations take turns."""
    torch.set_num_threads(threads)
    found = operations(dimension, threads)
    rates: dict[str, list[float]] = {name: [] for name in found}
    repeats = {name: max(1, int(SECONDS / seconds_per_call(function, 3))) for name, (_, function) in found.items()}
    for _ in range(rounds):
        for name, (moved, function) in found.items():
            rates[name].append(moved / seconds_per_call(function, repeats[name]))
    return rates


def main() -> None:
    """Run the command line."""
    arguments = parser(__doc__, SIZES)
    arguments.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    given = arguments.parse_args()
    rows = [
        {
            "operation": name,
            "parameters": dimension,
            "threads": threads,
            "gigabytes_per_second": statistics.median(rates) / 1e9,
            "best": max(rates) / 1e9,
            "worst": min(rates) / 1e9,
        }
        for threads in given.threads
        for dimension in given.parameters
        for name, rates in measure(dimension, given.rounds, threads).items()
    ]
    show(rows, given)


if __name__ == "__main__":
    main()
