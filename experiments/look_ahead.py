"""Compare look-aheads of ordered momentum on noisy quadratics: ``python -m experiments.look_ahead``.

``f(x) = 1/2 sum_j h_j x_j^2`` with the curvatures from 1 to 1/100, so that the optimum is known; a gradient is ``h_j x_j`` with
Gaussian noise of the standard deviation ``sigma sqrt(h_j)``, ``sigma`` growing as ``sqrt(K)``. K workers, beta = 0.9. Measured
is the virtual time, in units of an undisturbed gradient, until ``f`` is below 3% of that at the start, ``x_j = 1``: three
evaluations in a row on average, K / 4 gradients apart, and of synchronous rules, which have no parameters in between, one
evaluation at the end of a round. For each rule and setting, the learning rate is the one of a grid at which the mean time of
eight seeds is the shortest; the times of eight other seeds are reported. All rules are linear in the gradient, so that a run
carries all rates and seeds at once, as blocks of its parameters whose gradients are multiplied by the rate. Writes
``results/look_ahead.json`` and ``.md``.
"""

from __future__ import annotations

import heapq
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments import common
from experiments.look_aheads import TRIED
from ormo_rpc.algorithms import Algorithm
from ormo_rpc.algorithms.dana import DANA
from ormo_rpc.algorithms.ormo import OrMo
from ormo_rpc.algorithms.ormo_la import OrMoLA
from ormo_rpc.algorithms.smega2 import SMEGA2
from ormo_rpc.messages import Push
from ormo_rpc.report.table import as_markdown, spread
from ormo_rpc.seeding import generator
from ormo_rpc.server.build import build_server
from ormo_rpc.storage.environment import environment
from ormo_rpc.worker.heterogeneity import ExponentialDelays, Heterogeneity, NoHeterogeneity, OneSlow

CURVATURES = torch.logspace(0, -2, 24, dtype=torch.float64)
RATES = torch.logspace(-1.6, 0.4, 11, dtype=torch.float64)
"""Learning rates, times K: those of a synchronous round's mean gradient."""
SEEDS, TUNING_SEEDS = range(8), range(8, 16)
BUCKETS = 200
TARGET = 0.03
NOISES = {"quiet": 0.05, "noisy": 0.25}
"""``sigma / sqrt(K)``: the noise of a synchronous round's mean gradient, relative to the square root of the curvature."""
SETTINGS: Mapping[str, Heterogeneity] = {
    "none": NoHeterogeneity(),
    "one_slow": OneSlow(),
    "exponential": ExponentialDelays(),
}
PEERS: Mapping[str, tuple[Callable[[], Algorithm], str]] = {
    "heavy ball, sync": (OrMo, "sync"),
    "Nesterov, sync": (OrMoLA, "sync"),
    "ormo": (OrMo, "async"),
    "smega2": (SMEGA2, "async"),
    "dana": (DANA, "async"),
}
RULES = {**PEERS, **{name: (make, "async") for name, make in TRIED.items()}}
MEASURED: Mapping[int, Sequence[str]] = {4: tuple(SETTINGS), 16: tuple(SETTINGS), 64: ("exponential",)}
"""By K, the settings."""


def losses(
    make: Callable[[], Algorithm], scheduler: str, setting: str, workers: int, noise: float
) -> tuple[list[float], Tensor]:
    """Simulate: the times of the evaluations, and ``f`` relative to the start, shape (evaluations, rates, seeds)."""
    shape = (len(RATES), len(SEEDS) + len(TUNING_SEEDS), len(CURVATURES))
    start = torch.ones(shape, dtype=torch.float64)
    server = build_server(
        params=start.flatten(), num_workers=workers, algorithm=make(), scheduler=scheduler, lr=1 / workers, momentum=0.9
    )
    draws, times = generator(0, "quadratics", workers), generator(0, "times", workers)
    evaluated: list[float] = []
    values: list[Tensor] = []
    queue: list[tuple[float, int, Any]] = []

    def send(replies: Sequence[Any], now: float) -> None:
        for reply in replies:
            took = SETTINGS[setting].slowdown(reply.worker, workers, times)
            heapq.heappush(queue, (now + took, reply.ticket, reply))

    send(server.start(), 0.0)
    for t in range(BUCKETS * workers):
        now, _, reply = heapq.heappop(queue)
        drawn = torch.randn(shape[1:], generator=draws, dtype=torch.float64)  # the same for every rate
        x = reply.params.view(shape)
        grad = (CURVATURES * x + noise * (workers * CURVATURES).sqrt() * drawn) * RATES[:, None, None]
        grad = grad.nan_to_num(0.0, 0.0, 0.0).clamp(-1e50, 1e50)
        push = Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=grad.flatten())
        send(server.receive(push), now)
        if (t + 1) % (workers if scheduler == "sync" else max(1, workers // 4)) == 0:
            evaluated.append(now)
            values.append((server.params.view(shape).square() * CURVATURES).sum(-1) / CURVATURES.sum())
    return evaluated, torch.stack(values)


def times_to_target(evaluated: Sequence[float], values: Tensor, number: int) -> Tensor:
    """The times at which the mean of a number of evaluations was first below the target, infinite: never; (rates, seeds)."""
    smooth = values.unfold(0, number, 1).mean(-1) < TARGET
    first = smooth.to(torch.uint8).argmax(0)
    times = torch.tensor(evaluated, dtype=torch.float64)[first + number - 1]
    return times.where(smooth.any(0), math.inf)


def case(rule: str, setting: str, workers: int, noise: str) -> dict[str, Any]:
    """Tune one rule in one setting, and measure it."""
    make, scheduler = RULES[rule]
    number = 1 if scheduler == "sync" else 3
    times = times_to_target(*losses(make, scheduler, setting, workers, NOISES[noise]), number)
    tuning = times[:, len(SEEDS) :].mean(1)
    best = int(tuning.argmin())
    if best in (0, len(RATES) - 1) or not tuning[best].isfinite():
        sys.exit(
            f"{rule}, {setting}, K = {workers}, {noise}: got {RATES[best]:g} as the best rate, which reaches the target in "
            f"{tuning[best]:.3g}, expected a rate within the grid, from {RATES[0]:g} to {RATES[-1]:g}, and in finite time"
        )
    return {
        "rule": rule,
        "setting": setting,
        "workers": workers,
        "noise": noise,
        "rate": RATES[best].item(),
        "seconds": [each if math.isfinite(each) else None for each in times[best, : len(SEEDS)].tolist()],
    }


def table(rows: Sequence[Mapping[str, Any]], workers: int, noise: str) -> str:
    """The times of all rules in all settings, for one K and noise."""
    cells: list[tuple[str, ...]] = [("rule", *MEASURED[workers])]
    for rule in RULES:
        line = [rule]
        for setting in MEASURED[workers]:
            row = next(
                r for r in rows if (r["rule"], r["setting"], r["workers"], r["noise"]) == (rule, setting, workers, noise)
            )
            reached = [each for each in row["seconds"] if each is not None]
            missed = f", {len(row['seconds']) - len(reached)} never" if len(reached) < len(row["seconds"]) else ""
            line.append(f"{spread(reached, '.1f')}{missed} ({row['rate']:.2g})")
        cells.append(tuple(line))
    return as_markdown(cells)


def main() -> None:
    """Tune, run, and write the results."""
    into = common.folder(common.parser(__doc__).parse_args().into)
    cases = [(rule, s, k, noise) for k, settings in MEASURED.items() for noise in NOISES for s in settings for rule in RULES]
    rows = [case(*each) for each in tqdm(cases, unit=" runs")]
    machine = environment()
    parts = [
        f"## K = {workers}, {noise} (sigma = {NOISES[noise]:g} sqrt(K))\n\n{table(rows, workers, noise)}"
        for workers in MEASURED
        for noise in NOISES
    ]
    stated = (
        "`python -m experiments.look_ahead`: noisy quadratics of 24 parameters, condition 100, beta = 0.9; virtual time, in "
        "units of an undisturbed gradient, until the mean of three evaluations of the loss (of synchronous rules: one, at the "
        "end of a round) is below 3% of that at the start; mean and standard deviation over 8 seeds, in brackets the learning "
        f"rate times K, tuned for each with 8 other seeds. torch {machine['torch']}, float64."
    )
    (into / "look_ahead.json").write_text(json.dumps({"environment": machine, "target": TARGET, "rows": rows}, indent=1) + "\n")
    (into / "look_ahead.md").write_text(f"# Look-ahead on quadratics\n\n{stated}\n\n" + "\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
