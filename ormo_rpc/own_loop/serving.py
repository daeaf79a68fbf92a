"""The process of the server: it serves to the end of the run, and its loop is given no work."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn

from typing_extensions import override

from ormo_rpc import console
from ormo_rpc.config.parsing import load_config, save_config
from ormo_rpc.config.paths import located
from ormo_rpc.config.runtimes import ControlKind
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import Interrupted, RunFailed
from ormo_rpc.messages import Push, Reply
from ormo_rpc.own_loop.job import OwnJob, with_every
from ormo_rpc.own_loop.run import Run, Source, say
from ormo_rpc.rendezvous.secret import read_secret
from ormo_rpc.runtimes.attempts import claimed_by, continues, former_run
from ormo_rpc.runtimes.distributed.launcher.processes import rank_0_listener
from ormo_rpc.runtimes.distributed.launcher.rank_messages import Rank
from ormo_rpc.runtimes.distributed.server_process import server_process
from ormo_rpc.runtimes.distributed.server_process.server_process import ServerArgs, ServerProcess
from ormo_rpc.runtimes.ranks import TORCHRUN, Ranks
from ormo_rpc.runtimes.torchrun_agent import end_with_agent
from ormo_rpc.runtimes.torchrun_store import ADDRESS, SECRET_FILE, connect, tell_result
from ormo_rpc.signals import SignalWatch
from ormo_rpc.storage.counters import RunCounters
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import RunDirectory
from ormo_rpc.storage.summary import (
    TERMINAL_STATUSES,
    forget_summary,
    read_summary,
    unfinished_summary,
    write_summary,
)

POLL_SECONDS = 0.1
"""The interval at which signals are handed on."""
HAND_ON_SECONDS = 5.0
"""A signal is handed on by then; the thread ends with the process anyway."""
OnReady = Callable[[ServerProcess], None]


class ServerSource(Source):
    """Serves, as a child of ``ormo-rpc launch`` or as rank 0, and gives no work.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self.summary: dict[str, Any] | None = None
        self._run = run
        self._job: OwnJob | None = None

    @property
    @override
    def worker(self) -> NoReturn:
        raise AssertionError("the server's process has no worker")

    @override
    def before_push(self, seconds: float) -> NoReturn:
        raise AssertionError("the server's process pushes nothing")

    @override
    def replies(self) -> Generator[Reply, Push]:
        role = self._run.role
        if role.child is not None:
            self.summary = role.child.serve(self._serve)
        else:
            assert role.ranks is not None, "else it would be alone"
            self.summary = self._serve_ranks(role.ranks)
        if self._job is not None and self._job.built is not None:
            server = self._job.built
            self._run.model.release(server.params, server.buffers.copy())
        yield from ()

    def _serve(self, args: ServerArgs, on_ready: OnReady) -> dict[str, Any]:
        return server_process.serve(args, on_ready, self._made)

    def _made(self, args: ServerArgs) -> OwnJob:
        self._job = self._run.job(load_config(args.run_dir / "config.yaml"))
        return self._job

    def _serve_ranks(self, ranks: Ranks) -> dict[str, Any]:
        """Serve the other ranks, in the run directory of an earlier start of the ranks where there is one.

        Raises:
            ConfigError: this machine cannot serve.
            Interrupted: it was stopped by a signal.
            RunFailed: the run has failed.
        """
        run = self._run
        former = former_run(ranks)
        run_dir = run.directory() if former is None else former.run_dir
        config = _without_agents(located(run.role.config, Path.cwd()))
        if not continues(ranks, run_dir):
            RunDirectory.claim(run_dir)
        console.keep_unsaid(run_dir / "logs" / "launcher.log")
        claim = claimed_by(ranks)
        Launch(overrides=tuple(run.words), job=claim.job, agent=claim.agent).write(run_dir)
        ended = read_summary(run_dir)
        if ended is not None and ended["status"] in TERMINAL_STATUSES:  # the ranks were started again after that
            if ranks.agent_store:
                tell_result(ranks.master, ended)
            return ended
        forget_summary(run_dir)
        save_config(with_every(config, run.evaluate), run_dir / "config.yaml")
        if ranks.launcher == TORCHRUN:
            end_with_agent()
        try:
            summary = self._listen(config, run_dir, ranks)
        except (RuntimeError, OSError, TimeoutError) as error:
            if read_summary(run_dir) is None:
                with contextlib.suppress(OSError):
                    seconds = time.monotonic() - RunCounters.began(run_dir, run.began)
                    write_summary(run_dir, unfinished_summary(config, "failed", str(error), seconds))
            raise RunFailed(f"{error}; see {run_dir}") from error
        if summary["status"] == "interrupted":
            raise Interrupted(Signals[summary["reason"]])
        if ranks.agent_store:
            tell_result(ranks.master, summary)
        Rank(ranks, say).say(f"the run {summary['status']}: {summary['gradients_computed']} gradients")
        return summary

    def _listen(self, config: Config, run_dir: Path, ranks: Ranks) -> dict[str, Any]:
        with rank_0_listener(config, run_dir, ranks, say) as (listener, address, secret_file):
            secret = read_secret(None if secret_file is None else str(secret_file))
            assert secret is not None, "it was checked, or made"
            args = ServerArgs(
                run_dir=run_dir,
                began=RunCounters.began(run_dir, self._run.began),
                listening_socket=listener,
                secret=secret,
                incarnation=RunCounters.incarnations_of(run_dir),
                terminal_fd=2 if console.on_terminal() else None,
                start=f"by {ranks.launcher}",
                report=say,
            )
            with SignalWatch() as watch, contextlib.ExitStack() as stack:

                def on_ready(process: ServerProcess) -> None:
                    stack.enter_context(_handed_on(watch, process))
                    if ranks.agent_store:
                        store = connect(ranks.master, config.rpc.start_timeout_seconds)
                        store.set(SECRET_FILE, str(secret_file or ""))
                        store.set(ADDRESS, address)

                return self._serve(args, on_ready)


def _without_agents(config: Config) -> Config:
    """Have the control plane on the leases' connections, where nobody has asked for agents of torch.distributed.rpc.

    Their warnings at the end of a run cannot be turned off in a process that has imported torch before.
    """
    runtime = config.rpc
    if runtime.control is not ControlKind.auto or config.transport.NEEDS_RPC:
        return config
    return dataclasses.replace(config, runtime=dataclasses.replace(runtime, control=ControlKind.socket))


@contextlib.contextmanager
def _handed_on(watch: SignalWatch, process: ServerProcess) -> Generator[None]:
    """Hand the signals that are noted to the server, by a thread, as handlers run within whatever the main thread does."""
    over = threading.Event()

    def hand_on() -> None:
        while not over.wait(POLL_SECONDS):
            if watch.ends:
                process.handle({"stop": {"status": "interrupted", "reason": watch.ends[0].name}})
            if watch.take_checkpoint():
                process.handle({"checkpoint": True})

    thread = threading.Thread(target=hand_on, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(HAND_ON_SECONDS)
