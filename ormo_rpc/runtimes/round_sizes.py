"""Rounds of more gradients than there are workers: a mistake, unless further workers join."""

from __future__ import annotations

from ormo_rpc.algorithms._rounds import Rounds
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
        key, number, all_of_them = more
        raise ConfigError(
            f"{key}: got {number} with workers={config.num_workers}, expected at most {config.num_workers}: a round has one "
            f"gradient of each worker; {all_of_them} has those of all"
        )


def more_than_workers(config: Config) -> tuple[str, int, str] | None:
    """Return the gradients that make a round where they are more than the workers at the start, else None.

    Returns:
        Their key, their number, and what makes rounds of all workers instead.
    """
    most = config.algorithm.most if isinstance(config.algorithm, Rounds) else None
    if most is not None and most > config.num_workers:
        return "algorithm.m", most, "null"
    size = config.scheduler.round_size
    if size is not None and size > max(config.num_workers, DEFAULT_K):
        return "scheduler.k", size, "scheduler=sync"
    return None


def _may_grow(config: Config) -> bool:
    """Tell if workers beyond those at the start are expected: simulated joins, an address to join at, ranks that may change."""
    runtime = config.runtime
    if isinstance(runtime, SimRuntime):
        return bool(runtime.joins)
    return isinstance(runtime, RpcRuntime) and (
        config.server.address is not None or runtime.min_workers > config.num_workers or Ranks.from_environment() is not None
    )
