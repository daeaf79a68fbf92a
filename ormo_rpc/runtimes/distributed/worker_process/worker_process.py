"""A worker's process, to the end of the run.

A process has one loop, or with ``worker.prefetch`` several, each with a membership of its own: while one waits for its reply,
another one computes. To the server and the algorithm each is a worker, so K counts all of them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable

from ormo_rpc.runtimes.distributed.worker_process.context import WorkerArgs, WorkerContext, WorkerJob, configured_job
from ormo_rpc.runtimes.distributed.worker_process.region import RegionProcesses
from ormo_rpc.runtimes.distributed.worker_process.worker_loop import WorkerLoop
from ormo_rpc.runtimes.job import Job
from ormo_rpc.worker.heterogeneity import cpu_seconds
from ormo_rpc.worker.worker import Worker


class WorkerProcess:
    """The loops of a process whose workers compute by themselves; the first one has the main thread.

    Args:
        args: The arguments of the process.
    """

    def __init__(self, args: WorkerArgs) -> None:
        self.args = args
        self.context = WorkerContext[Worker](args, functools.partial(configured_job, args))
        self.loops = [WorkerLoop(self.context, args.preferred_worker)]
        self._threads: list[threading.Thread] = []
        """Of the further loops."""
        self._ticket_timeout_seconds = 0.0
        self._region: RegionProcesses | None = None
        """The region that this process is, where workers are regions."""
        self._failures: list[Exception] = []
        """Errors that ended further loops."""

    def run(self) -> None:
        """Work to the end of the run.

        Raises:
            ServerLost: the server did not come back in time.
            WorkerBanned: the server has banned this worker.
        """
        try:
            self._compute(self.loops[0], self._prepare)
        finally:
            if self._region is not None:
                self._region.close()
        for thread in self._threads:
            # The run has ended for it too; one that computes for longer than that is late for the server as well.
            thread.join(self._ticket_timeout_seconds)
        if self._failures:
            raise self._failures[0]

    def leave(self) -> None:
        """Ask to leave; called from another thread."""
        self.context.leaving = True
        for loop in self.loops:
            loop.leave()

    def _compute(self, loop: WorkerLoop[Worker], on_job: Callable[[WorkerJob[Worker]], None] = lambda _: None) -> None:
        """Answer the replies of a loop, to the end of the run."""
        compute_lock = self.context.compute_lock
        with contextlib.closing(loop.replies(on_job)) as replies:
            reply = next(replies, None)
            while reply is not None:
                worker, began = loop.worker, cpu_seconds()
                worker.load(reply)
                with compute_lock:
                    push = worker.compute(reply) if self._region is None else worker.relay(self._region.compute(reply))
                    loop.slow_down(cpu_seconds() - began)
                loop.complete_push()  # while another loop of this process computes
                try:
                    reply = replies.send(push)
                except StopIteration:
                    return

    def _prepare(self, job: WorkerJob[Worker]) -> None:
        """Make the region, where this process is one, and start prefetching."""
        if job.config.algorithm.workers_are_regions and self._region is None:
            assert isinstance(job, Job)
            self._region = RegionProcesses(job, self.args.data_root)
        self._start_prefetching(job)

    def _start_prefetching(self, job: WorkerJob[Worker]) -> None:
        """Start further loops, once, as soon as their number is known."""
        config, preferred = job.config, self.args.preferred_worker
        self._ticket_timeout_seconds = config.rpc.ticket_timeout_seconds
        for ahead in range(len(self.loops), 1 + config.worker.prefetch):
            loop = WorkerLoop(self.context, None if preferred is None else preferred + ahead * config.num_processes)
            self.loops.append(loop)
            self._threads.append(threading.Thread(target=self._run, args=(loop,), name=f"prefetch {ahead}", daemon=True))
            self._threads[-1].start()

    def _run(self, loop: WorkerLoop[Worker]) -> None:
        try:
            self._compute(loop)
        except Exception as error:
            self._failures.append(error)
            self.leave()
