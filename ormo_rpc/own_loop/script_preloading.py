"""A script's process under ``ormo-rpc launch``, as `join` finds it: the script's preloader, or a child of the launcher's.

The preloader runs the script as far as `join`, which tells the launcher the configuration and then serves its requests for
processes. It goes on with the script in the forks alone, so that each child behaves as if it had run the script itself; random
states are copied. Where no fork is safe, a child does run the script itself.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.options.imports import users_line
from ormo_rpc.own_loop.script import Script
from ormo_rpc.runtimes.distributed.preloading.load import Records
from ormo_rpc.runtimes.programs.entry_point import Child
from ormo_rpc.runtimes.programs.preloader import PreloaderProcess

_THREADS = "OMP_NUM_THREADS"


@dataclass
class Launched:
    """This process, which a launcher has started for a script.

    Attributes:
        pid: Its process number, which differs in a process that the script has forked.
        preloader: The part that serves the launcher; None in a child that has run the script from the beginning.
        request: The launcher's request for the script.
        records: What is logged until the script joins.
        child: This process as a child; None in a preloader.
        joined_at: File and line of the call of `join`; empty before.
    """

    pid: int
    preloader: PreloaderProcess | None = None
    request: Mapping[str, Any] | None = None
    records: Records | None = None
    child: Child | None = None
    joined_at: str = ""


_launched: list[Launched] = []
"""Of this process; empty where no launcher has started it."""


def launched(this: Launched) -> Launched:
    """Note what this process is, before its script runs."""
    _launched[:] = [this]
    return this


def child_of_launcher(config: Config) -> Child | None:
    """Return this process as a child of ``ormo-rpc launch``; None where that has not started it.

    In the script's preloader this call ends in each fork alone.

    Args:
        config: The configuration, checked: defaults, those of `join`, those of the command line.

    Raises:
        ConfigError: it was called before, or in a process that the script has started.
    """
    if not _launched:
        return None
    this, here = _launched[0], users_line()
    if os.getpid() != this.pid:
        raise ConfigError(
            f"{here}: ormo_rpc.join is called in a process that the script has forked; expected in the script's own process"
        )
    if this.joined_at:
        raise ConfigError(f"{here}: ormo_rpc.join is called again after {this.joined_at}; expected one call in a script")
    this.joined_at = here
    if this.child is None:
        this.child = _forked(this, config)
    return this.child


def _forked(this: Launched, config: Config) -> Child:
    """Tell the launcher the configuration, and serve it; return in a fork, which is a child."""
    preloader, request, records = this.preloader, this.request, this.records
    assert preloader is not None
    assert request is not None
    assert records is not None
    records.close()
    answer = {"config": config.yaml, "log": records.rows}
    preloader.tell(preloader.loaded(request, answer, refusal=_processes()))
    fork = preloader.serve()
    if fork is None:
        os._exit(0)
    split = Script.of_child(fork.arguments or ())
    assert split is not None, "a fork of this process is a child"
    this.pid = os.getpid()
    child = Child(split[1])
    if os.environ[_THREADS] != request["environment"][_THREADS]:  # the script's own call has come before
        torch.set_num_threads(int(os.environ[_THREADS]))
    return child


def _processes() -> str:
    """The reason not to fork where the script has started processes, which forks could not wait for; else empty."""
    known = {each.pid: each.name for each in multiprocessing.active_children()}
    pids = [pid for file in Path("/proc/self/task").glob("*/children") for pid in map(int, file.read_text().split())]
    if not pids:
        return ""
    names = ", ".join(known.get(pid) or f"pid {pid}" for pid in pids[:3])
    return f"a process was started before ormo_rpc.join, which forks could not wait for: {names}"
