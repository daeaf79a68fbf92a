"""A script that runs alone: the server and its one worker in this process, without a network."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from typing_extensions import override

from ormo_rpc import console
from ormo_rpc.config.parsing import save_config
from ormo_rpc.config.paths import located
from ormo_rpc.config.schema import Config
from ormo_rpc.control.messages import JoinRequest
from ormo_rpc.errors import BY_NAME, RunFailed, one_line
from ormo_rpc.messages import ErrorReply, Push, Reply
from ormo_rpc.options.imports import fault
from ormo_rpc.own_loop.interrupts import Interrupts
from ormo_rpc.own_loop.run import Run, Source, say
from ormo_rpc.own_loop.worker import OwnWorker
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.runtimes.distributed.server_process.shutdown import check_state
from ormo_rpc.runtimes.distributed.server_process.timers import Interval, Stopwatch
from ormo_rpc.runtimes.session import Session
from ormo_rpc.runtimes.simulator import InlineExecutor
from ormo_rpc.server.parameter_server import ParameterServer, Status
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import RunDirectory
from ormo_rpc.storage.summary import Summary, read_summary, unfinished_summary, write_summary
from ormo_rpc.transports.pending_replies import ReplyFuture

FLUSH_SECONDS = 0.1
"""The interval at which records are written."""


class AloneSource(Source):
    """The whole run in this process: each push is applied in the call of `push`, and evaluations come between two tickets.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self.summary: dict[str, Any] | None = None
        self._run = run
        self._worker: OwnWorker | None = None

    @property
    @override
    def worker(self) -> OwnWorker:
        assert self._worker is not None, "it is made before the first reply"
        return self._worker

    @override
    def before_push(self, seconds: float) -> None:
        pass

    @override
    def replies(self) -> Generator[Reply, Push]:
        run, run_dir = self._run, self._run.directory()
        config = located(run.role.config, Path.cwd())
        job = run.job(config, trains_here=True)
        RunDirectory.claim(run_dir)
        Launch(overrides=tuple(run.words)).write(run_dir)
        save_config(job.config, run_dir / "config.yaml")
        with contextlib.ExitStack() as stack:
            stack.callback(run.model.release)
            stack.callback(job.close)
            clock = Stopwatch()
            inline = _PausingExecutor(clock)
            session = Session(
                job,
                run_dir,
                inline,
                inline,
                clock,
                began=run.began,
                continue_clock=clock.continue_from,
                terminal=sys.stderr.fileno() if console.on_terminal() else None,
            )
            stack.callback(session.directory.close)
            session.open()
            self._worker = job.worker()
            interrupts = stack.enter_context(Interrupts())
            served = _Served(session, clock, interrupts)
            try:
                yield from served.replies()
            except GeneratorExit:
                served.end("failed", f"the script left its loop at iteration {session.server.iteration}, before the end")
                atexit.register(_explain, run_dir)
                raise
            except BaseException as error:
                self._end_failed(served, config, error)
                raise
            else:
                served.end()
                run.model.release(session.server.params, session.server.buffers.copy())
            finally:
                self.summary = served.summary

    def _end_failed(self, served: _Served, config: Config, error: BaseException) -> None:
        """End a run that a signal or a fault of the server has ended; its state may be beyond saving then."""
        try:
            served.end("failed", one_line(error))
        except Exception:
            seconds = time.monotonic() - self._run.began
            summary = unfinished_summary(config, "failed", one_line(error), seconds)
            served.summary = write_summary(served.session.directory.path, summary)


def _explain(run_dir: Path) -> None:
    """At the end of the program: name the error that has ended the script, which its loop does not get to know."""
    error, summary = getattr(sys, "last_value", None), read_summary(run_dir)
    if isinstance(error, BaseException) and summary is not None and summary["status"] == "failed":
        write_summary(run_dir, dataclasses.replace(Summary.from_dict(summary), reason=fault(error)))


class _PausingExecutor(InlineExecutor):
    """Calls submitted functions at once, as evaluations between two tickets, and stops the clock of training meanwhile."""

    def __init__(self, clock: Stopwatch) -> None:
        self._clock = clock

    @override
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._clock.paused():
            return super().submit(fn, *args, **kwargs)


class _Served:
    """The server of this process.

    Args:
        session: The session of the run.
        clock: Its clock.
        interrupts: The signals that end it.

    Attributes:
        summary: The summary of the run; None before its end.
    """

    def __init__(self, session: Session, clock: Stopwatch, interrupts: Interrupts) -> None:
        config = session.job.config
        self.session = session
        self.interrupts = interrupts
        self.summary: dict[str, Any] | None = None
        self._clock = clock
        self._limit = config.train.max_seconds
        self._checkpoint = Interval(config.checkpoint.every_seconds)
        self._flush = Interval(FLUSH_SECONDS)
        self.service = Service(
            session.server,
            session.observe,
            self._on_start,
            journal=session.journal,
            push_format=session.job.push_format(),
            max_not_finite=config.rpc.max_not_finite,
        )

    def replies(self) -> Generator[Reply, Push]:
        """Yield the replies with a ticket, to the end of the run.

        Raises:
            Interrupted, KeyboardInterrupt: by a signal.
        """
        request = JoinRequest(preferred_worker=0, pid=os.getpid(), host=platform.node(), slot_id="")
        session_id = self.service.join(request).session_id
        reply = self._of(self.service.register(session_id))
        while reply.ticket is not None:
            with self.interrupts.at_once():
                push = yield reply
            reply = self._of(self.service.push(session_id, push))
            self._attend()

    def end(self, status: str = "", reason: str = "") -> dict[str, Any]:
        """End the run, write its last state, and return the summary.

        Args:
            status: Of a run that has not ended by itself.
            reason: The reason of that.
        """
        session, state = self.session, dict[str, Any]()
        if self.interrupts.number is not None:
            status, reason = "interrupted", self.interrupts.number.name

        def stop(server: ParameterServer) -> list[Reply]:
            state.update(server.state_dict())
            return server.stop()

        self.service.change(stop)
        check_state(self.service)
        session.flush()
        session.write_checkpoint(state)
        unfinished = state["status"] == Status.running.value
        entries = {"status": status or "failed", "reason": reason or "the script has failed"} if unfinished else {}
        self.summary = session.close(state, wait=True, evictions=[], **entries)
        path = session.directory.path
        done = f"{state['iteration']} of {session.job.total_tickets} iterations, run directory {path}"
        if unfinished:
            say(f"{entries['reason']}: {done}; resume with checkpoint.resume={path}")
        else:
            say(f"the run {self.summary['status']}: {done}")
        return self.summary

    def _of(self, future: ReplyFuture) -> Reply:
        """The reply that a future has, as there is no other worker to wait for.

        Raises:
            PushRefused, RunFailed: the server refuses, or has failed.
        """
        check_state(self.service)
        if not future.done():
            raise RunFailed("the server has no work for the only worker there is")
        answer = future.value()
        if isinstance(answer, ErrorReply):
            raise BY_NAME[answer.error](answer.text)
        return answer

    def _attend(self) -> None:
        """Do what is due between two tickets."""
        session = self.session
        if self._checkpoint.due() or self.interrupts.take_checkpoint():
            session.copy_state()
        if self._limit is not None and self._clock() >= self._limit:
            self._limit = None
            self.service.finish()
        every = session.job.config.evaluate.every or session.job.batches_per_epoch
        if self._flush.due() or session.server.iteration % every == 0:  # evaluations are at once, whatever the time
            session.flush()
            if session.stops_early():
                self.service.finish()

    def _on_start(self) -> None:
        self._clock.start()
        self.session.training_begins()
