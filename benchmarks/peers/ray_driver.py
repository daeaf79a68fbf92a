"""Ray's side of `ray_server`; imported only where Ray is."""

from __future__ import annotations

import importlib
import itertools
import os
import time
from typing import Any

import numpy as np
import psutil

from benchmarks.peers.foreign import job_from_command_line, peak_bytes, report

ray: Any = importlib.import_module("ray")  # in an environment of its own
LEARNING_RATE, MOMENTUM = np.float32(1e-3), np.float32(0.9)


class Server:
    """Parameters and momentum."""

    def __init__(self, dimension: int) -> None:
        self.w = np.zeros(dimension, np.float32)
        self.u = np.zeros(dimension, np.float32)

    def push(self, grad: Any) -> Any:
        """Apply a gradient and return the parameters, which Ray copies into its store."""
        self.u *= MOMENTUM
        self.u += grad
        self.w -= LEARNING_RATE * self.u
        return self.w

    def process(self) -> int:
        """Its process number."""
        return os.getpid()


class Worker:
    """A gradient, and the parameters that came last."""

    def __init__(self, dimension: int) -> None:
        self.grad = np.random.default_rng(0).standard_normal(dimension, dtype=np.float32)

    def run(self, server: Any, seconds: float) -> list[float]:
        """Do round trips until the time is over; how long each took."""
        durations: list[float] = []
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            ray.get(server.push.remote(ray.put(self.grad)))
            durations.append(time.perf_counter() - began)
        return durations

    def process(self) -> int:
        """Its process number."""
        return os.getpid()


def main() -> None:
    """Start Ray on this machine, measure, and end it."""
    job = job_from_command_line()
    ray.init(num_cpus=job.workers + 1, include_dashboard=False, log_to_driver=False)
    server = ray.remote(Server).remote(job.parameters)
    workers = [ray.remote(Worker).remote(job.parameters) for _ in range(job.workers)]
    ray.get([worker.run.remote(server, 0.5) for worker in workers])
    process = psutil.Process(ray.get(server.process.remote()))
    pids = ray.get([worker.process.remote() for worker in workers])
    before = sum(process.cpu_times()[:2])
    durations = list(itertools.chain(*ray.get([worker.run.remote(server, job.seconds) for worker in workers])))
    cpu = sum(process.cpu_times()[:2]) - before
    report("ray", job, durations, cpu, peak_bytes(process.pid), [peak_bytes(pid) for pid in pids])
    ray.shutdown()
