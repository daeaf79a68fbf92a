"""Run TensorFlow's ParameterServerStrategy; imported only in an environment that has TensorFlow.

A step on a worker applies a constant gradient to the parameters on the server, with SGD and momentum, and reads them. The
coordinator schedules many steps, and each worker takes the next one when it is done; a round trip is the time of a step by its
own clock (``tf.timestamp``), and the rate includes the coordinator's part.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import threading
import time
from typing import Any

import psutil

from benchmarks.peers.measurement import cpu_seconds, job_from_command_line, measurement, peak_bytes

LEARNING_RATE, MOMENTUM = 1e-3, 0.9
WARM_UP_SECONDS = 1.0
BATCHES = 5
"""Number of times that the coordinator waits for all workers during the measurement."""


def serve(cluster: dict[str, list[str]], role: str, index: int) -> None:
    """Serve or work until killed."""
    tf: Any = importlib.import_module("tensorflow")  # in an environment of its own

    tf.distribute.Server(tf.train.ClusterSpec(cluster), job_name=role, task_index=index, protocol="grpc", start=True)
    threading.Event().wait()


def main() -> None:
    """Start the cluster on this machine, measure, and kill it."""
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
    job = job_from_command_line()
    cluster = {"ps": [_address()], "worker": [_address() for _ in range(job.workers)]}
    context = multiprocessing.get_context("spawn")
    roles = [("ps", 0), *(("worker", index) for index in range(job.workers))]
    processes = [context.Process(target=serve, args=(cluster, *role), daemon=True) for role in roles]
    for process in processes:
        process.start()
    try:
        serving = psutil.Process(processes[0].pid)
        durations, elapsed, cpu = _measure(cluster, job, serving)
        peaks = [peak_bytes(int(process.pid or 0)) for process in processes]
        print(json.dumps(measurement("tensorflow", job, durations, cpu, peaks[0], peaks[1:], elapsed)), flush=True)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _measure(cluster: dict[str, list[str]], job: Any, serving: psutil.Process) -> tuple[list[float], float, float]:
    """Seconds of each round trip, of all of them, and of the server's processors."""
    tf: Any = importlib.import_module("tensorflow")  # in an environment of its own

    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(tf.train.ClusterSpec(cluster), rpc_layer="grpc")
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        w = tf.Variable(tf.zeros([job.parameters]))
        u = tf.Variable(tf.zeros([job.parameters]))

    @tf.function
    def step() -> Any:
        began = tf.timestamp()
        with tf.control_dependencies([began]):
            grad = tf.ones([job.parameters])
            applied = tf.raw_ops.ResourceApplyMomentum(
                var=w.handle, accum=u.handle, lr=LEARNING_RATE, grad=grad, momentum=MOMENTUM, use_locking=True
            )
        with tf.control_dependencies([applied]):
            newest = tf.identity(w.read_value())[-1]  # one of them is returned, so that all have to arrive
        with tf.control_dependencies([newest]):
            return tf.timestamp() - began, newest

    def run(seconds: float, at_once: int) -> tuple[list[float], float]:
        results: list[Any] = []
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            batch = [coordinator.schedule(step) for _ in range(at_once)]
            coordinator.join()
            results += batch
        elapsed = time.perf_counter() - began
        return [float(result.fetch()[0]) for result in results], elapsed

    durations, elapsed = run(WARM_UP_SECONDS, 2 * job.workers)
    at_once = max(2 * job.workers, int(len(durations) / elapsed * job.seconds / BATCHES))
    before = cpu_seconds(serving)
    durations, elapsed = run(job.seconds, at_once)
    return durations, elapsed, cpu_seconds(serving) - before


def _address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"
