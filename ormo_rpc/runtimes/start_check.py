"""The check at the start of a live run that all processes have made the same initial parameters and buffers.

Each rank gathers the hash of all others' by a process group, beside the rest of the start: in a thread, in the first process of
each rank, and over before training begins. The run does not depend on it. Where a rank dies meanwhile, or is late, the check is
not completed, a line in the log says so, and the run goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from ormo_rpc.errors import Refused, one_line
from ormo_rpc.runtimes.collectives import Call, SharedStore, gather, process_group

GROUP_TIMEOUT_SECONDS = 2.0
"""For each operation of the group."""
WAIT_SECONDS = 1.0
"""A process that could begin to train waits at most this long for the check."""
NOT_COMPARED = "the initial parameters of all processes were not compared: %s"
_log = logging.getLogger(__name__)


class StartCheck:
    """One rank's part of the check; its thread begins with it.

    Args:
        rank: Of this process.
        size: The number of ranks.
        digest: Returns the hash of this process's initial values; called in the thread.
        call: Brings a request to the `SharedValues` of the group.
        host: The address of this machine at which the other ranks reach it.
        timeout_seconds: For all ranks to come.
    """

    def __init__(
        self, rank: int, size: int, digest: Callable[[], bytes], call: Call, *, host: str, timeout_seconds: float
    ) -> None:
        self._rank, self._size, self._digest, self._host = rank, size, digest, host
        self._given_up, self._done = threading.Event(), threading.Event()
        self._difference: str | None = None
        self._store = SharedStore(call, size, timeout_seconds=timeout_seconds, given_up=self._given_up)
        threading.Thread(target=self._run, name="start check", daemon=True).start()

    def finish(self, wait_seconds: float = WAIT_SECONDS) -> None:
        """Wait for the result, and give the check up where it does not come in time; nobody waits for it again.

        Raises:
            Refused: ranks differ, and this one is among them.
        """
        if self._given_up.is_set():
            return
        in_time = self._done.wait(wait_seconds)
        self._given_up.set()
        if not in_time:
            _log.info(NOT_COMPARED, "a process has died, or is late")
        elif self._difference is not None:
            raise Refused(self._difference)

    def _run(self) -> None:
        try:
            digest = self._digest()
            if self._given_up.is_set():  # the parameters may have changed meanwhile
                return
            with process_group(
                self._store, self._rank, self._size, host=self._host, timeout_seconds=GROUP_TIMEOUT_SECONDS
            ) as group:
                self._compare(gather(group, digest))
                self._done.set()  # to destroy the group takes tens of milliseconds
        except Exception as error:  # a rank has died or is late, or the server cannot be reached
            if not self._given_up.is_set():
                _log.info(NOT_COMPARED, one_line(error).partition(". This is typically")[0])
        finally:
            self._done.set()

    def _compare(self, digests: Sequence[bytes]) -> None:
        difference = difference_of(digests)
        if difference is None:
            _log.info("all %d processes have the same initial parameters", self._size)
        elif self._rank > 0 and digests[self._rank] != digests[0]:
            self._difference = difference
        else:
            _log.info("%s", difference)


def difference_of(digests: Sequence[bytes]) -> str | None:
    """Say in one line which ranks differ from rank 0; None where none does."""
    others = [f"rank {rank} (worker {rank - 1})" for rank, digest in enumerate(digests) if digest != digests[0]]
    if not others:
        return None
    return (
        f"model: the initial parameters or buffers of {', '.join(others)} differ from those of rank 0 (the server); every "
        "process must make the same: draw from torch, random or numpy.random, which are seeded"
    )
