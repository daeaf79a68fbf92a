"""Scripts of users, as `ormo-rpc launch` runs them, with a launcher in this process that has no server."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from pathlib import Path

from ormo_rpc.config.runtimes import StartKind
from ormo_rpc.config.schema import Config
from ormo_rpc.own_loop.script import Script
from ormo_rpc.runtimes.distributed.launcher.supervisor import ChildProcess, Supervisor
from ormo_rpc.runtimes.distributed.preloading.client import Preloader
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading, child_environment
from tests.support.processes import PATIENCE_SECONDS

JOIN = """
from ormo_rpc.config.schema import Config
from ormo_rpc.own_loop.script_preloading import child_of_launcher
child = child_of_launcher(Config(workers=2))
"""
"""In place of `ormo_rpc.join`: no model, no data, no server."""


_imports: list[Preloader] = []
"""The preloader of `shared_imports`."""


@contextlib.contextmanager
def shared_imports() -> Generator[None]:
    """Have a preloader with the imports, once for many tests.

    A fork of this process itself would have what other tests leave behind, such as objects that close descriptors in forks.
    """
    programs = dataclasses.replace(Script(name="train.py").programs, words=())
    with Preloader.spawned(child_environment(1), programs) as spawned:
        _imports.append(spawned)
        try:
            yield
        finally:
            _imports.remove(spawned)


def preloader(script: Script) -> Preloader:
    """A preloader with the imports, for a script; only within `shared_imports`."""
    forked = _imports[-1].fork_preloader()
    forked.programs = script.programs
    return forked


class Launcher:
    """Starts children that run a script.

    Args:
        script: The script.
        logs: The folder for their output.
        supervisor: Watches them.
        starts: Starts them.
    """

    def __init__(self, script: Script, logs: Path, supervisor: Supervisor, starts: Preloading) -> None:
        self.script = script
        self.logs = logs
        self.supervisor = supervisor
        self.starts = starts

    def load(self, start: StartKind = StartKind.auto) -> Config:
        """Run the script as far as it joins."""
        return self.starts.load_what({"script": self.script.text}, self.script.name, threads=1, start=start)

    def worker(self, name: str = "worker 0", *, threads: int = 1) -> ChildProcess:
        """Run a worker to its end, in an environment for a number of threads."""
        child = self.supervisor.start(
            name,
            ["worker", "--log", "--slot-id", "x"],
            env=child_environment(threads),
            log=self.logs / name,
            starter=self.starts,
        )
        assert self.supervisor.wait(lambda: not child.running, PATIENCE_SECONDS)
        self.supervisor.reap(child)
        return child


@contextlib.contextmanager
def launcher(script: Script, logs: Path) -> Generator[Launcher]:
    """A launcher of a script, without the time that imports take."""
    with Supervisor() as supervisor, Preloading(script.programs) as starts:
        starts._imports = preloader(script)  # pyright: ignore[reportPrivateUsage] # in place of one that is spawned
        yield Launcher(script, logs, supervisor, starts)
