"""Fault injection: processes that die, hang or are late, replies that are lost, and gradients that are wrong.

A fault is one word of ``runtime.faults``: ``KIND@WORKER:PUSH`` or ``KIND@WORKER:PUSH:AMOUNT`` happens at a push of a worker,
counted from 0, and ``KIND@server:ITERATION`` in the server:

* ``kill``: SIGKILL to itself, right before a worker's push, or after the server has applied a gradient and before it replies;
* ``stop``: SIGSTOP to itself, at the same places;
* ``delay``: sleep AMOUNT seconds before the push (1 by default);
* ``drop_reply``: discard the reply, as if it had been lost, and push again;
* ``corrupt``: push NaN in place of the gradient, in AMOUNT consecutive pushes (1 by default).

Only the first process of the server or of a worker has faults; a restarted one has none. Each fault is reported when it fires.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WORKER_KINDS = ("kill", "stop", "delay", "drop_reply", "corrupt")
_SERVER_KINDS = ("kill", "stop")
_FORM = re.compile(r"(?P<kind>\w+)@(?P<process>server|\d+):(?P<place>\d+)(:(?P<amount>\d+(\.\d+)?))?")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: What happens.
        worker: The worker number of the process; None for the server.
        place: The push of that worker, or the iteration of the server.
        amount: Seconds of a delay, or a number of pushes.
    """

    kind: str
    worker: int | None
    place: int
    amount: float = 1.0

    def __str__(self) -> str:
        process = "server" if self.worker is None else self.worker
        return f"{self.kind}@{process}:{self.place}" + ("" if self.amount == 1 else f":{self.amount:g}")

    @classmethod
    def parse(cls, word: str) -> Fault:
        """Read one word.

        Raises:
            ValueError: it is of another form, or there is no such kind.
        """
        found = _FORM.fullmatch(word)
        known = found is not None and found["kind"] in (_SERVER_KINDS if found["process"] == "server" else _WORKER_KINDS)
        if found is None or not known:
            raise ValueError(
                f"runtime.faults: got {word!r}, expected KIND@WORKER:PUSH[:AMOUNT] with one of {', '.join(_WORKER_KINDS)}, or "
                f"KIND@server:ITERATION with one of {', '.join(_SERVER_KINDS)}"
            )
        worker = None if found["process"] == "server" else int(found["process"])
        return cls(found["kind"], worker, int(found["place"]), float(found["amount"] or 1))


def are_faults(words: Sequence[str]) -> bool:
    """Check that each word is a fault."""
    try:
        for word in words:
            Fault.parse(word)
    except ValueError:
        return False
    return True


class FaultInjector:
    """Makes the faults of one process happen.

    Args:
        words: All faults of the run.
        worker: The worker number of this process; None for the server.
        restart_count: Earlier processes of this server or worker; only the first one has faults.
        report: Called right before a fault happens.
    """

    def __init__(self, words: Sequence[str], worker: int | None, restart_count: int, report: Callable[[str], None]) -> None:
        faults = [Fault.parse(word) for word in words] if restart_count == 0 else []
        self.faults = [fault for fault in faults if fault.worker == worker]
        self.report = report
        self.pushes = 0
        """Pushes that a worker has begun."""

    def before_push(self, payload: Tensor) -> None:
        """Call in a worker, once its payload is complete and before it is sent."""
        self._kill_or_stop(self.pushes)
        for fault in self._take("delay", self.pushes):
            time.sleep(fault.amount)
        for fault in self.faults:
            if fault.kind == "corrupt" and 0 <= self.pushes - fault.place < fault.amount:
                self.report(f"fault {fault}, push {self.pushes}")
                payload.view(torch.uint8).fill_(0xFF)  # NaN in every floating point type
        self.pushes += 1

    def drops_reply(self) -> bool:
        """Call in a worker, once the push that `before_push` saw is answered; True where the reply is to be discarded."""
        return bool(self._take("drop_reply", self.pushes - 1))

    def applied(self, iteration: int) -> None:
        """Call in the server, once that many gradients are applied."""
        self._kill_or_stop(iteration)

    def _kill_or_stop(self, place: int) -> None:
        for kind, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
            for _ in self._take(kind, place):
                os.kill(os.getpid(), number)

    def _take(self, kind: str, place: int) -> list[Fault]:
        """Remove the faults of a kind that happen here, since each happens once, and report them."""
        found = [fault for fault in self.faults if fault.kind == kind and fault.place == place]
        for fault in found:
            self.faults.remove(fault)
            self.report(f"fault {fault}")
        return found
