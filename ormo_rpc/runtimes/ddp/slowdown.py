"""Ranks that are slower than their machine: they sleep before their gradients are reduced, and their peers wait for them."""

from __future__ import annotations

import time

from ormo_rpc.config.schema import Config
from ormo_rpc.runtimes.configured import time_generator
from ormo_rpc.worker.heterogeneity import cpu_seconds


class Slowdown:
    """Lets a rank take f times its own processor time for a round: f is drawn as for the worker of that number.

    Args:
        config: Of the run.
        rank: Of this process.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._generator = time_generator(config, rank)
        self._factor = 1.0
        self._since = 0.0

    def begin(self) -> None:
        """Draw the factor of a round, and begin to measure."""
        self._factor = self._config.slowdown(self._rank, self._generator)
        self._since = cpu_seconds()

    def catch_up(self) -> None:
        """Sleep (f - 1) times the processor time since the last call or the beginning; before gradients are reduced."""
        if self._factor > 1:
            time.sleep((self._factor - 1) * (cpu_seconds() - self._since))
        self._since = cpu_seconds()
