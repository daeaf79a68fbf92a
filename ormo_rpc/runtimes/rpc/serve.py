"""The server's process: builds the parameter server, lets the workers in, and writes down what happens to the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public

from ormo_rpc.config import load_config
from ormo_rpc.job import Job
from ormo_rpc.messages import Reply
from ormo_rpc.runtimes.rpc.connection import rpc_group, wait_until_ready
from ormo_rpc.runtimes.rpc.service import Service, publish
from ormo_rpc.server import ParameterServer
from ormo_rpc.session import Session

PUMP_SECONDS = 0.1
"""How often events are written down."""


class Stopwatch:
    """Seconds since `start`, 0 before."""

    def __init__(self) -> None:
        self._since: float | None = None

    def start(self) -> None:
        """Begin to count."""
        self._since = time.monotonic()

    def __call__(self) -> float:
        """The seconds."""
        return 0.0 if self._since is None else time.monotonic() - self._since


class Host:
    """Everything in the server's process: the session of the run, and the service that the workers reach.

    The main thread runs `run`; handlers of the RPC agent call `Session.observe` under the service's lock; evaluations run in a
    thread of their own.

    Args:
        job: The run.
        run_dir: Its directory.
        terminal: A file descriptor for the progress bar, where there is a terminal.
    """

    def __init__(self, job: Job, run_dir: Path, terminal: int | None) -> None:
        self.options = job.config.rpc
        self.clock = Stopwatch()
        self.stop_asked = threading.Event()
        self.stop_message: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self.session = Session(job, run_dir, self._pool, self.clock, figures=self._lock_times, terminal=terminal)
        self.service = Service(self.session.server, self.session.observe, self.clock.start)

    def run(self) -> dict[str, Any]:
        """Record until the run is over and the workers are gone; return the summary."""
        self.session.open()
        while not self.service.started.wait(PUMP_SECONDS):
            if self.stop_asked.is_set():
                return self._finish()
        self.session.directory.write_processes(os.getpid(), self.service.processes)
        limit = self.session.job.config.train.max_seconds
        while not self.session.server.ended:
            if self.stop_asked.wait(PUMP_SECONDS):
                break
            self._check_health()
            if limit is not None and self.clock() >= limit:
                limit = None
                self.service.call(ParameterServer.finish)
            self.session.pump()
        return self._finish()

    def ask_to_stop(self, message: dict[str, Any]) -> None:
        """Hear the supervisor; called in the thread that listens to it."""
        self.stop_message = message["stop"]
        self.stop_asked.set()

    def _finish(self) -> dict[str, Any]:
        """Write the last checkpoint, let the workers go, and write the summary."""
        seconds, state = self.clock(), dict[str, Any]()

        def stop(server: ParameterServer) -> list[Reply]:
            state.update(server.state_dict())  # in one step with the stop: nothing is applied that is not in the checkpoint
            return server.stop()

        self.service.call(stop)
        self._check_whole()
        self.session.write_checkpoint(state)
        if not self.stop_message:
            self._wait_for_workers()
        summary = self.session.close(state, wait=not self.stop_message, wall_seconds=seconds, **self.stop_message)
        self._pool.shutdown(wait=False, cancel_futures=True)
        return summary

    def _check_health(self) -> None:
        """End the run where it cannot go on.

        Raises:
            RuntimeError: a push broke the server itself, or a worker does not come back with its ticket.
        """
        self._check_whole()
        patience = self.options.ticket_timeout_seconds
        late = self.service.late(patience)
        if late:
            names = ", ".join(f"worker {worker}" for worker in late)
            raise RuntimeError(f"{names}: no push for runtime.ticket_timeout_seconds={patience:g}; stuck, or too slow for it")

    def _check_whole(self) -> None:
        """Refuse to go on with, or to keep, a state to which a push may have been applied by half."""
        cause = self.service.broken
        if cause is not None:
            raise RuntimeError(f"a push could not be applied: {type(cause).__name__}: {cause}") from cause

    def _wait_for_workers(self) -> None:
        """Until all have said goodbye; one that hangs is left to the supervisor."""
        deadline = time.monotonic() + self.options.stop_timeout_seconds
        while len(self.service.gone) < len(self.service.processes) and time.monotonic() < deadline:
            self.session.pump()
            time.sleep(PUMP_SECONDS / 10)

    def _lock_times(self) -> dict[str, float]:
        return {"lock_wait_seconds": self.service.lock_wait_seconds, "lock_held_seconds": self.service.lock_held_seconds}


def serve(
    store: Store,
    run_dir: Path,
    *,
    world_size: int,
    timeout_seconds: float,
    terminal: int | None,
    on_ready: Callable[[Host], None],
) -> None:
    """Be the server of a run from start to end.

    Args:
        store: Where the workers find us, and the configuration.
        run_dir: The run directory, with ``config.yaml``.
        world_size: Workers plus one.
        timeout_seconds: For the start.
        terminal: For the progress bar.
        on_ready: Called with the host as soon as it can be asked to stop.
    """
    config = load_config(run_dir / "config.yaml")
    store.set("config", (run_dir / "config.yaml").read_text())
    job = Job(config)
    host = Host(job, run_dir, terminal)
    wait_until_ready(store, world_size, timeout_seconds)
    with rpc_group(store, rank=0, world_size=world_size, timeout_seconds=timeout_seconds):
        publish(host.service)
        store.set("service", "published")
        on_ready(host)
        host.run()
