"""A worker's calls to the server by a stream; see `streams` for the other end."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from dataclasses import asdict

import torch
from torch import Tensor

from ormo_rpc.errors import BY_NAME, Refused, ServerLost
from ormo_rpc.messages import Push, Reply
from ormo_rpc.rendezvous import protocol
from ormo_rpc.rendezvous.lease import Lease
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.transports.stream.frames import DTYPES, INLINE, REQUEST, RESPONSE, Request, Response, Stream, bytes_of
from ormo_rpc.transports.stream.shared_memory import SegmentHandle, SharedMemoryPool, attach

GREETING_BYTES = 64 * 1024
"""The longest line of a server that has proved itself; the frames behind it have sizes of their own."""
_log = logging.getLogger(__name__)


class StreamClient:
    """`ServerClient` by a stream; use it as a context.

    Shared parameters are the server's own memory, which we can only read and which it leaves alone until our next push; those
    that come with the frame lie in a buffer that the next ones are written into.

    Args:
        lease: Ours; streams are accepted by the same listener.
        secret: Of the run.
        payload: What every push is in, shape (elements of a payload,).
        segments: Where it lies, if other processes may read it.
        must_share: Whether to give up where no memory can be shared.
        timeout_seconds: For the handshake.

    Raises:
        ServerLost: the server is gone, or knows us no longer.
        WireError: it takes no streams, or does not share memory where it must.
    """

    def __init__(
        self,
        lease: Lease,
        secret: Secret,
        payload: Tensor,
        segments: SharedMemoryPool | None,
        *,
        must_share: bool,
        timeout_seconds: float,
    ) -> None:
        self.worker = lease.join_response.worker
        self._payload = payload
        self._origin: SegmentHandle | None = None
        """Of the server's segments, where they are shared."""
        self._slots: dict[int, Tensor] = {}
        """Those that we have seen, by their descriptors, as bytes."""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._frame = bytearray(RESPONSE.size)
        try:
            connection = socket.create_connection(lease.connection.getpeername()[:2], timeout_seconds)
            try:
                reason = self._agree(
                    protocol.LineReader(connection), lease.join_response.session_id, secret, segments, timeout_seconds
                )
                self._stream = Stream(connection, lambda: not lease.lost.is_set())
            except BaseException:
                connection.close()
                raise
        except (OSError, EOFError) as error:
            raise ServerLost(f"no stream to the server: {error or type(error).__name__}") from None
        if self._origin is None:
            if must_share:
                connection.close()
                raise Refused(f"wire.transport=shm: {reason}; expected a worker on the server's machine, or auto or tcp")
            _log.info("gradients and parameters go by TCP: %s", reason)

    def _agree(
        self,
        reader: protocol.LineReader,
        session_id: str,
        secret: Secret,
        segments: SharedMemoryPool | None,
        timeout_seconds: float,
    ) -> str:
        """Prove who we are, and find out whether memory can be shared; return why not."""
        protocol.authenticate_server(reader, secret, {"stream": True}, timeout_seconds)
        descriptor = None if segments is None else segments.find(self._payload)
        mine = None if segments is None or descriptor is None else {**asdict(segments.origin), "descriptor": descriptor}
        protocol.send(reader.sock, {"session_id": session_id, "segment": mine})
        answer = reader.receive(timeout_seconds, GREETING_BYTES)
        if "error" in answer:
            raise EOFError(answer["error"])
        reason = str(answer["reason"])
        if answer["origin"] is not None:
            origin = SegmentHandle(**answer["origin"])
            try:
                attach(origin, answer["probe"], 1)
                self._origin = origin
            except OSError as error:
                reason = f"worker and server share no memory: {error}"
        protocol.send(reader.sock, {"shared": self._origin is not None})
        reader.receive(timeout_seconds, GREETING_BYTES)  # frames begin behind it
        return reason

    def __enter__(self) -> StreamClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.connection.close()

    def register(self) -> Reply:
        """See `ServerClient.register`."""
        return self._ask(REQUEST.pack(Request.register, 0, 0, 0, 0, 0, 0.0), None)

    def push(self, push: Push, payload: Tensor) -> Reply:
        """See `ServerClient.push`."""
        assert payload is self._payload, "the payload is the one that the server knows"
        loss = 0.0 if push.loss is None else push.loss
        known = push.loss is not None
        frame = REQUEST.pack(Request.push, push.ticket, push.stamp, push.incarnation, push.samples, known, loss)
        return self._ask(frame, None if self._origin is not None else bytes_of(payload))

    def leave(self) -> None:
        """See `ServerClient.leave`; it waits until the server has heard it."""
        with contextlib.suppress(EOFError):
            self._stream.send(REQUEST.pack(Request.leave, 0, 0, 0, 0, 0, 0.0))
            self._stream.receive(memoryview(bytearray(1)))  # it closes the connection then

    def _ask(self, frame: bytes, behind: memoryview | None) -> Reply:
        try:
            self._stream.send(frame, behind)
            self._stream.receive(memoryview(self._frame))
            word, ticket, stamp, incarnation, steps, lr, dtype, elements, descriptor = RESPONSE.unpack(self._frame)
            if word == Response.refusal:
                text = bytearray(elements)
                self._stream.receive(memoryview(text))
                refusal = json.loads(text)
                raise BY_NAME[refusal["error"]](refusal["text"])
            params = self._vector(dtype, elements, descriptor)
        except (EOFError, OSError) as error:
            raise ServerLost(f"the server is gone: {error}") from None
        return Reply(
            worker=self.worker,
            ticket=ticket if word == Response.work else None,
            stamp=stamp,
            params=params,
            lr=lr,
            steps=steps,
            incarnation=incarnation,
        )

    def _vector(self, dtype: int, elements: int, descriptor: int) -> Tensor:
        """What came with an answer, shape (elements,)."""
        size = elements * DTYPES[dtype].itemsize
        if descriptor == INLINE:
            if self._buffer.numel() != size:
                self._buffer = torch.empty(size, dtype=torch.uint8)
            self._stream.receive(bytes_of(self._buffer))
            return self._buffer.view(DTYPES[dtype])
        if descriptor not in self._slots:
            assert self._origin is not None, "the server names a segment only where they are shared"
            try:
                slot = attach(self._origin, descriptor, size)
            except OSError:  # such as too many open files: each that we have seen costs one
                if not self._slots:
                    raise
                self._slots.clear()
                slot = attach(self._origin, descriptor, size)
            self._slots[descriptor] = slot
        return self._slots[descriptor].view(DTYPES[dtype])
