"""The server's half of ``transport=gloo``: a pair for each worker, with a thread for each.

The memory for the next push is posted before the reply to this one is sent, and the worker posts that of a reply before it
pushes, so no message ever waits for the other side. Parameters are sent from the snapshot itself.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.errors import StaleSession, WireError
from ormo_rpc.messages import ErrorReply, no_buffers
from ormo_rpc.rendezvous.protocol import printable
from ormo_rpc.transports.base import MAX_REASON_CHARACTERS, ServerSide, Service
from ormo_rpc.transports.codec import pack_error
from ormo_rpc.transports.gloo.addresses import Address
from ormo_rpc.transports.gloo.header import HEADER_BYTES
from ormo_rpc.transports.gloo.pair import SERVER, Pair, PairLost, Transfer, make_pair
from ormo_rpc.transports.pending_replies import ReplyFuture, ServerResponse, refusals_as_replies, wait_while
from ormo_rpc.transports.push_reader import PushReader
from ormo_rpc.transports.stream import frames
from ormo_rpc.transports.stream.frames import INLINE, RESPONSE_BYTES, Request, bytes_of

OPEN_SECONDS = 10.0
"""A pair that is not made by then is given up."""
UNTIL_CLOSED = timedelta(days=365)
"""The time-out of waits that end with the membership: either side closes the pair then."""
LAST_REPLY_SECONDS = 1.0
"""The time for the reply that tells an evicted worker the reason."""
CLOSE_SECONDS = 3.0
"""The time for the thread of a pair that is closed. One that came back from Gloo while the process ends would abort it."""
MAX_ERROR_CHARACTERS = 1000
ERROR_BYTES = 16 * 1024
"""Room for that many characters of an error reply as JSON, whatever they are."""
NUMBERS, PARAMS, END, ARRIVED = range(4)
"""The tags of messages: numbers with what is small, parameters, the end of a request or response, and that a response came."""
_log = logging.getLogger(__name__)


def small_bytes(buffer_bytes: int) -> int:
    """The memory for the numbers of a reply, and the model's buffers or an error reply behind them."""
    return RESPONSE_BYTES + max(buffer_bytes, ERROR_BYTES)


class GlooServerSide(ServerSide):
    """Makes a pair for each worker that asks for one. `_lock` guards `_sessions` and `_closed`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        """The newest of each membership."""
        self._closed = False

    @override
    def answer(self, session_id: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        service = self.service
        if not service.is_member(session_id):
            raise StaleSession("gloo: got a session that is not valid; rejoin")
        expected = service.push_format.size
        if request.get("payload") != expected:
            raise ValueError(
                f"gloo: push: got {request.get('payload')!r} bytes, expected {expected}; worker and server must have the same "
                f"model and wire format"
            )
        host, reason = request.get("host"), printable(request.get("reason"), MAX_REASON_CHARACTERS)
        if not isinstance(host, str):
            raise ValueError("gloo: got other fields than expected: address, host, payload, reason")
        session = Session(service, session_id, host, Address.parse(request.get("address")), reason)
        with self._lock:
            if self._closed:
                raise StaleSession("gloo: the server has ended")
            former = self._sessions.get(session_id)
            self._sessions[session_id] = session
        if former is not None:
            former.close()
        address = session.start(lambda: self._remove(session))
        if not service.is_member(session_id):  # it has ended since, and `session_ended` may have come too early
            session.close()
        size = service.reply_size
        return {"address": vars(address), "params": size.params, "buffers": size.buffers}

    @override
    def session_ended(self, session_id: str) -> None:
        with self._lock:
            session = self._sessions.get(session_id)
        if session is not None:
            session.end()

    @override
    def close(self) -> None:
        with self._lock:
            self._closed = True
            sessions = list(self._sessions.values())
        for session in sessions:
            session.close()
        for session in sessions:
            session.join(CLOSE_SECONDS)

    def _remove(self, session: Session) -> None:
        with self._lock:
            if self._sessions.get(session.session_id) is session:
                del self._sessions[session.session_id]


class Session:
    """The pair of one membership, and the thread that serves it.

    `_lock` guards `_pair`, `_closed`, `_ended` and `_responding`; all else belongs to the thread.

    Args:
        service: The server.
        session_id: The worker's.
        host: The address of this machine by which the worker has reached it.
        other: The worker's address.
        reason: The reason for this transport.
    """

    def __init__(self, service: Service, session_id: str, host: str, other: Address, reason: str) -> None:
        self.session_id = session_id
        self._service = service
        self._host = host
        self._other = other
        self._reason = reason
        self._lock = threading.Lock()
        self._pair: Pair | None = None
        self._closed = False
        self._ended = False
        self._responding = False
        """True from a request until its response has come."""
        self._thread: threading.Thread | None = None
        self._address = queue.SimpleQueue[Address | str]()
        self._small = torch.zeros(small_bytes(service.reply_size.buffers), dtype=torch.uint8)
        self._small_view = bytes_of(self._small)
        self._header_only = self._small[:RESPONSE_BYTES]
        self._sent_buffers = no_buffers()
        """Those that the worker has."""

    def start(self, on_end: Callable[[], None]) -> Address:
        """Begin to make the pair, and serve it from then on; return this side's address.

        Raises:
            ValueError: it cannot be made.
        """

        def run() -> None:
            try:
                self._run()
            finally:
                on_end()

        self._thread = threading.Thread(target=run, name=f"gloo session {self._other.host}:{self._other.port}", daemon=True)
        self._thread.start()
        try:
            address = self._address.get(timeout=OPEN_SECONDS)
        except queue.Empty:
            address = f"no pair within {OPEN_SECONDS:g} s"
        if isinstance(address, str):
            raise ValueError(f"gloo: the server cannot make a pair at {self._host[:100]}: {address}")
        return address

    def end(self) -> None:
        """Close the pair, as the membership has ended; a worker that waits for a reply is told the reason before."""
        with self._lock:
            self._ended = True
            responding = self._responding
        if not responding:
            self.close()
            return
        late = threading.Timer(LAST_REPLY_SECONDS, self.close)
        late.daemon = True
        late.start()

    def close(self) -> None:
        """End the pair, and with it the thread."""
        with self._lock:
            self._closed = True
            pair, self._pair = self._pair, None
        if pair is not None:
            pair.close()

    def join(self, timeout_seconds: float) -> None:
        """Wait for the end of the thread of a pair that is closed."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def _exchange(self, own: Address) -> Address:
        self._address.put(own)
        return self._other

    def _run(self) -> None:
        try:
            pair = make_pair(SERVER, self._host, self._exchange, OPEN_SECONDS)
        except (PairLost, OSError, ValueError) as error:  # the others are of an address, or of too many open files
            self._address.put(str(error))
            _log.warning("gloo: no pair with %s: %s", self._other.host, error)
            return
        with self._lock:
            self._pair, closed = pair, self._closed
        try:
            if not closed:
                self._service.connected(self.session_id, "gloo", self._reason)
                self._serve(pair)
        except (PairLost, EOFError) as error:  # no reason to evict: the lease decides whether a worker is alive
            _log.debug("the pair with %s has ended: %s", self._other.host, error)
        except WireError as error:
            _log.warning("closed the pair with %s: %s", self._other.host, error)
        finally:
            pair.close()

    def _serve(self, pair: Pair) -> None:
        """Respond request by request.

        Raises:
            PairLost: the pair has ended.
            EOFError: the server ends.
            WireError: the worker sent anything but a request.
        """
        service, session_id = self._service, self.session_id
        message = torch.zeros(HEADER_BYTES + service.push_format.size, dtype=torch.uint8)
        header = bytes_of(message[:HEADER_BYTES])
        push_reader = PushReader(service.push_format, message[HEADER_BYTES:])

        def push() -> ReplyFuture:
            return service.push(session_id, push_reader.read(frames.push_numbers(header)))

        def register() -> ReplyFuture:
            return service.register(session_id)

        calls: dict[int, Callable[[], ReplyFuture]] = {Request.push: push, Request.register: register}

        def posted() -> tuple[Transfer, Transfer]:
            return pair.receive(message, NUMBERS), pair.receive_empty(END)

        received, end = posted()
        while not self._set_responding(False):
            end.wait(UNTIL_CLOSED)
            received.wait(UNTIL_CLOSED)
            self._set_responding(True)
            kind = frames.read_kind(header)
            if kind not in calls:
                raise WireError(f"a request of kind {kind} came, expected one of {[*map(int, calls)]}")
            future = refusals_as_replies(calls[kind])
            received, end = posted()
            self._respond(pair, wait_while(lambda: not self._closed, future))
            del future  # with the parameters in it, so that their memory can be lent again

    def _set_responding(self, responding: bool) -> bool:
        """Note whether a response is under way; return whether the membership has ended."""
        with self._lock:
            self._responding = responding
            return self._ended

    def _respond(self, pair: Pair, response: ServerResponse) -> None:
        """Send a response, and wait until it has come; until then the snapshot is kept."""
        if not isinstance(response, ErrorReply):
            response = self._service.on_host(response)
        arrived = pair.receive_empty(ARRIVED)
        transfers = [pair.send(self._packed(response), NUMBERS)]
        if not isinstance(response, ErrorReply) and response.ticket is not None:
            expected = self._service.reply_size.params
            assert response.params.numel() * response.params.itemsize <= expected, "more would end the worker's process"
            transfers.append(pair.send(response.params, PARAMS))
        transfers.append(pair.send_empty(END))
        arrived.wait(UNTIL_CLOSED)
        for transfer in transfers:
            transfer.wait(UNTIL_CLOSED)

    def _packed(self, response: ServerResponse) -> torch.Tensor:
        """The message with the numbers of a response, and all that follows them."""
        if isinstance(response, ErrorReply):
            data = pack_error(ErrorReply(error=response.error, text=response.text[:MAX_ERROR_CHARACTERS]))
            self._small_view[:RESPONSE_BYTES] = frames.error_frame(len(data))
            end = RESPONSE_BYTES + len(data)
            self._small_view[RESPONSE_BYTES:end] = data
            return self._small[:end]
        if response.ticket is None:
            self._small_view[:RESPONSE_BYTES] = frames.reply_frame(response, INLINE)
            return self._header_only
        same = response.buffers is self._sent_buffers  # they never change, and replies share them
        self._small_view[:RESPONSE_BYTES] = frames.reply_frame(response, INLINE, same_buffers=same)
        if same:
            return self._header_only
        end = RESPONSE_BYTES + response.buffers.numel()
        self._small[RESPONSE_BYTES:end] = response.buffers
        self._sent_buffers = response.buffers
        return self._small[:end]
