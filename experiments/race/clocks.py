"""Times of synchronous rounds, and the closed forms of what speeds alone allow.

Closed forms, in units of the time that nothing slows down, with ``f_k`` the slowdown of worker k of K. Without barriers a
gradient takes ``1 / sum_k 1/E f_k``; in rounds of all workers it takes ``E max_k f_k / K``; in rounds of the first m, where the
others' work is cancelled, ``E f_(m) / m`` with the m-th smallest of K. So asynchrony can need this fraction of DDP's time:

* ``one_slow`` (10 times): ``K / (10 (K - 1 + 1/10))``, 0.129 for K = 4 and 0.106 for K = 16; against the K - 1 fast ones
  ``(K - 1) / (K - 1 + 1/10)``, 0.968 and 0.993.
* ``exponential`` (``1 + X``, ``X`` of mean 1): ``E f = 2``, ``E f_(m) = 1 + H_K - H_(K-m)`` with harmonic numbers ``H_n``,
  so ``2 / (1 + H_K)``: 0.649 for K = 4, 0.457 for K = 16. Against the best m (3 of 4, 11 of 16): 0.720 and 0.656.
* ``half_slow`` (3 times): ``K / (3 (K/2 + K/6)) = 1/2``; against the fast half ``(K/2) / (K/2 + K/6) = 3/4``.
* ``none``: 1.
* ``gamma`` (``1 + X``, ``X`` gamma of mean 1 and shape 4): ``E f = 2``; ``E f_(m)`` by integration.

They are limits of speed, at equal use of every gradient. A rule that gets more, or less, out of a gradient than DDP beats them,
or misses them.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from ormo_rpc.worker.heterogeneity import shares_of

Draw = Callable[[int], float]
"""``draw(worker)``: the virtual seconds of the worker's next gradient."""


class Clock(Protocol):
    """The ends of synchronous rounds."""

    def __call__(self, draw: Draw, workers: int, rounds: int) -> list[float]:
        """Return the virtual seconds at which each of the first rounds ends."""
        ...


def first(m: int, *, cancel: bool) -> Clock:
    """Rounds that end with the first m gradients taken at the present parameters; all of K, where m is K.

    Args:
        m: Gradients in a round, each of another worker.
        cancel: The others begin anew with the round; otherwise they first finish what nobody needs.
    """

    def ends(draw: Draw, workers: int, rounds: int) -> list[float]:
        found: list[float] = []
        count, here, waiting = workers, 0, list[int]()
        queue = [(draw(worker), worker, worker, 0) for worker in range(workers)]
        heapq.heapify(queue)
        while len(found) < rounds:
            now, _, worker, begun = heapq.heappop(queue)
            if begun == here:
                waiting.append(worker)
                if len(waiting) < m:
                    continue
                found.append(now)
                here += 1
                again, waiting = waiting, []
                if cancel:
                    again += [each for _, _, each, _ in queue]
                    queue.clear()
            else:
                again = [worker]
            for each in again:
                heapq.heappush(queue, (now + draw(each), count, each, here))
                count += 1
        return found

    return ends


def proportional(means: Sequence[float], batch: int) -> Clock:
    """Rounds of all workers, each with samples in proportion to its lasting speed, as ``runtime.shares=proportional`` has them.

    Args:
        means: The mean slowdown of each worker.
        batch: The samples of one gradient; a round has as many for each worker, on average.
    """
    shares = [samples / batch for samples in shares_of(batch * len(means), means)]

    def ends(draw: Draw, workers: int, rounds: int) -> list[float]:
        now, found = 0.0, list[float]()
        for _ in range(rounds):
            now += max(draw(worker) * shares[worker] for worker in range(workers))
            found.append(now)
        return found

    return ends


def in_local_steps(draw: Draw, steps: int) -> Draw:
    """The time of a ticket of several gradients, each of which takes a time of its own.

    The simulator draws once for such a ticket. Where times are random, sums vary less, so rounds of local SGD end earlier here.
    """
    return lambda worker: sum(draw(worker) for _ in range(steps))


def asynchronous_seconds(setting: str, workers: int) -> float:
    """Time of a gradient without barriers, in units of the time that nothing slows down."""
    return 1 / sum(1 / mean for mean in mean_slowdowns(setting, workers))


def round_seconds(setting: str, workers: int, m: int) -> float:
    """Time of a gradient in rounds of the first m of K workers, the others cancelled, in the same units."""
    return expected_smallest(setting, workers, m) / m


def ideal(setting: str, workers: int) -> float:
    """The fraction of DDP's time that asynchrony needs by the speeds alone."""
    return asynchronous_seconds(setting, workers) / round_seconds(setting, workers, workers)


def ideal_of_best_m(setting: str, workers: int) -> float:
    """The same against rounds of the first m workers, with the best m, which may be K."""
    return asynchronous_seconds(setting, workers) / min(round_seconds(setting, workers, m) for m in range(1, workers + 1))


def mean_slowdowns(setting: str, workers: int) -> list[float]:
    """The mean slowdown of each worker."""
    if setting in _LASTING:
        return [*_LASTING[setting](workers)]
    return [2.0] * workers  # exponential, gamma: 1 + X with X of mean 1


def expected_smallest(setting: str, workers: int, m: int) -> float:
    """The expected m-th smallest slowdown of K workers."""
    if setting in _LASTING:
        return sorted(_LASTING[setting](workers))[m - 1]
    if setting == "exponential":
        return 1 + sum(1 / n for n in range(workers - m + 1, workers + 1))
    assert setting == "gamma", "those of the race"
    return 1 + _smallest_of_gammas(workers, m)


_LASTING: dict[str, Callable[[int], list[float]]] = {
    "none": lambda workers: [1.0] * workers,
    "one_slow": lambda workers: [1.0] * (workers - 1) + [10.0],
    "half_slow": lambda workers: [1.0] * (workers - workers // 2) + [3.0] * (workers // 2),
}
"""Slowdowns that are the same for all tickets of a worker."""


@functools.cache
def _smallest_of_gammas(workers: int, m: int) -> float:
    """The expected m-th smallest of K gamma variables of mean 1 and shape 4: the integral of P(fewer than m are below x)."""
    x = np.linspace(0.0, 8.0, 4001)
    below = torch.special.gammainc(torch.tensor(4.0, dtype=torch.float64), torch.from_numpy(4 * x)).numpy()
    fewer = sum(math.comb(workers, n) * below**n * (1 - below) ** (workers - n) for n in range(m))
    return float(np.trapezoid(fewer, x))
