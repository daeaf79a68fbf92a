"""The check at the start of a live run that all processes have made the same initial parameters.

Every reply has the server's parameters, so ranks that differ train as they should; but their code or their files differ, and
what else does is not known. Processors of other kinds may round a draw differently: there a difference means nothing, and is
no more than a line in the log.

Each rank gathers the hash of all others' by a process group, beside the rest of the start: in a thread, in the first process of
each rank, and over before training begins. The run does not depend on it. Where a rank dies meanwhile, or is late, the check is
not completed, a line in the log says so, and the run goes on.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence

from ormo_rpc.errors import Refused, one_line
from ormo_rpc.runtimes.collectives import Call, SharedStore, gather, process_group
from ormo_rpc.storage.environment import arithmetic

GROUP_TIMEOUT_SECONDS = 2.0
"""For each operation of the group."""
DIGEST_BYTES = 32
"""Of the hash of the parameters; behind it comes that of the machine."""
WAIT_SECONDS = 1.0
"""A process that could begin to train waits at most this long for the check."""
NOT_COMPARED = "the initial parameters of all processes were not compared: %s"
_log = logging.getLogger(__name__)


class StartCheck:
    """One rank's part of the check; its thread begins with it.

    Args:
        rank: Of this process.
        size: The number of ranks.
        digest: Returns the hash of this process's initial parameters; called in the thread.
        call: Brings a request to the `SharedValues` of the group.
        host: The address of this machine at which the other ranks reach it.
        timeout_seconds: For all ranks to come.
        machine: The hash of what decides how this process rounds a draw.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        digest: Callable[[], bytes],
        call: Call,
        *,
        host: str,
        timeout_seconds: float,
        machine: bytes | None = None,
    ) -> None:
        self._rank, self._size, self._digest, self._host = rank, size, digest, host
        self._machine = machine_digest() if machine is None else machine
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
            digest = self._digest() + self._machine
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
        others = [rank for rank, digest in enumerate(digests) if digest[:DIGEST_BYTES] != digests[0][:DIGEST_BYTES]]
        alike = [rank for rank in others if digests[rank][DIGEST_BYTES:] == digests[0][DIGEST_BYTES:]]
        if not others:
            _log.info("all %d processes have the same initial parameters", self._size)
        elif self._rank in alike:
            self._difference = difference(alike)
        elif alike:
            _log.info("%s", difference(alike))
        else:
            _log.info("the processors or the torch of %s make other initial parameters; the server's count", _names(others))


def machine_digest() -> bytes:
    """Hash what decides how this process rounds a random draw, in 32 bytes."""
    return hashlib.sha256(repr(arithmetic()).encode()).digest()


def difference(ranks: Sequence[int]) -> str:
    """Say in one line that these ranks differ from rank 0."""
    return (
        f"model: the initial parameters of {_names(ranks)} differ from those of rank 0 (the server); every process must make "
        "the same: draw from torch, random or numpy.random, which are seeded"
    )


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(f"rank {rank} (worker {rank - 1})" for rank in ranks)
