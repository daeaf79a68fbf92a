"""Connections to where another process is to listen, and telling people why there is none yet."""

from __future__ import annotations

import errno
import logging
import socket
import struct
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

CONNECT_SECONDS = 4.0
"""The time for one attempt: what was dropped is sent again after 1 and 3 s, and after 3 s a host is known to be missing."""
TELL_AFTER_SECONDS = 5.0
"""The time after which failures are told; each further pause is three times as long as the one before."""
TELL_WAITING_SECONDS = 30.0
"""The time after which it is told, too, that nothing has failed and nothing has come."""
WIDENING = 3
NO_ANSWER = "no answer within {:g} s, as behind a firewall"
_TABLES = {socket.AF_INET: Path("/proc/self/net/tcp"), socket.AF_INET6: Path("/proc/self/net/tcp6")}
"""Linux: the tables of all connections: in column 1 the own end, in 2 the other one, in 3 the state."""
_UNANSWERED, _LISTENS = "02", "0A"
_NO_WAY = {
    errno.ENETUNREACH: "no route",
    errno.EHOSTUNREACH: "no route",
    errno.EINVAL: "no route",  # of a route whose kind is blackhole
    errno.EACCES: "not allowed",
    errno.EPERM: "not allowed",
}
_log = logging.getLogger(__name__)


class NoConnection(ConnectionError):
    """A connection cannot be opened; the message says why."""


class NothingListens(NoConnection):
    """A machine refuses connections to one of its addresses."""


def open_connection(address: tuple[str, int], timeout_seconds: float) -> socket.socket:
    """Make one attempt to open a connection, which takes at most `CONNECT_SECONDS`.

    Raises:
        NoConnection: it failed, or was refused (`NothingListens`).
    """
    limit = min(timeout_seconds, CONNECT_SECONDS)
    try:
        return socket.create_connection(address, limit)
    except ConnectionRefusedError:
        raise NothingListens("refused: nothing listens there") from None
    except OSError as error:
        raise NoConnection(_reason(error, address[0], limit)) from None


def _reason(error: OSError, host: str, seconds: float) -> str:
    text = error.strerror or str(error) or type(error).__name__
    if isinstance(error, socket.gaierror):
        return f"the name {host} is not resolved ({text})"
    if isinstance(error, TimeoutError):
        return NO_ANSWER.format(seconds)
    if error.errno in _NO_WAY:
        return f"{_NO_WAY[error.errno]} ({text})"
    return text


def is_unanswered(address: tuple[str, int]) -> bool:
    """Tell whether a connection to an address in digits, which anybody on this machine has begun to open, waits for an answer.

    False where the system does not tell.
    """
    rows = _connections(address)
    return rows is not None and (_in_table(address), _UNANSWERED) in ((row[2], row[3]) for row in rows)


def listens(address: tuple[str, int]) -> bool:
    """Tell whether anybody on this machine listens at an address in digits; True where the system does not tell.

    A connection is no way to find out: torch's agents cannot bear one that ends at once.
    """
    rows = _connections(address)
    return rows is None or (_in_table(address), _LISTENS) in ((row[1], row[3]) for row in rows)


def _connections(address: tuple[str, int]) -> list[list[str]] | None:
    """The rows of the table of connections of an address's kind; None where the system has none."""
    table = _TABLES[socket.AF_INET6 if ":" in address[0] else socket.AF_INET]
    try:
        return [line.split() for line in table.read_text(encoding="ascii").splitlines()[1:]]
    except OSError:
        return None


def _in_table(address: tuple[str, int]) -> str:
    """An address as it stands there: each word of 32 bits has the byte order of the machine."""
    host, port = address
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"


class Patience:
    """Time for something that may fail again and again; tells after a while, and then ever more seldom, why it still does.

    It tells in a thread of its own, from the begin of its context to the end, so that it does so during a long call as well.

    Args:
        failure: The words for the failure, such as "no server can be joined at 10.0.0.5:29400".
        timeout_seconds: The time.
        silent: Tell nothing.
    """

    def __init__(self, failure: str, timeout_seconds: float, *, silent: bool = False) -> None:
        self._failure = failure
        self._timeout_seconds = timeout_seconds
        self._silent = silent
        self._began = time.monotonic()
        self._reason = ""
        self._waiting_for = ""
        self._end = threading.Event()

    def __enter__(self) -> Self:
        if not self._silent:
            threading.Thread(target=self._tell, name="patience", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()

    @property
    def seconds(self) -> float:
        """The time that has passed."""
        return time.monotonic() - self._began

    @property
    def left_seconds(self) -> float:
        """The time that is left; negative once it is over."""
        return self._timeout_seconds - self.seconds

    @property
    def attempt_seconds(self) -> float:
        """The time for one more attempt, which is not cut so short that it fails for that alone."""
        return max(self.left_seconds, CONNECT_SECONDS)

    def waits_for(self, text: str) -> None:
        """Note what is waited for, which is no failure yet."""
        self._waiting_for = text

    def failed(self, error: Exception) -> None:
        """Note why the newest attempt has failed."""
        self._reason = str(error) or type(error).__name__

    def given_up(self) -> str:
        """The words for the end of the time."""
        return f"{self._failure}: {self._why()}; gave up after {self.seconds:.1f} s"

    def _why(self) -> str:
        return self._reason or self._waiting_for or "no attempt has ended"

    def _tell(self) -> None:
        at = TELL_AFTER_SECONDS
        while not self._end.wait(at - self.seconds):
            if self._reason or self.seconds >= TELL_WAITING_SECONDS:
                _log.warning("%s: %s; trying for another %.0f s", self._failure, self._why(), max(self.left_seconds, 0))
            at *= WIDENING
