"""Rank 0's records of a run: trace, metrics, evaluations and summary, as other runtimes write them.

Its clock stands still while rank 0 records and evaluates, when all ranks wait: nobody computes then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from ormo_rpc.devices import peak_bytes
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.runtimes.ddp.meeting import MAX_ROUNDS, Decision, Reports, Verdict
from ormo_rpc.runtimes.ddp.rank_devices import RankDevice
from ormo_rpc.runtimes.ddp.rounds import Rounds
from ormo_rpc.runtimes.ddp.trainer import Computed, together
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.session import Session
from ormo_rpc.runtimes.simulator import InlineExecutor
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import Status
from ormo_rpc.server.validation import all_finite
from ormo_rpc.storage.summary import device_entries

MEETING_SECONDS = 0.1
"""The interval of meetings, where rounds are shorter."""


class TrainingClock:
    """Seconds of training: it stands still between `pause` and `resume`."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None

    def resume(self) -> None:
        """Begin to count, or go on."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Stand still."""
        self._seconds, self._since = self(), None

    def __call__(self) -> float:
        """Return the seconds."""
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)


@dataclass(frozen=True)
class Timed:
    """A round's beginning and end on the clock.

    Attributes:
        began: Seconds.
        ended: Seconds.
    """

    began: float
    ended: float


class Recording:
    """The session of a run, whose parameter server is given what the ranks have computed: it makes no step of its own.

    Args:
        job: The run.
        model: Of rank 0, as training leaves it.
        rounds: The rounds of the run.
        run_dir: The run directory.
        began: The start of the run on the monotonic clock.
        terminal: A descriptor for the progress bar, where there is a terminal.
        start: The way in which processes are started, for the summary.
        devices: Those of all ranks, for the summary.
    """

    def __init__(
        self,
        job: Job,
        model: FlatModel,
        rounds: Rounds,
        run_dir: Path,
        *,
        began: float,
        terminal: int | None,
        start: str,
        devices: Sequence[RankDevice] = (),
    ) -> None:
        self.clock = TrainingClock()
        self._job = job
        self._model = model
        self._rounds = rounds
        self._start = start
        self._devices = {rank: each.text for rank, each in enumerate(devices)}
        self._evaluated_every = job.config.evaluate.every or job.batches_per_epoch
        inline = InlineExecutor()
        self._session = Session(job, run_dir, inline, inline, self.clock, began=began, terminal=terminal, inline=True)
        self._session.open()
        self._times: list[Timed] = []
        self._done = 0
        """Rounds that are recorded."""
        self._status: dict[str, str] = {}

    def begin(self) -> None:
        """Note that the first round begins."""
        self._session.training_begins()
        self.clock.resume()

    def timed(self, began: float) -> None:
        """Note the end of a round."""
        self._times.append(Timed(began, self.clock()))

    def decide(self, reports: Reports) -> Decision:
        """Record what was computed since the last meeting, evaluate where that is due, and decide what all ranks do next.

        Raises:
            OSError: something cannot be written.
        """
        self.clock.pause()
        server, times, self._times = self._session.server, self._times, []
        finite = all(math.isfinite(each.loss) for row in reports.computed for each in row if each.loss is not None)
        if finite:
            for number, (row, timed) in enumerate(zip(reports.computed, times, strict=True), self._done):
                self._record(number, row, timed)
            self._done += len(times)
            server.iteration = server.assignments.issued = server.assignments.committed = self._rounds.tickets(
                self._done - 1
            ).stop
            server.algorithm.params = self._model.flat_params().cpu()
            server.buffers.load_state_dict({name: each.cpu() for name, each in self._model.buffers.tensors.items()})
            server.snapshots.invalidate()
        finite = finite and all_finite(server.params)
        if not finite:
            self._end(Status.diverged)
        elif self._done == self._rounds.count or self._is_late():
            self._end(Status.completed)
        self._session.observe(server)
        self._session.flush()
        if not server.ended and self._session.stops_early():
            self._end(Status.completed)
        if server.ended:
            return Decision(Verdict.end)
        if reports.signal:
            self._status = {"status": "interrupted", "reason": Signals(reports.signal).name}
            return Decision(Verdict.interrupt, signal=reports.signal)
        return Decision(Verdict.proceed, self._rounds_to_next(times))

    def close(self) -> dict[str, Any]:
        """Write the last state and the summary; return the latter's content.

        Raises:
            OSError: they cannot be written.
        """
        state = self._session.server.state_dict()
        self._session.flush()
        self._session.write_checkpoint(state)
        told = device_entries(self._devices, [peak_bytes(self._model.device)])
        return self._session.close(state, wait=True, start=self._start, step_seconds=None, **told, **self._status)

    def _record(self, number: int, row: Sequence[Computed], timed: Timed) -> None:
        """Record the tickets of a round; every gradient is of the very parameters that it is applied to, so none is late."""
        tickets, record = self._rounds.tickets(number), self._session.recorder.record
        eta = self._job.lr(tickets[-1])
        places = [
            {"worker": worker, "ticket": ticket, "stamp": tickets.start, "bucket": number}
            for worker, ticket in enumerate(tickets)
        ]
        for place in places:
            record(Event(Kind.issue, timed.began, place))
        last = len(tickets) - 1  # a short round has fewer tickets than ranks, whose shares may be of all of them
        for place, computed in zip(places, (*row[:last], together(row[last:])), strict=True):
            result = {"delay": 0, "eta": eta, "loss": computed.loss, "samples": computed.samples}
            record(Event(Kind.apply, timed.ended, {"iteration": place["ticket"], **place, **result}))

    def _end(self, status: Status) -> None:
        server = self._session.server
        server.status = status
        server.events.add(Kind.end, iteration=server.iteration, status=status.value)

    def _is_late(self) -> bool:
        limit = self._job.config.train.max_seconds
        return limit is not None and self.clock() >= limit

    def _rounds_to_next(self, times: Sequence[Timed]) -> int:
        """Return the number of rounds to the next meeting, which there is after each evaluation's round."""
        seconds = (times[-1].ended - times[0].began) / len(times)
        wanted = min(MAX_ROUNDS, max(1, int(MEETING_SECONDS / max(seconds, 1e-6))))
        iteration, every = self._session.server.iteration, self._evaluated_every
        to_evaluation = -(-(every - iteration % every) // self._rounds.size)
        return min(wanted, to_evaluation, self._rounds.count - self._done)
