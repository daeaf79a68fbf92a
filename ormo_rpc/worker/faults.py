"""Faults on purpose: what dies, hangs, is late, lost or wrong, at a named place and counted.

A fault is one word of ``runtime.faults``, ``KIND@WHO:PUSH`` or ``KIND@WHO:PUSH:AMOUNT``: at push number PUSH of worker WHO (the
first is 0), or at iteration PUSH of WHO = ``server``:

* ``kill``: SIGKILL to itself, right before a worker's push, or right after the server has applied a gradient and before anybody
  is answered;
* ``stop``: SIGSTOP, likewise;
* ``delay``: wait AMOUNT seconds before the push (1 by default);
* ``drop_reply``: the worker throws the answer away, as if it had been lost, and pushes again;
* ``corrupt``: NaN in place of the gradient, in AMOUNT pushes in a row (1 by default).

A fault belongs to the first life of a process: one that is started again has none. Each one that fires is told.
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

_KINDS = ("kill", "stop", "delay", "drop_reply", "corrupt")
_OF_THE_SERVER = ("kill", "stop")
_FORM = re.compile(r"(?P<kind>\w+)@(?P<who>server|\d+):(?P<push>\d+)(:(?P<amount>\d+(\.\d+)?))?")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: What happens.
        worker: To whom; None for the server.
        push: At which push of that worker, or at which iteration of the server.
        amount: Seconds, or a number of pushes.
    """

    kind: str
    worker: int | None
    push: int
    amount: float = 1.0

    def __str__(self) -> str:
        who = "server" if self.worker is None else self.worker
        return f"{self.kind}@{who}:{self.push}" + ("" if self.amount == 1 else f":{self.amount:g}")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """The fault that a word means.

        Raises:
            ValueError: it means none.
        """
        found = _FORM.fullmatch(text)
        known = found is not None and found["kind"] in (_OF_THE_SERVER if found["who"] == "server" else _KINDS)
        if found is None or not known:
            raise ValueError(
                f"runtime.faults: got {text!r}, expected KIND@WHO:PUSH[:AMOUNT] with one of {', '.join(_KINDS)} and a worker's "
                f"number, or kill or stop and server"
            )
        worker = None if found["who"] == "server" else int(found["who"])
        return cls(found["kind"], worker, int(found["push"]), float(found["amount"] or 1))


def are_faults(words: Sequence[str]) -> bool:
    """Whether each of these words means a fault."""
    try:
        for word in words:
            Fault.parse(word)
    except ValueError:
        return False
    return True


class FaultInjector:
    """Lets the faults of one process happen.

    Args:
        words: All faults of the run.
        worker: The process's worker number; None for the server.
        life: How often this process was started before.
        tell: Called right before a fault happens.
    """

    def __init__(self, words: Sequence[str], worker: int | None, life: int, tell: Callable[[str], None]) -> None:
        faults = [Fault.parse(word) for word in words] if life == 0 else []
        self.faults = [fault for fault in faults if fault.worker == worker]
        self.tell = tell
        self.pushes = 0
        """Of a worker: how many it has begun."""

    def before_push(self, payload: Tensor) -> None:
        """In a worker, when its payload is complete and not yet sent."""
        self._strike(self.pushes)
        for fault in self._at("delay", self.pushes):
            time.sleep(fault.amount)
        for fault in self.faults:
            if fault.kind == "corrupt" and 0 <= self.pushes - fault.push < fault.amount:
                self.tell(f"fault {fault}, push {self.pushes}")
                payload.view(torch.uint8).fill_(0xFF)  # NaN in every floating point type
        self.pushes += 1

    def drops_reply(self) -> bool:
        """In a worker, when the push that `before_push` saw is answered."""
        return bool(self._at("drop_reply", self.pushes - 1))

    def applied(self, iteration: int) -> None:
        """In the server, when that many gradients are applied."""
        self._strike(iteration)

    def _strike(self, place: int) -> None:
        for kind, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
            for _ in self._at(kind, place):
                os.kill(os.getpid(), number)

    def _at(self, kind: str, place: int) -> list[Fault]:
        """The faults of a kind that happen here; each happens once, and is told."""
        found = [fault for fault in self.faults if fault.kind == kind and fault.push == place]
        for fault in found:
            self.faults.remove(fault)
            self.tell(f"fault {fault}")
        return found
