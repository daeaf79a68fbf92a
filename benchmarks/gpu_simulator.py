"""Compare the simulator on a GPU with a plain training loop: ``python -m benchmarks.gpu_simulator [--cifar FOLDER]``.

ResNet-20, batches of 64, K = 64 virtual workers under OrMo, bf16 autocast, channels last, the data on the device. Beside it a
loop in plain PyTorch of the same net, batch, precision and augmentation: one CUDA graph of batch, forward pass, loss, backward
pass and ``torch.optim.SGD`` with momentum. Both take turns of some hundred gradients within one process. Then the same without
graphs. Printed are gradients per second, their ratio within each round, the host's time for a ticket (without its waiting for
the GPU), and the GPU's time for one gradient alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

import ormo_rpc
from benchmarks import gpu_images
from benchmarks.gpu_graph import captured
from ormo_rpc.composing import compose
from ormo_rpc.data import ArraySplit
from ormo_rpc.report.table import as_markdown as table
from ormo_rpc.runtimes import simulator
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.session import Session
from ormo_rpc.runtimes.simulator.cluster import Cluster
from ormo_rpc.seeding import generator
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.worker import graphs
from ormo_rpc.worker.slots import Slot

BATCH, WORKERS = 64, 64
MOMENTUM, DECAY, LR = 0.9, 1e-4, 0.05
STAGED = 16
"""Batches whose numbers the plain loop has under way."""
WARM_UPS = 11
STAGES: Mapping[str, tuple[type[Any], str]] = {
    "begin": (graphs.GraphWorker, "begin"),
    "wait": (Slot, "wait"),
    "check": (ParameterServer, "validate"),
    "commit": (ParameterServer, "commit"),
    "observe": (Session, "observe"),
    "flush": (Session, "flush"),
}
"""The parts of a ticket on the host: a class, and its method. ``wait`` is for a gradient, ``check`` waits as well."""


def options_of(cifar: str | None, device: str, *, graph: bool, iterations: int) -> list[str]:
    """The overrides of a simulated run."""
    data = ["dataset=cifar10", f"dataset.root={cifar}", "dataset.verify=false"]
    where = [f"server.device={device}", f"worker.device={device}"]
    return [
        *("runtime=sim", f"workers={WORKERS}", f"train.batch_size={BATCH}", "model=resnet20", "logger=none"),
        *(data if cifar else gpu_images.overrides(gpu_images.LIKE_CIFAR)),
        *(where if device != "cpu" else where[1:]),
        *("worker.autocast=bf16", "worker.channels_last=true", f"worker.cuda_graph={str(graph and device != 'cpu').lower()}"),
        *(f"train.lr={LR}", f"train.momentum={MOMENTUM}", f"train.weight_decay={DECAY}", f"train.max_iterations={iterations}"),
        *("train.epochs=1000000", "evaluate.every=100000000"),  # evaluations would count in its turns
    ]


class PlainLoop:
    """A training loop without this package's worker and server.

    Args:
        job: Makes the same model and data.
        device: The device.
        graph: Record all of an iteration as a CUDA graph.
    """

    def __init__(self, job: Job, device: torch.device, *, graph: bool) -> None:
        self.epochs, self.seed, self.task = job.epochs, job.config.seed, job.config.task
        train: Any = job.data.train
        self.split: ArraySplit = train.to(device)
        self.device = device
        self.module = job.model().module.to(device=device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue] # its stubs lack it
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY, foreach=True)
        first = self._draws(0)
        cuda = device.type == "cuda"
        self.staged = [torch.empty_like(first, pin_memory=cuda) for _ in range(STAGED)]
        self.events = [torch.cuda.Event() if cuda else None for _ in range(STAGED)]
        self.draws = first.to(device)
        self.number = 0
        self._repeat = captured(self._iterate, warm_ups=WARM_UPS) if graph and cuda else self._iterate

    def run(self, count: int) -> None:
        """Make iterations."""
        for _ in range(count):
            place, self.number = self.number % STAGED, self.number + 1
            event = self.events[place]
            if event is not None:
                event.synchronize()
            draws = self._draws(self.number)
            if draws.shape == self.draws.shape:  # the last batch of an epoch is left out, as the graph has one shape
                self.draws.copy_(self.staged[place].copy_(draws), non_blocking=True)
            self._repeat()
            if event is not None:
                event.record()

    def gpu_seconds(self, count: int = 200) -> float:
        """The GPU's time for an iteration, when nothing else runs."""
        return gpu_seconds(self._repeat, count)

    def _draws(self, number: int) -> torch.Tensor:
        return self.split.draws(self.epochs.indices(number), generator(self.seed, "augment", number))

    def _iterate(self) -> None:
        batch = self.split.make(self.draws)
        batch = batch[0].contiguous(memory_format=torch.channels_last), batch[1]
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.task.loss(self.task.forward(self.module, batch), batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_seconds(work: Callable[[], None], count: int) -> float:
    """The time of work on the GPU, one after the other, by events."""
    if not torch.cuda.is_available():
        return float("nan")
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(count):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / count


class Turns:
    """The turns of a simulation and a plain loop in one process.

    Args:
        plain: The loop.
        count: Gradients in a turn.
    """

    def __init__(self, plain: PlainLoop, count: int) -> None:
        self.plain = plain
        self.count = count
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.stages: list[dict[str, float]] = []
        """Seconds of the host by stage, for each turn of the simulation."""
        self.spent = defaultdict[str, float](float)
        """Those of this turn."""
        self.began: float | None = None

    def between(self, iteration: int) -> None:
        """Change turns where that is due."""
        if iteration % self.count or iteration == 0:
            return
        synchronize(self.plain.device)
        now = time.perf_counter()
        if self.began is not None:
            self.ours.append((now - self.began) / self.count)
            self.stages.append(dict(self.spent))
        self.plain.run(self.count // 4)
        synchronize(self.plain.device)
        now = time.perf_counter()
        self.plain.run(self.count)
        synchronize(self.plain.device)
        self.theirs.append((time.perf_counter() - now) / self.count)
        self.spent.clear()
        self.began = time.perf_counter()

    def microseconds(self, stage: str) -> float:
        """The median time of a stage for a ticket."""
        return 1e6 * statistics.median(each.get(stage, 0.0) for each in self.stages) / self.count

    @contextlib.contextmanager
    def timed(self) -> Generator[None]:
        """Measure the stages of a ticket in the meantime; what one does within another counts for both."""
        former = {stage: getattr(kind, name) for stage, (kind, name) in STAGES.items()}

        def watched(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                began = time.perf_counter()
                try:
                    return method(*arguments, **options)
                finally:
                    self.spent[stage] += time.perf_counter() - began

            return call

        for stage, (kind, name) in STAGES.items():
            setattr(kind, name, watched(stage, former[stage]))
        try:
            yield
        finally:
            for stage, (kind, name) in STAGES.items():
                setattr(kind, name, former[stage])


def measured(options: list[str], turns: Turns) -> Any:
    """Run the simulation with the other loop's turns in between; return its source of gradients."""
    sources: list[Any] = []

    class Watched(Cluster):
        """A cluster that gives way to the other loop."""

        last = -1

        @override
        def step(self) -> bool:
            sources[:] = [self.source]
            if self.server.iteration != self.last:
                self.last = self.server.iteration
                turns.between(self.last)
            return super().step()

    former = simulator.Cluster
    simulator.Cluster = Watched
    try:
        with tempfile.TemporaryDirectory() as folder, turns.timed():
            ormo_rpc.train(options, run_dir=Path(folder) / "run")
    finally:
        simulator.Cluster = former
    return sources[0]


def comparisons(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure with graphs, then without."""
    for graph, part in ((True, 1), (False, 3)):
        count = max(1, arguments.turn // part)
        options = options_of(arguments.cifar, arguments.device, graph=graph, iterations=count * (arguments.rounds + 1) + 1)
        job = Job(compose(options))
        plain = PlainLoop(job, device, graph=graph)
        turns = Turns(plain, count)
        source = measured(options, turns)
        theirs = turns.theirs[: len(turns.ours)]
        ratios = [plain_seconds / ours for plain_seconds, ours in zip(theirs, turns.ours, strict=True)]
        ours = statistics.median(turns.ours)
        found: dict[str, Any] = {
            "graph": graph,
            "simulator_per_second": 1 / ours,
            "plain_per_second": 1 / statistics.median(theirs),
            "ratio": statistics.median(ratios),
            "ratio_lowest": min(ratios),
            "ratio_highest": max(ratios),
            "plain_gpu_us": 1e6 * plain.gpu_seconds(),
        }
        if isinstance(source, graphs.GraphWorker):
            found["host_us"] = 1e6 * ours - turns.microseconds("wait")
            found |= {f"{stage}_us": turns.microseconds(stage) for stage in STAGES}
            recording = next(iter(source._recordings.values()))  # pyright: ignore[reportPrivateUsage] # the first is that of a full batch
            found["gradient_gpu_us"] = 1e6 * gpu_seconds(recording, 200)
        yield found


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table of a result."""
    head = ("", "simulator, gradients/s", "plain loop", "ratio", "us of the GPU: plain iteration", "gradient", "us of the host")
    rows: list[tuple[str, ...]] = [head]
    for run in result["runs"]:
        ratio = f"{run['ratio']:.2f} ({run['ratio_lowest']:.2f} - {run['ratio_highest']:.2f})"
        more = [f"{run[key]:.0f}" if key in run else "-" for key in ("plain_gpu_us", "gradient_gpu_us", "host_us")]
        rates = (f"{run['simulator_per_second']:,.0f}", f"{run['plain_per_second']:,.0f}")
        rows.append(("CUDA graphs" if run["graph"] else "without graphs", *rates, ratio, *more))
    return f"{result['setting']}.\n\n{table(rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", metavar="FOLDER", help="folder that holds cifar-10-batches-py; without it, random images")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--turn", type=int, default=300, help="gradients in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--into", type=Path, metavar="FILE", help="file of the result, as JSON")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    setting = f"{name}: ResNet-20, batch {BATCH}, K = {WORKERS}, bf16, channels last"
    print(setting, flush=True)
    result: dict[str, Any] = {"setting": setting, "runs": []}
    for found in comparisons(arguments, device):
        result["runs"].append(found)
        print("; ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()))
        if arguments.into:  # at once: whoever ends this command keeps what is done
            arguments.into.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(as_markdown(result))


if __name__ == "__main__":
    main()
