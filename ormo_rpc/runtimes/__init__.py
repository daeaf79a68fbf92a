"""Runtimes: ways to bring one server and its workers together. Each drives the same `ParameterServer` and `Worker`."""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

from ormo_rpc import checkpoint
from ormo_rpc.config import Config, ConfigError
from ormo_rpc.run_directory import RunDirectory
from ormo_rpc.runtime_options import GradientKind, RpcRuntime, SimRuntime
from ormo_rpc.runtimes.failure import RunFailed

__all__ = ["RunFailed", "run"]

DEFAULT_WORKERS = 4
"""Workers of a run on this machine where the configuration names no number."""


def run(config: Config, run_dir: Path) -> dict[str, Any]:
    """Run a configuration to its end.

    Args:
        config: What to run; ``workers`` may still be None.
        run_dir: Where the outputs go. It must not hold a run yet.

    Returns:
        The summary; empty on ranks other than 0 under torchrun.

    Raises:
        ConfigError: the configuration cannot be run here; nothing was started.
        RunFailed: the run did not meet its end.
    """
    config = _decide_workers(config)
    if _global_rank() == 0:
        RunDirectory.check_unused(run_dir)
        if config.checkpoint.resume is not None:
            checkpoint.find(Path(config.checkpoint.resume))
    runtime = importlib.import_module(f"ormo_rpc.runtimes.{config.runtime.name}")
    if _needs_data(config):
        try:
            config.dataset.prepare()
            data = config.dataset.load()
            config.model.build(data.input_shape, data.num_classes)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return runtime.run(config, run_dir)


def _needs_data(config: Config) -> bool:
    """Whether the run trains the configured model on the configured data set."""
    if isinstance(config.runtime, SimRuntime):
        return config.runtime.gradient is GradientKind.real
    return isinstance(config.runtime, RpcRuntime)


def _global_rank() -> int:
    """This process's rank under torchrun; 0 elsewhere."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def _decide_workers(config: Config) -> Config:
    """Fill in the number of workers: that of the ranks under torchrun, else the configured one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return dataclasses.replace(config, workers=config.workers or DEFAULT_WORKERS)
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks < 2:
        raise ConfigError(f"torchrun: got {ranks} process, expected at least 2; rank 0 serves and the others work")
    if config.workers not in (None, ranks - 1):
        raise ConfigError(
            f"workers: got {config.workers}, expected {ranks - 1} under torchrun with {ranks} processes; leave it out"
        )
    return dataclasses.replace(config, workers=ranks - 1)
