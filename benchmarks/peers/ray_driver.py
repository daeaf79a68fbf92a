"""Ray's side of `ray_server`; imported only where Ray is."""

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

from benchmarks.peers.line import job_from_command_line, peak_bytes, result

# Read when Ray is imported: no report to its makers, and a secret for this run alone, not a file in the home directory.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="session_id", RAY_AUTH_TOKEN=secrets.token_hex(32))
ray: Any = importlib.import_module("ray")  # in an environment of its own
LEARNING_RATE, MOMENTUM = np.float32(1e-3), np.float32(0.9)
WARM_UP_SECONDS = 0.5


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
    """A gradient, the same for all parameters."""

    def __init__(self, dimension: int) -> None:
        self.grad = np.random.default_rng(0).standard_normal(dimension, dtype=np.float32)

    def compute(self, params: Any) -> Any:  # noqa: ARG002 - the parameters have arrived, which is all that is measured
        """Return the gradient, which Ray copies into its store."""
        return self.grad

    def process(self) -> int:
        """Its process number."""
        return os.getpid()


def run(server: Any, workers: list[Any], dimension: int, seconds: float) -> list[float]:
    """Ray's asynchronous parameter server, until the time is over: how long each worker took from gradient to gradient."""
    start = ray.put(np.zeros(dimension, np.float32))
    flying = {worker.compute.remote(start): (worker, 0.0) for worker in workers}
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while flying:
        (grad,), _ = ray.wait(list(flying))
        worker, began = flying.pop(grad)
        now = time.perf_counter()
        if began:
            durations.append(now - began)
        if now < end:
            flying[worker.compute.remote(server.push.remote(grad))] = (worker, now)
    return durations


def main() -> None:
    """Start Ray on this machine, measure, and end it."""
    job = job_from_command_line()
    with tempfile.TemporaryDirectory(prefix="ray_") as folder:
        ray.init(num_cpus=job.workers + 1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            server = ray.remote(Server).remote(job.parameters)
            workers = [ray.remote(Worker).remote(job.parameters) for _ in range(job.workers)]
            process = psutil.Process(ray.get(server.process.remote()))
            pids = ray.get([worker.process.remote() for worker in workers])
            run(server, workers, job.parameters, WARM_UP_SECONDS)
            before = sum(process.cpu_times()[:2])
            durations = run(server, workers, job.parameters, job.seconds)
            cpu = sum(process.cpu_times()[:2]) - before
            line = result("ray", job, durations, cpu, peak_bytes(process.pid), [peak_bytes(pid) for pid in pids])
            print(json.dumps(line), flush=True)
        finally:
            ray.shutdown()
