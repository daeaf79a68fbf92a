"""The model, the data and the script of `benchmarks.own_loop`: the same gradients in a built-in task and in an own loop.

As a program it is the script: ``python -m benchmarks.own_loop_script UPDATES``.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

import ormo_rpc
from ormo_rpc.data.splits import DataSet, MapSplit

WIDTH, HIDDEN, CLASSES, BATCH, SAMPLES = 2500, 4000, 8, 4, 64
GAPS = "BENCHMARK_GAPS"
"""The variable with the folder in which each process writes what is between its passes."""


class Timed(nn.Module):
    """A network of 10 million parameters, which writes the seconds between a backward pass and the next forward pass.

    They are wall seconds, and processor seconds of the thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
        self.ended: tuple[float, float] | None = None
        for name in ("net.0.weight", "net.0.bias"):  # the last of a backward pass
            self.get_parameter(name).register_post_accumulate_grad_hook(self._note)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        if self.ended is not None and self.training:
            gap = (time.perf_counter() - self.ended[0], time.thread_time() - self.ended[1])
            with (Path(os.environ[GAPS]) / str(os.getpid())).open("a") as file:
                file.write(f"{gap[0]} {gap[1]}\n")
        return self.net(inputs)

    def _note(self, _: Tensor) -> None:
        self.ended = time.perf_counter(), time.thread_time()


def samples() -> list[tuple[Tensor, int]]:
    """Random inputs, each with a class."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(WIDTH, generator=generator), number % CLASSES) for number in range(SAMPLES)]


def data() -> DataSet:
    """The same as a data set."""
    return DataSet(MapSplit(samples()), MapSplit(samples()[:BATCH]), (WIDTH,), CLASSES)


def main() -> None:
    """Train."""
    torch.manual_seed(0)
    split, network = data().train, Timed()
    epochs = ormo_rpc.Epochs(SAMPLES, BATCH, 0)
    worker = ormo_rpc.join(network, total_tickets=int(sys.argv[1]), lr=1e-4)
    for work in worker:
        inputs, targets = split.batch(epochs.indices(work.ticket), None)
        loss = nn.functional.cross_entropy(network(inputs), targets)
        loss.backward()
        worker.push(loss)


if __name__ == "__main__":
    main()
