"""The run of a configuration, from its check to its summary, by the runtime that it names."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from ormo_rpc import console
from ormo_rpc.config.paths import located
from ormo_rpc.config.runtimes import LiveRuntime, RpcRuntime, SimRuntime
from ormo_rpc.config.schema import Config, Role
from ormo_rpc.errors import ConfigError
from ormo_rpc.options.imports import refuse_while_importing
from ormo_rpc.runtimes import server_address
from ormo_rpc.runtimes.attempts import claimed_by, continues
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading
from ormo_rpc.runtimes.rank_checks import check_elastic_worker, check_secret, decide_workers
from ormo_rpc.runtimes.ranks import Ranks
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import RunDirectory, check_present
from ormo_rpc.worker.arithmetic import arithmetic_kept

MODULES = {
    "rpc": "ormo_rpc.runtimes.distributed.launcher.run",
    "ddp": "ormo_rpc.runtimes.ddp.launcher",
    "sim": "ormo_rpc.runtimes.simulator",
    "replay": "ormo_rpc.runtimes.replay",
}
"""The module of each runtime, imported when it is chosen."""

_draws = threading.RLock()
"""Held while models are built and trained here: they draw from torch's global generator, which threads would share."""


def run(
    config: Config,
    run_dir: Path,
    launch: Launch | None = None,
    *,
    start: Path | None = None,
    began: float | None = None,
    preloading: Preloading | None = None,
) -> dict[str, Any]:
    """Run a configuration to its end.

    Args:
        config: The configuration; ``workers`` may still be None.
        run_dir: The directory for the outputs, which must not hold a run yet, except that of an earlier start of the ranks.
        launch: How it was started.
        start: Where relative paths begin: the directory where the command was started; by default this process's.
        began: Time on the monotonic clock from which the summary's ``wall_seconds`` count; by default now.
        preloading: Starts the processes of live runs, of this one and of others; by default one for this run alone.

    Returns:
        The summary; empty on ranks other than 0, and for ``role=worker``.

    Raises:
        ConfigError: the configuration cannot be run here; nothing was started.
        RunFailed: the run did not complete.
    """
    refuse_while_importing()
    began = time.monotonic() if began is None else began
    config = located(config, start or Path.cwd())
    ranks = Ranks.from_environment()
    if config.role is Role.worker:
        with _preloading(preloading) as preloader:
            _join(config, ranks, preloader)
        return {}
    config = _decided(config, ranks)
    if not isinstance(config.runtime, LiveRuntime):
        return _run_in_this_process(config, run_dir, launch, began)
    with _preloading(preloading) as preloader:
        config = preloader.load(config, starts_server=ranks is None or ranks.rank == 0)
        return _run_processes(config, run_dir, launch, began, preloader, ranks)


def run_loaded(
    load: Callable[[Preloading], Config], run_dir: Path, launch: Launch, *, began: float, preloading: Preloading
) -> dict[str, Any]:
    """Run what has a configuration once it is loaded, such as a user's script; else as `run`.

    Args:
        load: Loads it by the preloaders.
        run_dir: As for `run`.
        launch: As for `run`.
        began: As for `run`.
        preloading: As for `run`.

    Raises:
        ConfigError: what is loaded has a configuration that an own loop cannot have; else as `run`.
    """
    ranks = Ranks.from_environment()
    with _preloading(preloading) as preloader:
        config = located(load(preloader), Path.cwd())
        if config.role is Role.worker:
            _join(config, ranks, preloader)
            return {}
        config = _decided(config, ranks)
        if not isinstance(config.runtime, RpcRuntime):
            raise ConfigError(f"runtime: got {config.runtime.name} for an own loop, expected rpc")
        return _run_processes(config, run_dir, launch, began, preloader, ranks)


def _decided(config: Config, ranks: Ranks | None) -> Config:
    """Decide the number of workers, and check what belongs to the run's processes and machines."""
    config = decide_workers(config, ranks)
    check_secret(config, ranks)
    server_address.check(config, ranks)
    return config


def _join(config: Config, ranks: Ranks | None, preloader: Preloading) -> None:
    """Work for a run elsewhere."""
    check_elastic_worker(config, ranks)
    server_address.check(config, ranks)
    importlib.import_module(MODULES["rpc"]).join(config, preloader)


def _run_processes(
    config: Config, run_dir: Path, launch: Launch | None, began: float, preloader: Preloading, ranks: Ranks | None
) -> dict[str, Any]:
    """Run a live run, whose job is loaded."""
    has_run_directory = ranks is None or ranks.rank == 0
    if has_run_directory:
        if ranks is None or not continues(ranks, run_dir):
            RunDirectory.claim(run_dir)
        console.keep_unsaid(run_dir.absolute() / "logs" / "launcher.log")
        claim = claimed_by(ranks)
        dataclasses.replace(launch or Launch(), job=claim.job, agent=claim.agent).write(run_dir)
    try:
        with _kept(run_dir) if has_run_directory else contextlib.nullcontext():
            return importlib.import_module(MODULES[config.runtime.name]).run(config, run_dir, began, preloader)
    except ConfigError:  # such as a port that is in use
        if has_run_directory:
            RunDirectory.release(run_dir)
        raise


@contextlib.contextmanager
def _preloading(given: Preloading | None) -> Generator[Preloading]:
    """Lend what starts the processes of a run."""
    with contextlib.nullcontext(given) if given is not None else Preloading() as preloading:
        try:
            yield preloading
        finally:
            preloading.end_job()


def _run_in_this_process(config: Config, run_dir: Path, launch: Launch | None, began: float) -> dict[str, Any]:
    """Run a simulation or a replay."""
    runtime, prepare = (importlib.import_module(each) for each in (MODULES[config.runtime.name], "ormo_rpc.runtimes.prepare"))
    with arithmetic_kept():
        with _alone():
            job = prepare.check(config, starts_server=True)
        RunDirectory.claim(run_dir)
        console.keep_unsaid(run_dir.absolute() / "logs" / "launcher.log")
        (launch or Launch()).write(run_dir)
        with _kept(run_dir), _in_this_process():
            if isinstance(config.runtime, SimRuntime):  # with the data set that was loaded for the check
                return runtime.run(job.config, run_dir, began, job)
            return runtime.run(config, run_dir, began)


@contextlib.contextmanager
def _kept(run_dir: Path) -> Generator[None]:
    """Say at the end of a run that its directory is gone, which may be where an error comes from.

    Raises:
        RunFailed: it is.
    """
    try:
        yield
    except Exception:
        check_present(run_dir)
        raise
    check_present(run_dir)


@contextlib.contextmanager
def _alone() -> Generator[None]:
    """Compute alone among the threads of this process, and outside of the calling program's modes, which other processes lack.

    In one that has autocast on, passes would be computed in another dtype than elsewhere.
    """
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        with _draws, torch.inference_mode(mode=False), torch.enable_grad():
            yield


@contextlib.contextmanager
def _in_this_process() -> Generator[None]:
    """Compute alone, and give the calling program its number of torch's threads back."""
    with _alone():
        threads = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
