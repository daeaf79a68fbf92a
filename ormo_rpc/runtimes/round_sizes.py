"""Rounds of more gradients than there are workers: a mistake, unless further workers join."""

from __future__ import annotations

from ormo_rpc.algorithms._rounds import Rounds
from ormo_rpc.algorithms.m_sync import MSync
from ormo_rpc.config.runtimes import RpcRuntime, SimRuntime
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.ranks import Ranks
from ormo_rpc.schedulers.partial import Partial

DEFAULT_K = Partial().k
"""One worker alone, as in a sweep, may keep the default of ``scheduler.k``."""


def check_rounds(config: Config) -> None:
    """Refuse rounds of more gradients than there are workers, unless further workers may join.

    Raises:
        ConfigError: there would never be such a round; a run with ``checkpoint.resume`` is only warned, by its `Session`.
    """
    more = more_than_workers(config)
    if more is not None and not _may_grow(config) and config.checkpoint.resume is None:
        key, number, instead = more
        raise ConfigError(
            f"{key}: got {number} with workers={config.num_workers}, expected at most {config.num_workers}: a round has one "
            f"gradient of each worker{instead}"
        )


def more_than_workers(config: Config) -> tuple[str, int, str] | None:
    """Return the gradients that make a round where they are more than the workers at the start, else None.

    Returns:
        The key that sets them (the group of an algorithm or a scheduler of the user's own), their number, and advice.
    """
    size = config.algorithm.round_size if isinstance(config.algorithm, Rounds) else None
    if size is not None and size > config.num_workers:
        if isinstance(config.algorithm, MSync):
            return "algorithm.m", size, "; null has those of all"
        return "algorithm", size, ""
    size = config.scheduler.round_size
    if size is not None and size > max(config.num_workers, DEFAULT_K):
        key = "scheduler.k" if isinstance(config.scheduler, Partial) else "scheduler"
        return key, size, "; scheduler=sync has those of all"
    return None


def _may_grow(config: Config) -> bool:
    """Tell if workers beyond those at the start are expected: simulated joins, an address to join at, ranks that may change."""
    runtime = config.runtime
    if isinstance(runtime, SimRuntime):
        return bool(runtime.joins)
    return isinstance(runtime, RpcRuntime) and (
        config.server.address is not None or runtime.min_workers > config.num_workers or Ranks.from_environment() is not None
    )
