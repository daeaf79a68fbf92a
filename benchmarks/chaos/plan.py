"""Which faults, in which order, and when."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.chaos.faults import OF_THE_NETWORK

ROUND = (
    *("kill_worker", "kill_server", "network_loss", "stop_worker", "pause_worker", "kill_server", "guest_leaves"),
    *("kill_two_workers", "network_blip", "kill_starting_worker", "kill_server_and_worker", "guest_killed", "stop_server"),
    *("kill_server", "pause_server"),
)
"""Repeated for as many faults as are wanted: each kind, those that kill the server more often."""
HEAD, TAIL = 3, 2
"""So many stretches of the run stay free at its beginning and at its end."""
SHORT = ("kill_worker", "pause_worker", "kill_server")
"""For a test."""


def plan(count: int, chance: random.Random, *, network: bool, only: Sequence[str] = ROUND) -> list[str]:
    """So many faults in random order; without a network, a worker is killed where a packet would have been lost."""
    wanted = [only[place % len(only)] for place in range(count)]
    kinds = [kind if network or kind not in OF_THE_NETWORK else "kill_worker" for kind in wanted]
    chance.shuffle(kinds)
    return kinds


def moments(count: int, gradients: int, chance: random.Random) -> list[int]:
    """At which iteration each fault is due: anywhere in its own stretch of the run, after those in which everybody comes."""
    return [(place + HEAD) * gradients + chance.randrange(gradients) for place in range(count)]


def total(count: int, gradients: int) -> int:
    """How many gradients the run has."""
    return (HEAD + count + TAIL) * gradients
