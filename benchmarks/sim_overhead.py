"""What the simulator costs beyond the gradients: ``python benchmarks/sim_overhead.py --cifar DIRECTORY``.

ResNet-20 on CIFAR-10, batches of 64, K = 64 virtual workers. The time of all calls of `Worker.compute` is taken from that of
the whole event loop; what is left (server, snapshots, events, trace) is the simulator's own.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from ormo_rpc.cli import compose
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.simulator.clock import EventQueue
from ormo_rpc.runtimes.simulator.cluster import Cluster, Links, Speeds
from ormo_rpc.server.events import Event
from ormo_rpc.worker.worker import Worker


class Timed:
    """A worker that counts the seconds of its gradients."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.seconds = 0.0

    def compute(self, reply: Reply) -> Push:
        """As `Worker.compute`."""
        began = time.perf_counter()
        push = self.worker.compute(reply)
        self.seconds += time.perf_counter() - began
        return push

    def forget(self, worker: int | None = None) -> None:
        """As `Worker.forget`."""
        self.worker.forget(worker)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """As `Worker.state_dict`."""
        return self.worker.state_dict()

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """As `Worker.load_state_dict`."""
        self.worker.load_state_dict(state)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", required=True, help="the folder that holds cifar-10-batches-py")
    parser.add_argument("--iterations", type=int, default=100)
    arguments = parser.parse_args()
    data = (f"dataset.root={arguments.cifar}", "dataset.verify=false", "train.batch_size=64")
    size = ("workers=64", f"train.max_iterations={arguments.iterations}")
    job = Job(compose(["runtime=sim", "dataset=cifar10", "model=resnet20", *data, *size]))
    queue, events = EventQueue(), deque[Event]()
    source = Timed(job.worker())
    source.worker.warm_up()
    server = job.server(events.append, lambda: queue.now)
    cluster = Cluster(server, source, queue, Links(), Speeds(lambda *_: 0.1, lambda _: torch.Generator()), lambda: None)
    began = time.perf_counter()
    cluster.start()
    while not server.ended and cluster.step():
        pass
    whole = time.perf_counter() - began
    own = whole - source.seconds
    part = own / source.seconds
    print(f"{server.iteration} gradients: {source.seconds:.2f} s; the simulator's own: {own:.3f} s, {part:.2%} of that")


if __name__ == "__main__":
    main()
