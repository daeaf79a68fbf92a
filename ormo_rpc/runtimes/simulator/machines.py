"""The machines of a virtual cluster: when each worker computes, and how much of it has passed."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Computation:
    """The computation of a worker's newest ticket, in virtual seconds.

    Attributes:
        begin: The time at which it begins, once its machine is free.
        seconds: The time that it takes.
    """

    begin: float
    seconds: float

    @property
    def end(self) -> float:
        """The time at which it is done."""
        return self.begin + self.seconds

    def left(self, now: float) -> float:
        """Return the part of its seconds that has not passed."""
        return min(self.seconds, max(0.0, self.end - now))


class Machines:
    """The machines of all workers: one for each, or fewer that workers share.

    Args:
        processes: The number of machines at the start, where workers share them: worker k computes on machine k modulo that
            number, which computes for one worker at a time, in the order in which they ask.
        num_workers: The number of workers at the start; one with a higher number has a machine of its own.
    """

    def __init__(self, processes: int | None, num_workers: int) -> None:
        self._processes = processes
        self._num_workers = num_workers
        self._work: dict[int, Computation] = {}
        """By worker; it may be over."""

    def _sharing(self, worker: int) -> Sequence[int]:
        """Return the workers on the machine of a worker, itself included; none where it never waits for the machine."""
        if self._processes is None or worker >= self._num_workers:
            return ()
        return range(worker % self._processes, self._num_workers, self._processes)

    def compute(self, worker: int, seconds: float, now: float) -> float:
        """Let a worker compute for so long, as soon as its machine is free; return the time at which it is done."""
        ends = [self._work[each].end for each in self._sharing(worker) if each in self._work]
        self._work[worker] = Computation(max([now, *ends]), seconds)
        return self._work[worker].end

    def stop(self, worker: int, now: float) -> float:
        """Take a worker's computation off its machine; return the part of its seconds that has not passed."""
        work = self._work.pop(worker, None)
        return 0.0 if work is None else work.left(now)

    def stop_waiting(self, worker: int, now: float) -> dict[int, float]:
        """Take off what waits for the machine of a worker: the seconds of each computation by worker, in its order."""
        waiting = [each for each in self._sharing(worker) if each in self._work and self._work[each].begin > now]
        waiting.sort(key=lambda each: self._work[each].begin)
        return {each: self._work.pop(each).seconds for each in waiting}

    def state_dict(self) -> dict[int, tuple[float, float]]:
        """Return when the computation of each worker begins and how long it takes."""
        return {worker: (work.begin, work.seconds) for worker, work in self._work.items()}

    def load_state_dict(self, state: Mapping[str, Any], members: Container[int]) -> None:
        """Restore the state in that of a cluster.

        An earlier version wrote ends alone, of machines and of workers, also of workers that had left. Those of members count
        as begun, so that `stop_waiting` moves none.
        """
        if "work" in state:
            self._work = {worker: Computation(*times) for worker, times in state["work"].items()}
            return
        ends = {**state.get("computing_until", {}), **state.get("ends", {})}
        self._work = {worker: Computation(0.0, end) for worker, end in ends.items() if worker in members}
