"""The server's half of the stream transports: a connection for each worker, with a thread for each.

A worker that has joined opens a connection and presents its session. Where each side can attach the other one's memory,
gradients and parameters lie there, and frames of some 100 bytes, with the model's buffers behind them, are all that crosses;
else the bytes follow the frames, from and into memory that is made once.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ormo_rpc.compression.wire_buffers import WireBuffers
from ormo_rpc.errors import WireError
from ormo_rpc.messages import NO_BUFFERS, ErrorReply, Push
from ormo_rpc.rendezvous.protocol import LineReader, send
from ormo_rpc.transports.base import ServerSide, Service
from ormo_rpc.transports.codec import pack_error
from ormo_rpc.transports.pending_replies import ReplyFuture, ServerResponse, refusals_as_replies
from ormo_rpc.transports.stream import frames
from ormo_rpc.transports.stream.frames import INLINE, LIVENESS_SECONDS, REQUEST_BYTES, FrameSocket, Request, bytes_of
from ormo_rpc.transports.stream.shared_memory import AVAILABLE, SegmentHandle, SharedMemoryPool, attach

NEGOTIATION_SECONDS = 10.0
"""The time that a worker has for each line before the frames begin."""
MAX_LINE_BYTES = 4096
"""The longest line of a worker, with its session and the handle of its payload."""


class StreamServerSide(ServerSide):
    """Serves connections with frames.

    Args:
        share: Whether to share memory with workers that can.
    """

    def __init__(self, *, share: bool) -> None:
        self.pool = SharedMemoryPool() if share and AVAILABLE else None
        self.memory = self.pool
        self._probe_vector = None if self.pool is None else self.pool.vector(1)
        self._probe = None if self.pool is None or self._probe_vector is None else self.pool.handle(self._probe_vector)
        """A segment that a worker tries to attach; it exists for as long as the vector does."""
        self._not_shared = ""
        if not share:
            self._not_shared = "transport=tcp"
        elif self.pool is None:
            self._not_shared = "the server's system has no memory that could be shared"
        elif self._probe is None:
            self._not_shared = "the server has no memory that could be shared; see its log"
        self._service: Service | None = None

    @override
    def start(self, service: Service) -> Mapping[str, Any]:
        self._service = service
        return {}

    @override
    def accept(self, reader: LineReader) -> None:
        service = self._service
        assert service is not None, "started before connections are accepted"
        request = reader.receive(NEGOTIATION_SECONDS, MAX_LINE_BYTES)
        session_id = request.get("session_id")
        if not isinstance(session_id, str) or not service.is_member(session_id):
            raise ValueError("stream: got a session that is not valid; rejoin")
        payload, reason = self._attach_payload(request.get("segment"), service.push_format.size)
        offered = None if payload is None or self._probe is None else asdict(self._probe)
        send(reader.sock, {"segment": offered, "reason": reason})
        if reader.receive(NEGOTIATION_SECONDS, MAX_LINE_BYTES).get("shared") is not True:
            payload = None
        send(reader.sock, {"frames": True})  # the frames begin behind this line, so that no reader of lines takes any of them
        frame_socket = FrameSocket(reader.sock, lambda: service.is_member(session_id))
        self._serve(service, frame_socket, session_id, payload)

    def _attach_payload(self, segment: object, size: int) -> tuple[Tensor | None, str]:
        """The worker's payload in shared memory; None, and the reason, where it is not shared."""
        if self._not_shared:
            return None, self._not_shared
        given = segment if isinstance(segment, Mapping) else {}
        pid, name, descriptor = (given.get(key) for key in ("pid", "name", "descriptor"))
        if type(pid) is not int or type(descriptor) is not int or not isinstance(name, str):
            return None, "the worker has no segment"
        try:
            return attach(SegmentHandle(pid=pid, name=name, descriptor=descriptor), size), ""
        except OSError as error:
            return None, f"server and worker share no memory: {error}"

    def _serve(self, service: Service, stream: FrameSocket, session_id: str, shared: Tensor | None) -> None:
        """Respond request by request, until the worker leaves.

        Args:
            service: The server.
            stream: The connection.
            session_id: The worker's.
            shared: Its payload, where that lies in shared memory; parameters do so too, then.

        Raises:
            EOFError: the connection has ended, or the worker was evicted.
            WireError: it sent anything but a request.
        """
        form = service.push_format
        # A hostile worker can change shared memory after it was validated. That spoils its own gradient, which it may do
        # anyway; but a journal would have a torn record, behind which all others are lost, a decoder other bytes than those
        # that it has checked, and a number of calls that is none would end a commit halfway: buffers, which are small, are
        # always copied.
        copies = shared is not None and (service.rereads_pushes or not form.plain)
        payload = torch.empty(form.size, dtype=torch.uint8) if shared is None or copies else shared
        inline = bytes_of(payload) if shared is None else None
        decoded = None if form.plain else torch.empty(form.length, dtype=form.dtype)
        pushed = form.buffer_region.of(payload)
        buffer_bytes = torch.empty_like(pushed) if payload is shared and pushed.numel() else pushed
        views = (form.whole(payload), WireBuffers(form.buffers, buffer_bytes)) if form.plain else None  # made once
        frame = bytearray(REQUEST_BYTES)
        whole = memoryview(frame)
        sent = NO_BUFFERS

        def push() -> ReplyFuture:
            if buffer_bytes is not pushed:
                buffer_bytes.copy_(pushed)
            grad, buffers = form.unpack(payload, decoded) if views is None else (views[0], views[1].read())
            return service.push(session_id, Push(**frames.push_numbers(frame), grad=grad, buffers=buffers))

        def register() -> ReplyFuture:
            return service.register(session_id)

        while True:
            stream.receive(whole)
            kind = frames.read_kind(frame)
            if kind == Request.push:
                if inline is not None:
                    stream.receive(inline)
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
            sent = self._send(stream, _wait(future, stream), sent, shared=shared is not None)
            del future  # with the parameters in it, so that their memory can be lent again

    def _send(self, stream: FrameSocket, response: ServerResponse, sent: Tensor, *, shared: bool) -> Tensor:
        """Send a response; return the buffers that the worker has then, given those that it had before."""
        if isinstance(response, ErrorReply):
            data = pack_error(response)
            stream.send(frames.error_frame(len(data)), memoryview(data))
            return sent
        if response.ticket is None:
            stream.send(frames.reply_frame(response, INLINE))
            return NO_BUFFERS
        descriptor = self.pool.descriptor(response.params) if shared and self.pool is not None else None
        same = response.buffers is sent  # they never change, and replies share them
        inline = [] if descriptor is not None else [bytes_of(response.params)]
        if not same:
            inline.append(bytes_of(response.buffers))
        stream.send(frames.reply_frame(response, INLINE if descriptor is None else descriptor, same_buffers=same), *inline)
        return response.buffers


def _wait(future: ReplyFuture, stream: FrameSocket) -> ServerResponse:
    """Wait for the response, as long as the worker is a member.

    Raises:
        EOFError: it was evicted.
    """
    if not future.done():
        done = queue.SimpleQueue[object]()
        future.add_done_callback(done.put)
        while True:
            alive = stream.alive()  # asked before waiting: an evicted worker is given the reason a moment later
            try:
                done.get(timeout=LIVENESS_SECONDS)
                break
            except queue.Empty:
                if not alive:
                    raise EOFError("the worker was evicted") from None
    return future.value()
