"""The service as workers reach it by a stream: a connection to the listener, with a thread for each.

A worker that has joined connects once more, proves again that it knows the secret, and shows its session_id. Gradients and
parameters lie in memory that both processes share, where both can open what the other one has made; what crosses is then a
frame of some 60 bytes. Else the bytes follow the frame, from and into buffers that are made once.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.algorithms.base import Algorithm
from ormo_rpc.compression.wire_options import Transport
from ormo_rpc.errors import WireError
from ormo_rpc.kernels.pool import pooled
from ormo_rpc.messages import ErrorReply
from ormo_rpc.rendezvous import protocol as wire
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.transports.pending_replies import ReplyFuture, ServerResponse, answered
from ormo_rpc.transports.stream.frames import (
    DTYPES,
    INLINE,
    LOOK_SECONDS,
    REQUEST,
    RESPONSE,
    Request,
    Response,
    Stream,
    bytes_of,
)
from ormo_rpc.transports.stream.shared_memory import AVAILABLE, SegmentHandle, SharedMemoryPool, attach

GREETING_SECONDS = 10.0
"""How long a worker may take to show its session_id."""
GREETING_BYTES = 4096
"""The longest line of a worker, with its session_id and where its payload lies."""


def shared_snapshots(algorithm: Algorithm, transport: Transport) -> SharedMemoryPool | None:
    """Have what an algorithm sends lie in memory that workers on this machine can read, unless the wire is to be something else."""
    if not (AVAILABLE and transport.may_share):
        return None
    segments = SharedMemoryPool()
    algorithm.kernel = replace(algorithm.kernel, empty=pooled(segments))
    return segments


class StreamServer:
    """Serves streams.

    Args:
        service: Whom they lead to.
        transport: What the run's configuration asks for.
        segments: Where the snapshots lie; None where they are not shared.
    """

    def __init__(self, service: Service, transport: Transport, segments: SharedMemoryPool | None) -> None:
        self.service = service
        self.transport = transport
        self.segments = segments
        self._kept = None if segments is None else segments.vector(1)
        self._probe = None if segments is None or self._kept is None else segments.find(self._kept)
        """The descriptor of a segment that a worker tries to open, as long as that is kept."""

    def serve(self, reader: wire.LineReader) -> None:
        """Serve a stream to its end, in the thread that calls.

        Args:
            reader: Of a connection whose other side knows the secret.

        Raises:
            ValueError: its session_id is none, or it asks for what the run does not have; the other side is to be told.
            OSError, EOFError, WireError: it went away, or does not keep to the protocol.
        """
        asked = reader.receive(GREETING_SECONDS, GREETING_BYTES)
        session_id = asked.get("session_id")
        if not isinstance(session_id, str) or session_id not in self.service.memberships.by_session:
            raise ValueError("stream: got a session_id without a membership; rejoin")
        payload, reason = self._share(asked.get("segment"))
        offer: dict[str, Any] = {"origin": None, "reason": reason}
        if payload is not None and self.segments is not None:
            offer |= {"origin": asdict(self.segments.origin), "probe": self._probe}
        wire.send(reader.sock, offer)
        if reader.receive(GREETING_SECONDS, GREETING_BYTES).get("shared") is not True:
            payload = None
        wire.send(reader.sock, {"frames": True})  # they begin behind this line, so that no reader of lines takes any of them
        self._talk(Stream(reader.sock, lambda: session_id in self.service.memberships.by_session), session_id, payload)

    def _share(self, segment: object) -> tuple[Tensor | None, str]:
        """The worker's payload in memory that we share with it; None, and why, where there is none."""
        if self.segments is None:
            chosen = self.transport is Transport.tcp
            return None, "wire.transport=tcp" if chosen else "the server's system has no memory that could be shared"
        if self._probe is None:
            return None, "the server has no memory that could be shared; see its log"
        given = segment if isinstance(segment, Mapping) else {}
        process, name, descriptor = (given.get(key) for key in ("process", "name", "descriptor"))
        if type(process) is not int or type(descriptor) is not int or not isinstance(name, str):
            return None, "the worker has no segment"
        try:
            return attach(SegmentHandle(process=process, name=name), descriptor, self.service.format.size), ""
        except OSError as error:
            return None, f"server and worker share no memory: {error}"

    def _talk(self, stream: Stream, session_id: str, shared: Tensor | None) -> None:
        """ServerResponse frame by frame, until the worker says goodbye.

        Args:
            stream: The connection.
            session_id: The worker's.
            shared: Its payload, where that lies in shared memory; parameters do so too, then.

        Raises:
            EOFError: it went away, or was evicted.
            WireError: it sent something else.
        """
        form = self.service.format
        # A worker that lies can change shared memory after it was checked. That spoils its own gradient, which it may do
        # anyway; but the journal would have a torn record, behind which all others are lost, and a decoder other bytes
        # than those that it has looked at.
        copies = shared is not None and (self.service.journal.durable or not form.plain)
        payload = torch.empty(form.size, dtype=torch.uint8) if shared is None or copies else shared
        inline = bytes_of(payload) if shared is None else None
        push = None if form.plain else torch.empty(form.length, dtype=form.dtype)
        parts = form.unpack(payload) if form.plain else None
        frame = bytearray(REQUEST.size)
        whole = memoryview(frame)
        while True:
            stream.receive(whole)
            word, ticket, stamp, incarnation, samples, has_loss, loss = REQUEST.unpack(frame)
            if word == Request.push:
                if inline is not None:
                    stream.receive(inline)
                if shared is not None and copies:
                    payload.copy_(shared)
                told = (session_id, ticket, stamp, incarnation, loss if has_loss else None, samples)
                future = answered(lambda: self.service.take(*told, parts or form.unpack(payload, push)))  # noqa: B023 - called at once
            elif word == Request.register:
                future = answered(lambda: self.service.register(session_id))
            elif word == Request.leave:
                self.service.leave(session_id)
                return
            else:
                raise WireError(f"a frame with the word {word} came, expected one of {[*map(int, Request)]}")
            self._send(stream, _outcome(future, stream), shared=shared is not None)
            del future  # with the parameters in it, so that their memory can be lent again

    def _send(self, stream: Stream, answer: ServerResponse, *, shared: bool) -> None:
        if isinstance(answer, ErrorReply):
            text = json.dumps(asdict(answer)).encode()
            stream.send(RESPONSE.pack(Response.refusal, 0, 0, 0, 0, 0.0, 0, len(text), INLINE), memoryview(text))
        elif answer.ticket is None:
            stream.send(
                RESPONSE.pack(Response.stop, 0, answer.stamp, answer.incarnation, answer.steps, answer.lr, 0, 0, INLINE)
            )
        else:
            vector = answer.params
            descriptor = self.segments.find(vector) if shared and self.segments is not None else None
            stream.send(
                RESPONSE.pack(
                    Response.work,
                    answer.ticket,
                    answer.stamp,
                    answer.incarnation,
                    answer.steps,
                    answer.lr,
                    DTYPES.index(vector.dtype),
                    vector.numel(),
                    INLINE if descriptor is None else descriptor,
                ),
                bytes_of(vector) if descriptor is None else None,
            )


def _outcome(future: ReplyFuture, stream: Stream) -> ServerResponse:
    """Wait for an answer, for as long as anybody wants it.

    Raises:
        EOFError: nobody does any more.
    """
    if not future.done():
        done = queue.SimpleQueue[object]()
        future.add_done_callback(done.put)
        while True:
            alive = stream.alive()  # before we wait: who is evicted meanwhile is given the reason in a moment
            try:
                done.get(timeout=LOOK_SECONDS)
                break
            except queue.Empty:
                if not alive:
                    raise EOFError("the worker was evicted") from None
    return future.value()
