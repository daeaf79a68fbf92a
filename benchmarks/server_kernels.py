"""The server's step of OrMo with its snapshot, before and after: ``python -m benchmarks.server_kernels``.

Three servers take turns, each with 4 workers that answer one after the other: the algorithm as it was, which updates its
parameters in place, so that each reply needs a fresh copy; and the algorithm as it is, with torch's steps and with the compiled
ones. Measured is the part under the lock, `ParameterServer.commit`: apply, and the reply with its snapshot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ormo_rpc import ParameterServer, Push, Reply, build_server
from ormo_rpc.algorithms import PushContext
from ormo_rpc.algorithms.ormo import OrMo
from ormo_rpc.kernels.compiled import compiled_steps
from ormo_rpc.kernels.kernel import Kernel
from ormo_rpc.kernels.pool import pooled
from ormo_rpc.server.validation import ValidatedPush
from ormo_rpc.storage.run_directory import environment

SIZES = (272_474, 2_000_000, 25_000_000)
WORKERS = 4


class InPlace(OrMo):
    """OrMo with operations over whole vectors, in place: as it was."""

    OUT_OF_PLACE = False

    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:
        """Shift the momentum to the newest bucket, then add the gradient at its place."""
        while self.index < context.newest_bucket:
            self.params.sub_(self.u, alpha=self.momentum)
            self.u.mul_(self.momentum)
            self.index += 1
        exponent = self.index - context.bucket
        self.u.add_(grad, alpha=self.momentum**exponent * lr)
        self.params.sub_(grad, alpha=self._reach(exponent) * lr)


class Contender:
    """A server and the replies that its workers hold."""

    def __init__(self, server: ParameterServer, grad: Tensor) -> None:
        self.server = server
        self.checked = ValidatedPush(grad, 0.0)
        self.replies: list[Reply] = server.start()

    def seconds(self, repeats: int) -> float:
        """Mean seconds of a push."""
        began = time.perf_counter()
        for _ in range(repeats):
            reply = self.replies.pop(0)
            assert reply.ticket is not None
            push = Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=self.checked.grad)
            del reply
            self.replies += self.server.commit(push, self.checked)
        return (time.perf_counter() - began) / repeats


def contenders(dimension: int) -> dict[str, Contender]:
    """By name; all have the same gradient."""
    grad = torch.randn(dimension)
    steps = compiled_steps()
    assert steps is not None, "no C compiler"
    kernels = {
        "in place, copy": Kernel(),
        "out of place, torch": Kernel(empty=pooled()),
        "out of place, compiled": Kernel(name="compiled", steps=steps, empty=pooled()),
    }
    found: dict[str, Contender] = {}
    for name, kernel in kernels.items():
        server = build_server(params=torch.zeros(dimension), num_workers=WORKERS, lr=1e-6, kernel=kernel)
        if name.startswith("in place"):
            server.algorithm = InPlace(torch.zeros(dimension), momentum=0.9, options=server.algorithm.options)
        found[name] = Contender(server, grad)
    return found


def measure(dimension: int, rounds: int) -> list[dict[str, Any]]:
    """One row per contender; the ratio is the median of those within single rounds."""
    them, repeats = contenders(dimension), max(2 * WORKERS, 20_000_000 // dimension)
    found: dict[str, list[float]] = {name: [] for name in them}
    for contender in them.values():
        contender.seconds(2 * WORKERS)
    for _ in tqdm(range(rounds), desc=f"D = {dimension:,}"):
        for name, contender in them.items():
            found[name].append(contender.seconds(repeats))
    first = next(iter(found.values()))
    rows: list[dict[str, Any]] = []
    for name, seconds in found.items():
        ratios = [before / after for before, after in zip(first, seconds, strict=True)]
        rows.append(
            {
                "server": name,
                "parameters": dimension,
                "milliseconds": statistics.median(seconds) * 1e3,
                "times_faster": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for dimension in arguments.parameters for row in measure(dimension, arguments.rounds)]
    if arguments.json:
        print(json.dumps({"environment": environment(), "rows": rows}, indent=2))
        return
    print(f"{'server':<24}{'D':>12}{'ms':>10}{'times faster':>14}{'lowest':>8}{'highest':>9}")
    for row in rows:
        print(
            f"{row['server']:<24}{row['parameters']:>12,}{row['milliseconds']:>10.3f}"
            f"{row['times_faster']:>14.2f}{row['lowest']:>8.2f}{row['highest']:>9.2f}"
        )


if __name__ == "__main__":
    main()
