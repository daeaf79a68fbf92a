"""A worker's process: from reply to push until it is told to stop, through as many lives of the server as it takes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from omegaconf import OmegaConf

from ormo_rpc.config import Config, parse_config
from ormo_rpc.errors import Rejoin
from ormo_rpc.faults import Injector
from ormo_rpc.job import Job, time_generator
from ormo_rpc.messages import Reply
from ormo_rpc.runtimes.rpc.agent import rpc_agent
from ormo_rpc.runtimes.rpc.calls import Calls, RpcCalls
from ormo_rpc.runtimes.rpc.lease import Lease, ServerLost, let_in
from ormo_rpc.runtimes.rpc.seats import RunEnded
from ormo_rpc.runtimes.rpc.secret import Secret
from ormo_rpc.runtimes.rpc.segments import AVAILABLE, Segments
from ormo_rpc.runtimes.rpc.stream_calls import StreamCalls
from ormo_rpc.wire_options import Transport
from ormo_rpc.worker import Worker, plain_bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a worker's process is told when it is started.

    Attributes:
        door: Finds the server.
        secret: Of the run.
        wanted: The worker number to have, if it is free.
        post: Who keeps this process running.
        life: How often this process was started before.
        data_root: Where the data set lies on this machine, if not where the run's configuration says.
        timeout_seconds: How long to look for the server.
        tell: Called with what people should know.
    """

    door: Callable[[], tuple[str, int]]
    secret: Secret
    wanted: int | None
    post: str
    life: int
    data_root: str | None
    timeout_seconds: float
    tell: Callable[[str], None]


class Work:
    """Everything in a worker's process.

    Args:
        place: Where and as whom to work.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.lease: Lease | None = None
        self.leaving = False
        self._wanted = place.wanted
        self._config_text = ""
        self._config: Config | None = None
        self._worker: Worker | None = None
        self._segments: Segments | None = None
        """Where the worker's payload lies, if the server may read it from there."""
        self._injector: Injector | None = None

    def run(self) -> None:
        """Work until told to stop; a server that is lost may come back, and one that has evicted us may let us in again.

        Raises:
            ServerLost: it did not come back in time.
            Dismissed: this worker is not wanted any more.
        """
        place = self.place
        while not self.leaving:
            try:
                lease = let_in(
                    place.door,
                    place.secret,
                    wanted=self._wanted,
                    post=place.post,
                    timeout_seconds=place.timeout_seconds,
                    leaving=lambda: self.leaving,
                )
            except RunEnded as end:
                _log.info("%s", end)
                return
            except ServerLost:
                if self.leaving:
                    return
                raise
            with lease:
                self.lease = lease
                self._wanted = lease.welcome.worker
                self._prepare(lease.welcome.config)
                try:
                    self._work(lease)
                    return
                except (ServerLost, Rejoin) as error:
                    _log.info("asking to be let in again: %s", error)

    def leave(self) -> None:
        """Ask to leave; called from another thread."""
        self.leaving = True
        if self.lease is not None:
            self.lease.leave()

    def _prepare(self, config_text: str) -> None:
        """Load data and model, unless they are there from a former life of the server."""
        if config_text == self._config_text:
            return
        values = OmegaConf.create(config_text)
        if self.place.data_root is not None:
            OmegaConf.update(values, "dataset.root", self.place.data_root)
        self._config = parse_config(OmegaConf.to_container(values))  # pyright: ignore[reportArgumentType] # a mapping
        share = AVAILABLE and self._config.wire.transport in (Transport.auto, Transport.shm)
        self._segments = Segments() if share else None
        self._worker = Job(self._config).worker(allocate=plain_bytes if self._segments is None else self._segments.vector)
        self._worker.warm_up()
        self._config_text = config_text

    def _work(self, lease: Lease) -> None:
        """One life of the server."""
        config, worker, number = self._config, self._worker, lease.welcome.worker
        assert config is not None
        assert worker is not None
        if self._injector is None:
            self._injector = Injector(config.rpc.faults, number, self.place.life, self.place.tell)
        with self._calls(config, worker, lease) as server:
            self._until_stopped(config, worker, self._injector, server, number)
            server.goodbye()

    @contextlib.contextmanager
    def _calls(self, config: Config, worker: Worker, lease: Lease) -> Generator[Calls]:
        """The way to the server that the configuration says."""
        timeout, transport, number = config.rpc.rpc_timeout_seconds, config.wire.transport, lease.welcome.worker
        if transport is Transport.uv:
            with rpc_agent(f"worker{number}", number + 1, server=lease.welcome.agent, timeout_seconds=timeout):
                yield RpcCalls(lease.welcome.token, timeout)
            return
        must_share = transport is Transport.shm
        with StreamCalls(
            lease, self.place.secret, worker.payload, self._segments, must_share=must_share, timeout_seconds=timeout
        ) as calls:
            yield calls

    def _until_stopped(self, config: Config, worker: Worker, injector: Injector, server: Calls, number: int) -> None:
        speed: torch.Generator = time_generator(config, number)
        reply: Reply = server.hello()
        while reply.ticket is not None:
            began = time.monotonic()
            push = worker.compute(reply)
            slowdown = config.heterogeneity.slowdown(number, config.num_workers, speed)
            time.sleep((slowdown - 1) * (time.monotonic() - began))
            injector.before_push(worker.payload)
            reply = server.push(push, worker.payload)
            if injector.drops_reply():
                reply = server.push(push, worker.payload)
