"""OrMo's step with its snapshot, in every way that was tried: ``python -m benchmarks.one_pass``.

The least that a step must move is 20 D bytes of float32: it reads gradient, momentum and parameters, and writes momentum
and the new parameters, which are the snapshot. Times are ratios to what those bytes take at the bandwidth of
``y <- a x + y``, measured in the same rounds, with the same number of threads and on vectors of the same size. The momentum
is shifted in every step, as with one worker; with K workers, in one of K.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ormo_rpc.kernels.compiled import compiled_steps
from ormo_rpc.kernels.pool import Pool
from ormo_rpc.kernels.steps import CHUNK, OrMoStep, Steps, TorchSteps
from ormo_rpc.kernels.threads import Threaded
from ormo_rpc.storage.run_directory import environment

BETA, INTO_U, INTO_W = 0.9, 1e-9, 1.9e-9
SIZES = (272_474, 2_000_000, 25_000_000)
MOVED = 20
"""Bytes per parameter, at least."""

Step = Callable[[], Any]


def in_place(dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, momentum, parameters."""
    return torch.randn(dimension), torch.zeros(dimension), torch.randn(dimension)


def apply(grad: Tensor, u: Tensor, w: Tensor) -> None:
    """The algorithm's own operations."""
    w.sub_(u, alpha=BETA)
    u.mul_(BETA)
    u.add_(grad, alpha=INTO_U)
    w.sub_(grad, alpha=INTO_W)


def whole(dimension: int) -> Step:
    """Operations over the whole vectors, then a fresh copy: as the server did it at first."""
    grad, u, w = in_place(dimension)
    held: list[Tensor] = []

    def step() -> None:
        apply(grad, u, w)
        held[:] = [w.clone()]

    return step


def whole_reused(dimension: int) -> Step:
    """The same, with the copy into a buffer that exists already."""
    grad, u, w = in_place(dimension)
    out = torch.zeros(dimension)

    def step() -> None:
        apply(grad, u, w)
        out.copy_(w)

    return step


def foreach(dimension: int) -> Step:
    """The same with torch._foreach over chunks; each operation still goes over everything."""
    grad, u, w = (list(vector.split(CHUNK)) for vector in in_place(dimension))
    out = list(torch.zeros(dimension).split(CHUNK))

    each: Any = torch  # the functions begin with an underscore, but torch documents them

    def step() -> None:
        each._foreach_add_(w, u, alpha=-BETA)
        each._foreach_mul_(u, BETA)
        each._foreach_add_(u, grad, alpha=INTO_U)
        each._foreach_add_(w, grad, alpha=-INTO_W)
        each._foreach_copy_(out, w)

    return step


def in_y(dimension: int) -> Step:
    """The (y, u) form in chunks: a shift costs nothing for the parameters, but the snapshot is a third vector to write."""
    grad, u, y = in_place(dimension)
    out = torch.zeros(dimension)
    pieces = list(zip(*(vector.split(CHUNK) for vector in (grad, u, y, out)), strict=True))

    def step() -> None:
        for grad_c, u_c, y_c, out_c in pieces:
            u_c.mul_(BETA).add_(grad_c, alpha=INTO_U)
            y_c.sub_(grad_c, alpha=INTO_U / (1 - BETA))
            torch.add(y_c, u_c, alpha=BETA / (1 - BETA), out=out_c)

    return step


def inductor(dimension: int) -> Step:
    """torch.compile of the step out of place, with its outputs copied nowhere: new vectors each time."""
    grad, u, w = in_place(dimension)

    @torch.compile(dynamic=False)
    def compiled(grad: Tensor, u: Tensor, w: Tensor, out: Tensor) -> None:
        out.copy_(w - BETA * u - INTO_W * grad)
        u.copy_(BETA * u + INTO_U * grad)

    buffers = [w, torch.zeros(dimension)]

    def step() -> None:
        compiled(grad, u, buffers[0], buffers[1])
        buffers.reverse()

    return step


def one_pass(make: Callable[[], Steps], *, pooled: bool) -> Callable[[int], Step]:
    """An ordered step out of place: into vectors from a pool on huge pages, or into two that take turns."""

    def contender(dimension: int) -> Step:
        steps = make()
        pool = Pool(dimension, torch.float32)
        grad, u, w = in_place(dimension)
        if pooled:
            u = pool.take().zero_()
        buffers = [pool.take().copy_(w) if pooled else w, torch.zeros(0 if pooled else dimension)]

        def step() -> None:
            old, out = buffers[0], pool.take() if pooled else buffers[1]
            steps(OrMoStep(scale=1.0, shifts=1, beta=BETA, u_scale=INTO_U, w_scale=INTO_W), grad, u, old, out)
            buffers[:] = [out, old]

        return step

    return contender


def c_steps() -> Steps:
    """The steps in C."""
    steps = compiled_steps()
    assert steps is not None, "no C compiler"
    return steps


def contenders(threads: int, everything: bool) -> dict[str, Callable[[int], Step]]:
    """By name, what makes a step for D parameters."""
    found: dict[str, Callable[[int], Step]] = {
        "whole vectors, fresh snapshot": whole,
        "whole vectors, buffer": whole_reused,
        "foreach": foreach,
        "chunks, (y, u)": in_y,
        "chunks, (w, u), out of place": one_pass(lambda: Threaded(TorchSteps(), threads), pooled=False),
        "C, small pages": one_pass(lambda: Threaded(c_steps(), threads), pooled=False),
        "C, pool on huge pages": one_pass(lambda: Threaded(c_steps(), threads), pooled=True),
    }
    if everything:
        found["torch.compile"] = inductor
    return found


def axpy(dimension: int) -> Step:
    """The bound."""
    x, y = torch.randn(dimension), torch.zeros(dimension)
    return lambda: y.add_(x, alpha=1e-9)


def measure(dimension: int, threads: int, rounds: int, everything: bool) -> list[dict[str, Any]]:
    """One row per contender; they take turns, each round with the bound beside it."""
    # Ours divide a vector by themselves; torch's threads are for the operations over whole vectors.
    torch.set_num_threads(threads)
    steps = {name: make(dimension) for name, make in contenders(threads, everything).items()}
    bound, found = axpy(dimension), {name: list[float]() for name in steps}
    bounds: list[float] = []
    repeats = max(1, 2_000_000 // dimension)
    for step in steps.values():
        _seconds(step, 2)
    for _ in tqdm(range(rounds), desc=f"D = {dimension:,}, {threads} threads"):
        for name, step in steps.items():
            ours = "chunks, (w" in name or name.startswith("C")
            torch.set_num_threads(1 if ours else threads)
            found[name].append(_seconds(step, repeats))
        torch.set_num_threads(threads)
        bounds.append(_seconds(bound, repeats))
    least = statistics.median(bounds) * MOVED / 12
    return [
        {
            "step": name,
            "parameters": dimension,
            "threads": threads,
            "milliseconds": statistics.median(seconds) * 1e3,
            "bound_milliseconds": least * 1e3,
            "ratio": statistics.median(seconds) / least,
            "lowest": min(seconds) / least,
            "highest": max(seconds) / least,
        }
        for name, seconds in found.items()
    ]


def _seconds(function: Step, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began) / repeats


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes its time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    rows = [
        row
        for threads in arguments.threads
        for dimension in arguments.parameters
        for row in measure(dimension, threads, arguments.rounds, arguments.compile)
    ]
    if arguments.json:
        print(json.dumps({"environment": environment(), "rows": rows}, indent=2))
        return
    print(f"{'step':<32}{'D':>12}{'threads':>9}{'ms':>10}{'bound, ms':>11}{'ratio':>8}{'lowest':>8}{'highest':>9}")
    for row in rows:
        print(
            f"{row['step']:<32}{row['parameters']:>12,}{row['threads']:>9}{row['milliseconds']:>10.3f}"
            f"{row['bound_milliseconds']:>11.3f}{row['ratio']:>8.2f}{row['lowest']:>8.2f}{row['highest']:>9.2f}"
        )


if __name__ == "__main__":
    main()
