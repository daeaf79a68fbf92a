"""The configuration beside the ranks of a run: the number of workers, the secret, and what an elastic worker needs."""

from __future__ import annotations

import dataclasses

from ormo_rpc import devices
from ormo_rpc.config.runtimes import DdpRuntime, RpcRuntime
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous.secret import require_secret
from ormo_rpc.runtimes.ranks import TORCHRUN, Ranks

DEFAULT_WORKERS = 4
"""Workers of a run on this machine where the configuration has no number."""


def decide_workers(config: Config, ranks: Ranks | None) -> Config:
    """Fill in the number of workers: from the number of ranks, else the configured one.

    Raises:
        ConfigError: the configuration and the number of ranks disagree.
    """
    if ranks is None:
        return dataclasses.replace(config, workers=config.workers or DEFAULT_WORKERS)
    count = ranks.world_size
    if isinstance(config.runtime, DdpRuntime):
        return _decide_ranks(config, ranks)
    if not isinstance(config.runtime, RpcRuntime):
        raise ConfigError(f"runtime: got {config.runtime.name} {ranks.under}, expected rpc or ddp; {ranks.alone}")
    if count < 2:
        raise ConfigError(f"{ranks.launcher}: got {count} process, expected at least 2; rank 0 serves and the others work")
    if config.workers not in (None, count - 1):
        raise ConfigError(
            f"workers: got {config.workers}, expected {count - 1} {ranks.under} with {count} processes; leave it out"
        )
    return dataclasses.replace(config, workers=count - 1)


def _decide_ranks(config: Config, ranks: Ranks) -> Config:
    """Fill in the number of workers of ``runtime=ddp``, where each rank is one.

    Raises:
        ConfigError: the ranks have no store, or are not the configured number.
    """
    if not ranks.agent_store:
        raise ConfigError(f"runtime: got ddp {ranks.under}, expected torchrun, whose store the ranks meet by; {ranks.alone}")
    if config.workers not in (None, ranks.world_size):
        raise ConfigError(
            f"workers: got {config.workers}, expected {ranks.world_size} {ranks.under} with as many processes and runtime=ddp; "
            "leave it out"
        )
    return dataclasses.replace(config, workers=ranks.world_size)


def check_secret(config: Config, ranks: Ranks | None) -> None:
    """Refuse ranks that cannot tell one another a secret, and have none in common.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(config.runtime, RpcRuntime) and ranks is not None and not (ranks.one_machine and ranks.agent_store):
        require_secret(config.server.secret_file)


def check_elastic_worker(config: Config, ranks: Ranks | None) -> None:
    """Refuse ``role=worker`` where it cannot join a running server.

    Raises:
        ConfigError: it cannot; the message has the key to change.
    """
    if ranks is not None and ranks.launcher == TORCHRUN:
        raise ConfigError("role: got worker under torchrun, whose ranks already are workers; use python launch.py")
    if not isinstance(config.runtime, RpcRuntime):
        raise ConfigError(f"runtime: got {config.runtime.name} with role=worker, expected rpc")
    if config.server.address is None:
        raise ConfigError("server.address: got None with role=worker, expected HOST:PORT of the running server")
    devices.check(config.worker.device, "worker.device")
