"""Choose the faults of a run, their order, and the iterations at which they are due."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.chaos.faults import NETWORK_FAULTS

CYCLE = (
    *("kill_worker", "kill_server", "network_loss", "sending_worker_killed", "kill_server_that_opens", "opening_worker_killed"),
    *("kill_server", "sending_worker_stopped", "kill_two_workers", "kill_server_and_worker", "stop_worker", "pause_worker"),
    *("joined_worker_killed", "connected_worker_killed", "network_blip", "kill_starting_worker", "elastic_worker_leaves"),
    *("elastic_worker_killed", "stop_server", "kill_server", "pause_server"),
)
"""Repeated for as many faults as are wanted: each kind, those that kill the server more often."""
HEAD, TAIL = 3, 2
"""Stretches of the run without faults, at its beginning and at its end."""
SHORT = ("kill_worker", "pause_worker", "kill_server")
"""The faults of ``--short``."""


def plan(count: int, rng: random.Random, *, network: bool, kinds: Sequence[str] = CYCLE) -> list[str]:
    """Draw the order of ``count`` faults; without a network, `kill_worker` takes the place of its faults."""
    wanted = [kinds[number % len(kinds)] for number in range(count)]
    planned = [kind if network or kind not in NETWORK_FAULTS else "kill_worker" for kind in wanted]
    rng.shuffle(planned)
    return planned


def due_iterations(count: int, gradients: int, rng: random.Random) -> list[int]:
    """Draw the iteration of each fault: anywhere in its own stretch of ``gradients`` iterations, after the first `HEAD`."""
    return [(number + HEAD) * gradients + rng.randrange(gradients) for number in range(count)]


def total_iterations(count: int, gradients: int) -> int:
    """The length of a run with that many faults."""
    return (HEAD + count + TAIL) * gradients
