"""Measure the simulator's overhead beyond the gradients: ``python -m benchmarks.sim_overhead --cifar FOLDER``.

ResNet-20 on CIFAR-10, batches of 64, K = 64 virtual workers. The time of all calls of `Worker.compute` is subtracted from that
of the whole event loop; the rest (server, snapshots, events, trace) is the simulator's own.
"""

from __future__ import annotations

import argparse
import time
from collections import deque

import torch

from ormo_rpc.composing import compose
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.simulator.clock import EventQueue
from ormo_rpc.runtimes.simulator.cluster import Cluster, Links, Speeds
from ormo_rpc.server.events import Event


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", metavar="FOLDER", help="folder that holds cifar-10-batches-py; without it, an MLP on digits")
    parser.add_argument("--iterations", type=int, default=100)
    arguments = parser.parse_args()
    size = ("workers=64", "train.batch_size=64", f"train.max_iterations={arguments.iterations}")
    cifar = ("dataset=cifar10", "model=resnet20", f"dataset.root={arguments.cifar}", "dataset.verify=false")
    job = Job(compose(["runtime=sim", *size, *(cifar if arguments.cifar else ())]))
    queue, events = EventQueue(), deque[Event]()
    worker = job.worker()
    worker.warm_up()
    compute, seconds = worker.compute, list[float]()

    def timed(reply: Reply) -> Push:
        began = time.perf_counter()
        push = compute(reply)
        seconds.append(time.perf_counter() - began)
        return push

    worker.compute = timed
    server = job.server(events.append, lambda: queue.now)
    cluster = Cluster(server, worker, queue, Links(), Speeds(lambda *_: 0.1, lambda _: torch.Generator()), lambda: None)
    began = time.perf_counter()
    cluster.start()
    while not server.ended and cluster.step():
        pass
    gradients = sum(seconds)
    own = time.perf_counter() - began - gradients
    print(f"{server.iteration} gradients: {gradients:.2f} s; the simulator's own: {own:.3f} s, {own / gradients:.2%} of that")


if __name__ == "__main__":
    main()
