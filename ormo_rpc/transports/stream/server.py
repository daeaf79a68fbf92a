"""The server's half of the stream transports: a connection for each worker, with a thread for each.

A worker that has joined opens a connection and presents its session. Where each side can attach the other one's memory,
gradients and parameters lie there, and frames of some 100 bytes, with the model's buffers behind them, are all that crosses;
else the bytes follow the frames, from and into memory that is made once. Tensors that stay on GPUs have a way of their own
(`tensor_path`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.errors import TransportRefused, WireError
from ormo_rpc.messages import ErrorReply, no_buffers
from ormo_rpc.rendezvous.protocol import LineReader, printable, send
from ormo_rpc.transports.base import MAX_REASON_CHARACTERS, ServerSide, Service
from ormo_rpc.transports.codec import pack_error
from ormo_rpc.transports.pending_replies import ReplyFuture, ServerResponse, refusals_as_replies, wait_while
from ormo_rpc.transports.push_reader import PushReader
from ormo_rpc.transports.stream import frames
from ormo_rpc.transports.stream.frames import INLINE, REQUEST_BYTES, FrameSocket, Request, bytes_of
from ormo_rpc.transports.stream.shared_memory import AVAILABLE, SegmentHandle, SharedMemoryPool, attach, not_shared
from ormo_rpc.transports.stream.tensor_path import Offer, TensorPath, Way

NEGOTIATION_SECONDS = 10.0
"""The time that a worker has for each line before the frames begin."""
MAX_OFFSET = 1 << 12
"""A payload begins before that byte of its segment."""
MAX_LINE_BYTES = 4096
"""The longest line of a worker, with its session and the handle of its payload."""
OUTSIDE = 0
"""In the place of a descriptor: the parameters come by the way of tensors."""


class StreamServerSide(ServerSide):
    """Serves connections with frames.

    Args:
        share: Whether to share memory with workers that can.
        ways: The further ways of tensors, by the name of the transport.
    """

    def __init__(self, *, share: bool, ways: Mapping[str, Way] | None = None) -> None:
        self.ways = dict(ways or {})
        self._lock = threading.Lock()
        self._open: dict[str, TensorPath] = {}
        """The ways that are open, by session; `_lock` guards it."""
        self.pool = SharedMemoryPool() if share and AVAILABLE else None
        self.memory = self.pool
        self._probe_vector = None if self.pool is None else self.pool.vector(1)
        self._probe = None if self.pool is None or self._probe_vector is None else self.pool.handle(self._probe_vector)
        """A segment that a worker tries to attach; it exists for as long as the vector does."""
        self._not_shared = ""
        if not share:
            self._not_shared = "the server shares no memory"
        elif self.pool is None:
            self._not_shared = "the server's system has no memory that could be shared"
        elif self._probe is None:
            self._not_shared = "the server has no memory that could be shared; see its log"

    @override
    def accept(self, reader: LineReader) -> None:
        service = self.service
        request = reader.receive(NEGOTIATION_SECONDS, MAX_LINE_BYTES)
        session_id = request.get("session_id")
        if not isinstance(session_id, str) or not service.is_member(session_id):
            raise ValueError("stream: got a session that is not valid; rejoin")
        size = service.push_format.size
        name, payload, offer = request.get("way"), None, None
        if isinstance(name, str):
            answer, offer = self._offered(name, request)
        else:
            payload, reason = self._attach_payload(request.get("segment"), size)
            answer = {"segment": None if payload is None or self._probe is None else asdict(self._probe), "reason": reason}
        send(reader.sock, {**answer, "size": size})
        if request.get("size") != size:
            raise ValueError(f"stream: push: got {request.get('size')!r} bytes, expected {size}")
        with contextlib.nullcontext() if offer is None else self._opened(offer.open(reader), session_id) as tensors:
            chosen = reader.receive(NEGOTIATION_SECONDS, MAX_LINE_BYTES)
            if chosen.get("shared") is not True:
                payload = tensors = None
            reason = printable(chosen.get("reason"), MAX_REASON_CHARACTERS)
            shared = "tcp" if payload is None else "shm"
            service.connected(session_id, shared if tensors is None else str(name), reason)
            send(reader.sock, {"frames": True})  # the frames begin behind it, so that no reader of lines takes any of them
            self._serve(service, FrameSocket(reader.sock, lambda: service.is_member(session_id)), session_id, payload, tensors)

    @contextlib.contextmanager
    def _opened(self, tensors: TensorPath, session_id: str) -> Generator[TensorPath]:
        """Have a way open until the context or the session ends."""
        with self._lock:
            self._open[session_id] = tensors
        try:
            if not self.service.is_member(session_id):  # it has ended since, and `session_ended` may have come too early
                raise EOFError("the worker was evicted")
            yield tensors
        finally:
            tensors.close()
            with self._lock:
                if self._open.get(session_id) is tensors:
                    del self._open[session_id]

    @override
    def session_ended(self, session_id: str) -> None:
        with self._lock:
            tensors = self._open.get(session_id)
        if tensors is not None:
            tensors.close()

    @override
    def close(self) -> None:
        with self._lock:
            ways = list(self._open.values())
        for tensors in ways:
            tensors.close()

    def _offered(self, name: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], Offer | None]:
        """The answer to a worker that asks for a way of tensors, and the way; none where the answer says why."""
        try:
            if name not in self.ways:
                raise TransportRefused(name, "the server does not serve it")
            offer = self.ways[name](self.service, request)
        except TransportRefused as error:
            return {"offer": None, "reason": error.reason}, None
        return {"offer": offer.answer}, offer

    def _attach_payload(self, segment: object, size: int) -> tuple[torch.Tensor | None, str]:
        """The worker's payload in shared memory; None, and the reason, where it is not shared."""
        if self._not_shared:
            return None, self._not_shared
        given = segment if isinstance(segment, Mapping) else {}
        pid, name, descriptor = (given.get(key) for key in ("pid", "name", "descriptor"))
        offset = given.get("offset", 0)
        if type(pid) is not int or type(descriptor) is not int or not isinstance(name, str):
            return None, "the worker has no memory that could be shared"
        if type(offset) is not int or offset not in range(0, MAX_OFFSET, 64):
            return None, f"offset: got {offset!r}, expected a multiple of 64 below {MAX_OFFSET}"
        try:
            return attach(SegmentHandle(pid=pid, name=name, descriptor=descriptor, offset=offset), size), ""
        except OSError as error:
            return None, not_shared(error)

    def _serve(
        self,
        service: Service,
        stream: FrameSocket,
        session_id: str,
        shared: torch.Tensor | None,
        tensors: TensorPath | None,
    ) -> None:
        """Respond request by request, until the worker leaves.

        Args:
            service: The server.
            stream: The connection.
            session_id: The worker's.
            shared: Its payload, where that lies in shared memory; parameters do so too, then.
            tensors: The way of payload, parameters and buffers, where they have one of their own.

        Raises:
            EOFError: the connection has ended, or the worker was evicted.
            WireError: it sent anything but a request.
        """
        form = service.push_format
        shared = shared if tensors is None else tensors.push
        # A hostile worker can change shared memory after it was validated. That spoils its own gradient, which it may do
        # anyway; but a journal would have a torn record, behind which all others are lost, and a decoder other bytes than those
        # that it has checked.
        copies = shared is not None and (service.rereads_pushes or not form.plain)
        device = None if shared is None else shared.device
        payload = torch.empty(form.size, dtype=torch.uint8, device=device) if shared is None or copies else shared
        inline = bytes_of(payload) if shared is None else None
        push_reader = PushReader(form, payload, shared=payload is shared)
        frame = bytearray(REQUEST_BYTES)
        whole = memoryview(frame)
        sent = no_buffers()

        def push() -> ReplyFuture:
            return service.push(session_id, push_reader.read(frames.push_numbers(frame)))

        def register() -> ReplyFuture:
            return service.register(session_id)

        response: ServerResponse | None = None
        while True:
            try:
                stream.receive(whole)
            except EOFError:
                if response is not None:  # an evicted worker still computes at its parameters: nobody else is lent them
                    stream.wait()
                raise
            response = None  # its parameters can be lent again: the worker has read them where they lie
            kind = frames.read_kind(frame)
            if kind == Request.push:
                if inline is not None:
                    stream.receive(inline)
                if tensors is not None:
                    tensors.fetch_push()
                if shared is not None and copies:
                    payload.copy_(shared)
                future = refusals_as_replies(push)
            elif kind == Request.register:
                future = refusals_as_replies(register)
            elif kind == Request.leave:
                service.leave(session_id)
                return
            else:
                raise WireError(f"a request of kind {kind} came, expected one of {[*map(int, Request)]}")
            response = wait_while(stream.alive, future)
            if tensors is not None:
                sent, response = _send_beside(stream, tensors, response, sent), None
            else:
                if not isinstance(response, ErrorReply):
                    response = service.on_host(response)
                sent = self._send(stream, response, sent, shared=shared is not None)
                response = response if shared is not None else None
            del future  # with the parameters in it, so that their memory can be lent again

    def _send(self, stream: FrameSocket, response: ServerResponse, sent: torch.Tensor, *, shared: bool) -> torch.Tensor:
        """Send a response; return the buffers that the worker has then, given those that it had before."""
        if isinstance(response, ErrorReply) or response.ticket is None:
            return _send_numbers(stream, response, sent)
        descriptor = self.pool.descriptor(response.params) if shared and self.pool is not None else None
        same = response.buffers is sent  # they never change, and replies share them
        inline = [] if descriptor is not None else [bytes_of(response.params)]
        if not same:
            inline.append(bytes_of(response.buffers))
        stream.send(frames.reply_frame(response, INLINE if descriptor is None else descriptor, same_buffers=same), *inline)
        return response.buffers


def _send_numbers(stream: FrameSocket, response: ServerResponse, sent: torch.Tensor) -> torch.Tensor:
    """Send a response that has no tensors; return the buffers that the worker has then."""
    if isinstance(response, ErrorReply):
        data = pack_error(response)
        stream.send(frames.error_frame(len(data)), memoryview(data))
        return sent
    stream.send(frames.reply_frame(response, INLINE))
    return no_buffers()


def _send_beside(stream: FrameSocket, tensors: TensorPath, response: ServerResponse, sent: torch.Tensor) -> torch.Tensor:
    """Send a response whose tensors have a way of their own; return the buffers that the worker has then."""
    nothing = no_buffers()
    if isinstance(response, ErrorReply) or response.ticket is None:
        tensors.ready_reply(nothing, nothing)
        return _send_numbers(stream, response, sent)
    same = response.buffers is sent
    tensors.ready_reply(response.params, nothing if same else response.buffers)
    stream.send(frames.reply_frame(response, OUTSIDE, same_buffers=same))
    tensors.deliver()
    return response.buffers
