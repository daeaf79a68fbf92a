"""Runtimes: ways to bring one server and its workers together. Each drives the same `ParameterServer` and `Worker`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any

import torch

from ormo_rpc.config.parsing import load_config
from ormo_rpc.config.runtimes import GradientKind, RpcRuntime, SimRuntime
from ormo_rpc.config.schema import Config, Role
from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.runtimes.torchrun import Torchrun
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import RunDirectory

__all__ = ["RunFailed", "run"]

MODULES = {
    "rpc": "ormo_rpc.runtimes.distributed.launcher.run",
    "sim": "ormo_rpc.runtimes.simulator",
    "replay": "ormo_rpc.runtimes.replay",
}
"""The module of each runtime, imported when it is chosen."""
DEFAULT_WORKERS = 4
"""Workers of a run on this machine where the configuration names no number."""


def run(config: Config, run_dir: Path) -> dict[str, Any]:
    """Run a configuration to its end.

    Args:
        config: What to run; ``workers`` may still be None.
        run_dir: Where the outputs go. It must not hold a run yet.

    Returns:
        The summary; empty on ranks other than 0 under torchrun, and for a worker of a run that others have started.

    Raises:
        ConfigError: the configuration cannot be run here; nothing was started.
        RunFailed: the run did not meet its end.
    """
    torchrun = Torchrun.from_environment()
    if config.role is Role.worker:
        return _join(config, torchrun)
    config = _decide_workers(config, torchrun)
    first = torchrun is None or torchrun.rank == 0
    runtime = importlib.import_module(MODULES[config.runtime.name])
    if first and config.checkpoint.resume is not None:
        _check_resume(config, checkpoint.locate(Path(config.checkpoint.resume)))
    try:
        config.heterogeneity.prepare()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if _needs_data(config):
        _check_data_and_model(config)
    if first:
        RunDirectory.claim(run_dir)
    return runtime.run(config, run_dir)


def _join(config: Config, torchrun: Torchrun | None) -> dict[str, Any]:
    """Be a worker of a run that others have started; it has no summary of its own."""
    if torchrun is not None:
        raise ConfigError("role: got worker under torchrun, whose ranks are workers of themselves; use python launch.py")
    if not isinstance(config.runtime, RpcRuntime):
        raise ConfigError(f"runtime: got {config.runtime.name} with role=worker, expected rpc")
    if config.server.address is None:
        raise ConfigError("server.address: got None with role=worker, expected HOST:PORT of the running server")
    importlib.import_module(MODULES["rpc"]).join(config)
    return {}


def _needs_data(config: Config) -> bool:
    """Whether the run trains the configured model on the configured data set."""
    if isinstance(config.runtime, SimRuntime):
        return config.runtime.gradient is GradientKind.real
    return isinstance(config.runtime, RpcRuntime)


def _decide_workers(config: Config, torchrun: Torchrun | None) -> Config:
    """Fill in the number of workers: that of the ranks under torchrun, else the configured one."""
    if torchrun is None:
        return dataclasses.replace(config, workers=config.workers or DEFAULT_WORKERS)
    ranks = torchrun.world_size
    if not isinstance(config.runtime, RpcRuntime):
        raise ConfigError(f"runtime: got {config.runtime.name} under torchrun, expected rpc; start it with python launch.py")
    if ranks < 2:
        raise ConfigError(f"torchrun: got {ranks} process, expected at least 2; rank 0 serves and the others work")
    if config.workers not in (None, ranks - 1):
        raise ConfigError(
            f"workers: got {config.workers}, expected {ranks - 1} under torchrun with {ranks} processes; leave it out"
        )
    return dataclasses.replace(config, workers=ranks - 1)


RESUMED = (
    *("seed", "algorithm", "scheduler", "dataset.name", "model", "train.batch_size", "train.momentum"),
    *("compression", "wire.dtype", "wire.params"),
)
"""What a run must have in common with the one that it goes on from: the meaning of its tickets and of its state."""


def _check_resume(config: Config, path: Path) -> None:
    """Refuse to go on from a run that was another one."""
    then = load_config(path / "config.yaml")
    for key in RESUMED:
        was, wanted = (functools.reduce(getattr, key.split("."), each) for each in (then, config))
        if was != wanted:
            raise ConfigError(f"checkpoint.resume: {key}: got {wanted}, expected {was}, as {path} has it")


def _check_data_and_model(config: Config) -> None:
    """See to it that the data set is there and the model fits it, before any process starts; nothing of them is kept."""
    try:
        config.dataset.prepare()
        data = config.dataset.load()
        with torch.random.fork_rng(devices=[]):
            FlatModel(config.model.build(data.input_shape, data.num_classes))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except (Exception, SystemExit) as error:  # whatever a user's own model or data set does
        raise ConfigError(f"dataset or model: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    if len(data.test) == 0:
        raise ConfigError("dataset: got an empty test set, expected at least one sample")
