"""A worker's process that is a region: its server, and a process for each of its workers."""

from __future__ import annotations

import logging
import pickle
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from ormo_rpc.config.schema import Config
from ormo_rpc.errors import RunFailed
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.configured import two_levels
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.linux import die_with_parent
from ormo_rpc.server.region import RegionServer

_log = logging.getLogger(__name__)
MODULE = "ormo_rpc.runtimes.distributed.worker_process.region_worker"
END_SECONDS = 10.0
"""A process that has closed its pipe, or that was killed, has so long to end."""


@dataclass(eq=False)
class _Worker:
    """A process of a region.

    Attributes:
        process: The process.
        pipe: To and from it.
        ready: It has loaded its job.
    """

    process: subprocess.Popen[bytes]
    pipe: Connection
    ready: bool = False


class RegionProcesses:
    """The region of one membership: computes the push for a ticket by the processes of its own workers.

    One that dies, or that takes nothing of a message for ``runtime.rpc_timeout_seconds``, is replaced, at most
    ``runtime.max_restarts`` times each; meanwhile others do its tickets. Each loads the job by itself, and ends with this
    process, even while it is stopped. To be used by one thread at a time.

    Args:
        job: The run.
        data_root: The folder of the data set on this machine; by default the configured one.
    """

    def __init__(self, job: Job, data_root: str | None) -> None:
        self.job = job
        self.config: Config = job.config
        self.data_root = data_root
        _, self.num_workers = two_levels(job.config)
        self._server: RegionServer | None = None
        self._workers: dict[int, _Worker] = {}
        self._restarts = dict.fromkeys(range(self.num_workers), 0)

    def compute(self, reply: Reply) -> Push:
        """Return the push for a ticket.

        Raises:
            RunFailed: no worker of the region is left, or none pushed for ``runtime.ticket_timeout_seconds``.
        """
        if self._server is None or self._server.ended:
            self.close()
            self._begin(reply)
        assert self._server is not None
        pushes = list[Push]()
        self._send(self._server.grant(reply))
        while not pushes:
            for number in self._readable():
                pushes += self._read(number, reply)
        return pushes[0]

    def close(self) -> None:
        """End the processes, which keep nothing that anybody needs."""
        for worker in self._workers.values():
            worker.process.kill()
        for worker in self._workers.values():
            worker.process.wait(END_SECONDS)
            worker.pipe.close()
        self._workers.clear()

    def _begin(self, reply: Reply) -> None:
        """Make a server at the global parameters, and wait for its workers: the first round may have to be of all of them."""
        self._server = self.job.region(reply.params)
        for number in range(self.num_workers):
            self._server.leave(number)
            self._start(number, reply.worker)
        while not all(worker.ready for worker in self._workers.values()):
            for number in self._readable():
                self._read(number, reply)

    def _start(self, number: int, region: int) -> None:
        ours, theirs = socket.socketpair()
        seconds, microseconds = divmod(int(self.config.rpc.rpc_timeout_seconds * 1e6), 1_000_000)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # of reads and writes in the middle of a message
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, microseconds))
        with theirs:
            command = [sys.executable, "-m", MODULE, str(theirs.fileno())]
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, preexec_fn=die_with_parent
            )
        worker = self._workers[number] = _Worker(process, Connection(ours.detach()))
        speed = region + number * self.config.num_processes
        worker.pipe.send_bytes(pickle.dumps((self.config.yaml, self.data_root, speed)))

    def _readable(self) -> list[int]:
        pipes = {worker.pipe: number for number, worker in self._workers.items()}
        seconds = self.config.rpc.ticket_timeout_seconds
        found = [pipes[pipe] for pipe in wait(list(pipes), seconds) if isinstance(pipe, Connection)]
        if not found:
            raise RunFailed(f"no worker of this region pushed for runtime.ticket_timeout_seconds={seconds:g}")
        return found

    def _read(self, number: int, reply: Reply) -> list[Push]:
        """Take what a worker has sent; return what is to be pushed to the global server."""
        assert self._server is not None
        worker = self._workers[number]
        try:
            content = worker.pipe.recv_bytes()
        except (EOFError, OSError):  # the latter in the middle of a message, too
            self._lost(number, worker, reply.worker)
            return []
        push = pickle.loads(content)  # noqa: S301 - of a process that this one has started
        if push is None:
            worker.ready = True
            self._send(self._server.join(number))
            return []
        replies, pushes = self._server.receive(push)
        self._send(replies)
        return pushes

    def _lost(self, number: int, worker: _Worker, region: int) -> None:
        """Give the tickets of a worker that has died to others, and start another one in its place.

        Raises:
            RunFailed: no worker is left.
        """
        assert self._server is not None
        worker.pipe.close()
        try:
            status = worker.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # it has closed its pipe, and hangs
            worker.process.kill()
            status = worker.process.wait(END_SECONDS)
        del self._workers[number]
        if worker.ready:
            self._send(self._server.leave(number))
        if self._restarts[number] < self.config.rpc.max_restarts:
            self._restarts[number] += 1
            _log.warning("worker %d of this region ended with %d; another one is started", number, status)
            self._start(number, region)
        elif not self._workers:
            raise RunFailed(f"no worker of this region is left; the last one ended with {status}")

    def _send(self, replies: list[Reply]) -> None:
        for reply in replies:
            worker = self._workers.get(reply.worker)
            if worker is not None:
                try:
                    worker.pipe.send_bytes(pickle.dumps(reply, pickle.HIGHEST_PROTOCOL))
                except BlockingIOError:  # it is stopped, or hangs
                    worker.process.kill()
                except (BrokenPipeError, ConnectionResetError):  # noticed when it is read
                    pass
