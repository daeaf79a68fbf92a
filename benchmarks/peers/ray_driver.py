"""Run Ray's asynchronous parameter server; imported only in an environment that has Ray."""

from __future__ import annotations

import importlib
import json
import os
import secrets
import tempfile
import time
from typing import Any

import numpy as np
import psutil

from benchmarks.peers.measurement import cpu_seconds, job_from_command_line, measurement, peak_bytes

# Read when Ray is imported: no usage report, and a secret for this run alone instead of a file in the home directory.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="session_id", RAY_AUTH_TOKEN=secrets.token_hex(32))
ray: Any = importlib.import_module("ray")  # in an environment of its own
LEARNING_RATE, MOMENTUM = np.float32(1e-3), np.float32(0.9)
WARM_UP_SECONDS = 0.5


class Server:
    """The actor that holds parameters and momentum."""

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
        """Its process id."""
        return os.getpid()


class Worker:
    """An actor that always returns the same gradient."""

    def __init__(self, dimension: int) -> None:
        self.grad = np.random.default_rng(0).standard_normal(dimension, dtype=np.float32)

    def compute(self, params: Any) -> Any:  # noqa: ARG002 - the parameters have arrived, which is all that is measured
        """Return the gradient, which Ray copies into its store."""
        return self.grad

    def process(self) -> int:
        """Its process id."""
        return os.getpid()


def run(server: Any, workers: list[Any], dimension: int, seconds: float) -> list[float]:
    """Apply gradients until the time is over; seconds from each gradient of a worker to its next one."""
    start = ray.put(np.zeros(dimension, np.float32))
    in_flight = {worker.compute.remote(start): (worker, 0.0) for worker in workers}
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while in_flight:
        (grad,), _ = ray.wait(list(in_flight))
        worker, began = in_flight.pop(grad)
        now = time.perf_counter()
        if began:
            durations.append(now - began)
        if now < end:
            in_flight[worker.compute.remote(server.push.remote(grad))] = (worker, now)
    return durations


def main() -> None:
    """Start Ray on this machine, measure, and shut it down."""
    job = job_from_command_line()
    with tempfile.TemporaryDirectory(prefix="ray_") as folder:
        ray.init(num_cpus=job.workers + 1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            server = ray.remote(Server).remote(job.parameters)
            workers = [ray.remote(Worker).remote(job.parameters) for _ in range(job.workers)]
            process = psutil.Process(ray.get(server.process.remote()))
            pids = ray.get([worker.process.remote() for worker in workers])
            run(server, workers, job.parameters, WARM_UP_SECONDS)
            before = cpu_seconds(process)
            durations = run(server, workers, job.parameters, job.seconds)
            cpu = cpu_seconds(process) - before
            peaks = [peak_bytes(pid) for pid in pids]
            print(json.dumps(measurement("ray", job, durations, cpu, peak_bytes(process.pid), peaks)), flush=True)
        finally:
            ray.shutdown()
