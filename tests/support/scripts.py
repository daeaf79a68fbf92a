"""Scripts of users, as `ormo-rpc launch` runs them, with a launcher in this process that has no server."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Generator
from pathlib import Path

from ormo_rpc.config.runtimes import StartKind
from ormo_rpc.config.schema import Config
from ormo_rpc.own_loop.script import Script
from ormo_rpc.runtimes.distributed.launcher.supervisor import ChildProcess, Supervisor
from ormo_rpc.runtimes.distributed.linux import adopting
from ormo_rpc.runtimes.distributed.preloading.client import ForkedProcess, Preloader, module_path
from ormo_rpc.runtimes.distributed.preloading.forking import ForkRequest, fork
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading, child_environment
from tests.support.processes import PATIENCE_SECONDS

JOIN = """
from ormo_rpc.config.schema import Config
from ormo_rpc.own_loop.script_preloading import child_of_launcher
child = child_of_launcher(Config(workers=2))
"""
"""In place of `ormo_rpc.join`: no model, no data, no server."""


def preloader(script: Script) -> Preloader:
    """A preloader with the imports: a fork of this process, which has them."""
    from ormo_rpc.own_loop.script_process import Scripts
    from ormo_rpc.runtimes.distributed.preloading.process import serve  # its import disables the collector

    ours, theirs = socket.socketpair()
    environment = child_environment(1)
    request = ForkRequest(
        launcher=os.getpid(),
        name="ormo test",
        title=["python"],
        environment=environment,
        path=module_path(),
        directory=str(Path.cwd()),
        output=None,
    )
    with theirs, adopting():
        number = fork(request, [theirs.fileno()])
        if number == 0:
            try:
                sys.stdout, sys.stderr = (os.fdopen(each, "w", 1, closefd=False) for each in (1, 2))  # not pytest's
                serve(theirs.fileno(), "", Scripts())
            finally:
                os._exit(1)
    return Preloader(ForkedProcess(number), ours, environment, script.programs)


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
