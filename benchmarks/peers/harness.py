"""Start the processes of a peer in our own environment, and time its round trips.

A peer is two functions. ``server(job, publish)`` runs in the server's process: it calls ``publish(address)`` once, with
anything that can be pickled, and then serves for ever; it is killed in the end. ``worker(job, number, address)`` runs in a
worker's process as a context manager that gives a function: one round trip, from sending a gradient to holding the new
parameters. The gradient is a buffer of the worker; nothing is computed for it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from benchmarks.namespaces import enter
from benchmarks.peers.measurement import Job, cpu_seconds, job_from_command_line, measurement, peak_bytes

WARM_UP = 3
"""Round trips before the measurement; the first one pays for page faults and connections."""
START_TIMEOUT_SECONDS = 120.0
SLACK_SECONDS = 60.0
LEARNING_RATE, MOMENTUM = 1e-3, 0.9
HOST_VARIABLE, WORKERS_VARIABLE = "BENCHMARK_HOST", "BENCHMARK_WORKERS_IN"
"""Environment variables: the server's address, and the network namespace of the workers where it is another one."""
PROGRESS_VARIABLE = "BENCHMARK_PROGRESS"
"""Environment variable: the folder in which each worker counts its round trips, where somebody wants to know meanwhile."""
HOST = os.environ.get(HOST_VARIABLE, "127.0.0.1")


RoundTrip = Callable[[], None]
Server = Callable[[Job, Callable[[Any], None]], None]


class Worker(Protocol):
    """The worker of a peer: a context manager that gives a round trip."""

    def __call__(self, job: Job, number: int, address: Any) -> contextlib.AbstractContextManager[RoundTrip]:
        """Connect."""
        ...


class Step:
    """SGD with momentum on one flat vector, under one lock, as the server of every peer takes it."""

    def __init__(self, dimension: int) -> None:
        self.w = torch.zeros(dimension)
        self.u = torch.zeros(dimension)
        self.lock = threading.Lock()

    def __call__(self, grad: Tensor, reply: Tensor | None = None) -> Tensor:
        """Apply a gradient; return a copy of the parameters, in ``reply`` if it is given."""
        with self.lock:
            self.u.mul_(MOMENTUM).add_(grad)
            self.w.sub_(self.u, alpha=LEARNING_RATE)
            return self.w.clone() if reply is None else reply.copy_(self.w)


def bytes_of(vector: Tensor) -> memoryview:
    """The memory of a vector, to receive into or to send from."""
    return memoryview(vector.numpy()).cast("B")  # pyright: ignore[reportArgumentType] # an array is a buffer


def free_port() -> int:
    """A port that was free a moment ago, for systems that take no socket."""
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


def main(name: str, server: Server, worker: Worker) -> None:
    """Run the command line of a peer."""
    print(json.dumps(measure(name, job_from_command_line(), server, worker)), flush=True)


def measure(name: str, job: Job, server: Server, worker: Worker) -> dict[str, Any]:
    """Start a server and workers, measure for the time, and kill them."""
    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []
    try:
        parent_end, child_end = context.Pipe()
        processes.append(context.Process(target=_serve, args=(server, job, child_end), daemon=True))
        processes[0].start()
        address = _receive(parent_end, START_TIMEOUT_SECONDS, "the server's address")
        pipes: list[Connection] = []
        for number in range(job.workers):
            parent_end, child_end = context.Pipe()
            process = context.Process(target=_work, args=(worker, job, number, address, child_end), daemon=True)
            process.start()
            processes.append(process)
            pipes.append(parent_end)
        for number, pipe in enumerate(pipes):
            _receive(pipe, START_TIMEOUT_SECONDS, f"worker {number}")
        serving = psutil.Process(processes[0].pid)
        before = cpu_seconds(serving)
        for pipe in pipes:
            pipe.send("start")
        durations: list[float] = []
        for number, pipe in enumerate(pipes):
            durations += _receive(pipe, job.seconds + SLACK_SECONDS, f"the round trips of worker {number}")
        cpu = cpu_seconds(serving) - before
        peaks = [peak_bytes(process.pid) for process in processes]
    finally:
        for process in reversed(processes):
            process.kill()
            process.join()
    return measurement(name, job, durations, cpu, peaks[0], peaks[1:])


def timed(round_trip: RoundTrip, seconds: float) -> list[float]:
    """Do round trips until the time is over; seconds of each."""
    durations: list[float] = []
    now = time.perf_counter()
    end = now + seconds
    while now < end:
        round_trip()
        then, now = now, time.perf_counter()
        durations.append(now - then)
    return durations


def _receive(pipe: Connection, timeout_seconds: float, what: str) -> Any:
    if not pipe.poll(timeout_seconds):
        raise TimeoutError(f"{what}: nothing came within {timeout_seconds:g} seconds")
    return pipe.recv()


def _serve(server: Server, job: Job, pipe: Connection) -> None:
    torch.set_num_threads(1)
    server(job, pipe.send)


def _work(worker: Worker, job: Job, number: int, address: Any, pipe: Connection) -> None:
    if WORKERS_VARIABLE in os.environ:
        enter(os.environ[WORKERS_VARIABLE])
    torch.set_num_threads(1)
    with worker(job, number, address) as plain, _counted(plain, number) as round_trip:
        for _ in range(WARM_UP):
            round_trip()
        pipe.send("ready")
        _receive(pipe, START_TIMEOUT_SECONDS, "the signal to start")
        pipe.send(timed(round_trip, job.seconds))
        pipe.poll(SLACK_SECONDS)  # until it is killed, once its memory has been read
        os._exit(0)


@contextlib.contextmanager
def _counted(round_trip: RoundTrip, number: int) -> Generator[RoundTrip]:
    """Count the round trips in a file of 8 bytes, if a folder for it is given."""
    folder = os.environ.get(PROGRESS_VARIABLE)
    if folder is None:
        yield round_trip
        return
    with Path(folder, f"worker{number}").open("w+b") as file:
        file.write(bytes(8))
        file.flush()
        with mmap.mmap(file.fileno(), 8) as count:

            def counted() -> None:
                round_trip()
                count[:] = (int.from_bytes(count[:], "little") + 1).to_bytes(8, "little")

            yield counted


def shapes(dimension: int) -> list[int]:
    """Sizes of the 65 tensors of ResNet-20 for CIFAR-10, scaled to add up to D."""
    sizes, width = [9 * 3 * 16, 16, 16], 16
    for stage in (16, 32, 64):
        for _ in range(3):
            sizes += [9 * width * stage, stage, stage, 9 * stage * stage, stage, stage]
            if stage != width:
                sizes += [width * stage, stage, stage]  # the shortcut where the width changes
            width = stage
    sizes += [64 * 10, 10]
    return scaled(sizes, dimension)


def scaled(sizes: list[int], dimension: int) -> list[int]:
    """Scale sizes to add up to the dimension, keeping their proportions."""
    total, found, done = sum(sizes), list[int](), 0
    for end in (sum(sizes[: k + 1]) for k in range(len(sizes))):
        found.append(dimension * end // total - done)
        done += found[-1]
    return found


@contextlib.contextmanager
def sockets(address: tuple[str, int]) -> Generator[socket.socket]:
    """Connect to the server, without Nagle's algorithm."""
    with socket.create_connection(address, timeout=START_TIMEOUT_SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection
