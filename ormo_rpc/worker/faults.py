"""Fault injection: processes that die, hang or are late, replies that are lost, and gradients that are wrong.

A fault is one word of ``runtime.faults``: ``KIND@WORKER:PUSH`` or ``KIND@WORKER:PUSH:AMOUNT`` happens at a push of a worker,
counted from 0, and ``KIND@server:ITERATION`` in the server:

* ``kill``: SIGKILL to itself, AMOUNT seconds after a worker's push has begun (0 by default, right before it), or after the
  server has applied a gradient and before it replies;
* ``stop``: SIGSTOP to itself, at the same places;
* ``delay``: sleep AMOUNT seconds before the push (1 by default);
* ``drop_reply``: discard the reply, as if it had been lost, and push again;
* ``corrupt``: push NaN in place of the gradient, in AMOUNT consecutive pushes (1 by default).

``kill`` and ``stop`` also happen while a worker joins: ``KIND@WORKER:join`` when it is a member and has no data path yet,
``KIND@WORKER:connect`` when it has one and has not asked for its first ticket.

Only the first process of the server or of a worker has faults; a restarted one has none. Each fault is reported when it fires.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

_WORKER_KINDS = ("kill", "stop", "delay", "drop_reply", "corrupt")
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
"""The kinds that happen in the server and while a worker joins, too."""
JOIN, CONNECT = "join", "connect"
"""The places of a worker that joins."""
_FORM = re.compile(rf"(?P<kind>\w+)@(?P<process>server|\d+):(?P<place>\d+|{JOIN}|{CONNECT})(:(?P<amount>\d+(\.\d+)?))?")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: What happens.
        worker: The worker number of the process; None for the server.
        place: The push of that worker or the iteration of the server, or where in joining it is.
        amount: Seconds, or a number of pushes.
    """

    kind: str
    worker: int | None
    place: str
    amount: float

    def __str__(self) -> str:
        process = "server" if self.worker is None else self.worker
        return f"{self.kind}@{process}:{self.place}" + (
            "" if self.amount == _default_amount(self.kind) else f":{self.amount:g}"
        )

    @classmethod
    def parse(cls, word: str) -> Fault:
        """Read one word.

        Raises:
            ValueError: it is of another form, or there is no such kind.
        """
        found = _FORM.fullmatch(word)
        if found is None or found["kind"] not in _kinds(found["process"], found["place"]):
            raise ValueError(
                f"runtime.faults: got {word!r}, expected KIND@WORKER:PUSH[:AMOUNT] with one of {', '.join(_WORKER_KINDS)}, or "
                f"KIND@WORKER:{JOIN}, KIND@WORKER:{CONNECT} or KIND@server:ITERATION with one of {', '.join(_SIGNALS)}"
            )
        worker = None if found["process"] == "server" else int(found["process"])
        place = found["place"] if found["place"] in (JOIN, CONNECT) else str(int(found["place"]))
        return cls(found["kind"], worker, place, float(found["amount"] or _default_amount(found["kind"])))


def _kinds(process: str, place: str) -> Collection[str]:
    """The kinds that happen at a place of a process."""
    joining = place in (JOIN, CONNECT)
    if process == "server":
        return () if joining else _SIGNALS
    return _SIGNALS if joining else _WORKER_KINDS


def _default_amount(kind: str) -> float:
    return 0.0 if kind in _SIGNALS else 1.0


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

    def joining(self, place: str) -> None:
        """Call in a worker that joins, at `JOIN` and at `CONNECT`."""
        self._kill_or_stop(place)

    def before_push(self, payload: torch.Tensor) -> None:
        """Call in a worker, once its payload is complete and before it is sent."""
        self._kill_or_stop(str(self.pushes))
        for fault in self._take("delay", str(self.pushes)):
            time.sleep(fault.amount)
        for fault in self.faults:
            if fault.kind == "corrupt" and 0 <= self.pushes - int(fault.place) < fault.amount:
                self.report(f"fault {fault}, push {self.pushes}")
                payload.view(torch.uint8).fill_(0xFF)  # NaN in every floating point type
        self.pushes += 1

    def drops_reply(self) -> bool:
        """Call in a worker, once the push that `before_push` saw is answered; True where the reply is to be discarded."""
        return bool(self._take("drop_reply", str(self.pushes - 1)))

    def applied(self, iteration: int) -> None:
        """Call in the server, once that many gradients are applied."""
        self._kill_or_stop(str(iteration))

    def _kill_or_stop(self, place: str) -> None:
        for kind, number in _SIGNALS.items():
            for fault in self._take(kind, place):
                if fault.amount > 0:  # by another thread, while this one continues
                    threading.Timer(fault.amount, os.kill, (os.getpid(), number)).start()
                else:
                    os.kill(os.getpid(), number)

    def _take(self, kind: str, place: str) -> list[Fault]:
        """Remove the faults of a kind that happen here, since each happens once, and report them."""
        found = [fault for fault in self.faults if fault.kind == kind and fault.place == place]
        for fault in found:
            self.faults.remove(fault)
            self.report(f"fault {fault}")
        return found
