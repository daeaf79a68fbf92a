"""The control plane on the connection of the lease, without torch.distributed.rpc (``runtime.control=socket``).

A call is a line ``{"call": number, "name": ..., "arguments": ...}``, its result ``{"answer": number, "result": ...}``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import override

from ormo_rpc.control.calls import Calls
from ormo_rpc.control.dispatch import Dispatcher
from ormo_rpc.errors import ServerLost, WireError
from ormo_rpc.rendezvous.lease import Lease


def answer_line(
    message: Mapping[str, Any],
    send: Callable[[Mapping[str, Any]], None],
    call: Callable[[str, str], str],
    dispatcher: Dispatcher,
) -> None:
    """Make the call of a line, in a thread of the dispatcher, and send the result.

    Raises:
        WireError: the line is no call.
    """
    number, name, arguments = (message.get(key) for key in ("call", "name", "arguments"))
    if type(number) is not int or not isinstance(name, str) or not isinstance(arguments, str):
        raise WireError("a line came that is neither a heartbeat nor a call")

    def work() -> None:
        result = call(name, arguments)
        with contextlib.suppress(OSError, EOFError):  # the lease has ended, which its own thread notices
            send({"answer": number, "result": result})

    dispatcher.submit(work, may_wait=True)


class LineControl(Calls):
    """Makes calls on the connection of a lease. `_lock` guards `_waiting`.

    Args:
        lease: To be entered after this object was made, which reads its messages.
    """

    def __init__(self, lease: Lease) -> None:
        super().__init__(lease.admission.admission_id)
        self._lease = lease
        self._timeout_seconds = lease.admission.call_timeout_seconds
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting: dict[int, queue.SimpleQueue[str | None]] = {}
        """Of each call without an answer, where to put it; None once the lease is lost."""
        lease.received = self._received

    @override
    def present_state(self) -> None:
        return None

    @override
    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        number, answer = next(self._numbers), queue.SimpleQueue[str | None]()
        with self._lock:
            self._waiting[number] = answer
        try:
            if self._lease.lost.is_set():
                raise ServerLost("the lease is lost")
            self._lease.send({"call": number, "name": name, "arguments": json.dumps(arguments)})
            result = answer.get(timeout=self._timeout_seconds)
        except queue.Empty:
            raise ServerLost(f"{name}: no answer within {self._timeout_seconds:g} s") from None
        finally:
            with self._lock:
                self._waiting.pop(number, None)
        if result is None:
            raise ServerLost("the lease is lost")
        return result

    def _received(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            number = message.get("answer")
            waiting = [*self._waiting.values()] if not message else [self._waiting[number]] if number in self._waiting else []
        for each in waiting:
            each.put(message.get("result"))
