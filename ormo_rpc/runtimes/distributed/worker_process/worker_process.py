"""A worker's process: one loop from reply to push, or several where it works ahead."""

from __future__ import annotations

import threading

from ormo_rpc.runtimes.distributed.worker_process.loop import WorkerArgs, WorkerContext, WorkerLoop
from ormo_rpc.runtimes.job import Job


class WorkerProcess:
    """Everything in a worker's process.

    Args:
        place: Where and as whom to work.
    """

    def __init__(self, place: WorkerArgs) -> None:
        self.place = place
        self.context = WorkerContext(place)
        self.loops = [WorkerLoop(self.context, place.wanted)]
        self._threads: list[threading.Thread] = []
        """Of all loops but the first, which has the main thread."""
        self._patience_seconds = 0.0
        """How long a ticket may take, as the configuration says."""
        self._failures: list[Exception] = []
        """Why those have ended, where it was not that their work was done."""

    def run(self) -> None:
        """WorkerProcess until told to stop.

        Raises:
            ServerLost: the server did not come back in time.
            WorkerBanned: this worker is not wanted any more.
        """
        self.loops[0].run(on_job=self._work_ahead)
        for thread in self._threads:
            # Told to stop as we were; one that computes for longer is late for the server, too.
            thread.join(self._patience_seconds)
        if self._failures:
            raise self._failures[0]

    def leave(self) -> None:
        """Ask to leave; called from another thread."""
        self.context.leaving = True
        for loop in self.loops:
            loop.leave()

    def _work_ahead(self, job: Job) -> None:
        """Start further loops, once, as soon as we know how many."""
        config = job.config
        self._patience_seconds = config.rpc.ticket_timeout_seconds
        for ahead in range(len(self.loops), 1 + config.worker.prefetch):
            wanted = None if self.place.wanted is None else self.place.wanted + ahead * config.num_processes
            self.loops.append(WorkerLoop(self.context, wanted))
            self._threads.append(threading.Thread(target=self._run, args=(self.loops[-1],), name=f"ahead {ahead}", daemon=True))
            self._threads[-1].start()

    def _run(self, loop: WorkerLoop) -> None:
        try:
            loop.run()
        except Exception as error:
            self._failures.append(error)
            self.leave()
