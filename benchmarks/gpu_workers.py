"""Measure workers that share a GPU against one plain process on it: ``python -m benchmarks.gpu_workers``.

ResNet-20 on images of 32 x 32 pixels, which are augmented, 64 to a batch, in exact float32. Live runs have processes of their
own for the server and each worker; the plain process is a loop of PyTorch with torch.optim.SGD, whose data and augmentation are
on the GPU too: as it comes (eager), and with its whole step captured as one CUDA graph. The images are random with a pattern
for each class, as what they show does not count here.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import gpu_images
from benchmarks.gpu_graph import captured
from benchmarks.measuring import exit_on_sigterm
from ormo_rpc import train
from ormo_rpc.composing import compose
from ormo_rpc.data import ArraySplit
from ormo_rpc.report.table import as_markdown as table
from ormo_rpc.runtimes.configured import build_module
from ormo_rpc.seeding import generator
from ormo_rpc.storage.run_directory import read_trace

BATCH = 64
WORKERS = 4
SECONDS = 5.0
"""That each live variant is measured for, plain ones half."""
WARM_UP_SECONDS = 1.5
LIVE: Mapping[str, Sequence[str]] = {
    "live, server on the CPU": (),
    "live, captured gradients, server on the CPU": ("worker.cuda_graph=true",),
    "live, captured gradients, server on the GPU": ("worker.cuda_graph=true", "server.device=cuda"),
}
EAGER, CAPTURED = "plain, eager", "plain, captured"


def overrides(workers: int, seconds: float) -> list[str]:
    """The overrides of a live run."""
    return [
        *("runtime=rpc", "algorithm=ormo", "logger=none", "logger.progress=false", f"workers={workers}", "train.lr=0.01"),
        *("model=resnet20", *gpu_images.overrides(gpu_images.LIKE_CIFAR)),
        *(f"train.batch_size={BATCH}", "train.epochs=1000000", f"train.max_seconds={WARM_UP_SECONDS + seconds}"),
        *("worker.device=cuda", "evaluate.every=100000000", "checkpoint.every_seconds=0"),
    ]


def live(more: Sequence[str], workers: int, seconds: float) -> dict[str, Any]:
    """Samples per second of a live run once all its workers work, and what it took."""
    with tempfile.TemporaryDirectory(prefix="gpu_workers_") as folder:
        summary = train([*overrides(workers, seconds), *more], run_dir=Path(folder) / "run")
        _, events = read_trace(Path(folder) / "run")
    times = [event["seconds"] for event in events if event["event"] == "apply" and event["seconds"] >= WARM_UP_SECONDS]
    return {
        "samples_per_second": BATCH * (len(times) - 1) / (times[-1] - times[0]),
        "updates": len(times),
        "transports": sorted({each["transport"] for each in summary["transports"].values()}),
        "worker_gpu_bytes": summary["worker_gpu_bytes"],
        "start_seconds": summary["start_seconds"],
        "server_step_seconds": summary["step_seconds"],
    }


def plain(device: torch.device, seconds: float, *, graph: bool) -> dict[str, Any]:
    """Samples per second of one process that trains by itself."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    data = gpu_images.images(**gpu_images.LIKE_CIFAR)
    assert isinstance(data.train, ArraySplit)
    split = data.train.to(device)
    model = build_module(compose(["model=resnet20"]), data).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)
    drawn = split.draws(torch.arange(BATCH), generator(0, "augment", 0)).to(device)

    def step() -> None:
        inputs, targets = split.make(drawn)
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    once = captured(step) if graph else step
    order = torch.Generator().manual_seed(0)

    def train_one(number: int) -> None:
        chosen = torch.randint(len(split), (BATCH,), generator=order)
        drawn.copy_(split.draws(chosen, generator(0, "augment", number)).pin_memory(), non_blocking=True)
        once()

    number, began = 0, time.perf_counter()
    while time.perf_counter() - began < WARM_UP_SECONDS:
        train_one(number)
        number += 1
    torch.cuda.synchronize()
    first, began = number, time.perf_counter()
    while time.perf_counter() - began < seconds:
        train_one(number)
        number += 1
        if number % 16 == 0:
            torch.cuda.synchronize()  # else the loop would only queue
    torch.cuda.synchronize()
    return {"samples_per_second": BATCH * (number - first) / (time.perf_counter() - began), "updates": number - first}


def measured(workers: int, seconds: float, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All variants, written one by one, as time may run out; one that cannot run here has its reason."""
    found: dict[str, Any] = {}
    result = {"workers": workers, "batch": BATCH, "seconds": seconds, "variants": found}

    def note(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        try:
            found[name] = measure()
        except Exception as error:  # the others are measured all the same
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        print(f"{name}: {found[name]}", flush=True)
        write(result)

    device = torch.device("cuda", 0)
    note(EAGER, lambda: plain(device, seconds / 2, graph=False))
    note(CAPTURED, lambda: plain(device, seconds / 2, graph=True))
    torch.cuda.empty_cache()
    for name, more in LIVE.items():
        note(name, lambda more=more: live(more, workers, seconds))
    return result


def as_markdown(result: Mapping[str, Any]) -> str:
    """A table of the variants, against the plain process."""
    variants: Mapping[str, Mapping[str, Any]] = result["variants"]
    against = {name: variants.get(name, {}).get("samples_per_second") for name in (EAGER, CAPTURED)}
    rows: list[tuple[str, ...]] = [("", "samples/s", "of plain eager", "of plain captured", "GPU memory of a worker")]
    for name, each in variants.items():
        rate = each.get("samples_per_second")
        if rate is None:
            rows.append((name, each["failed"], "", "", ""))
            continue
        parts = [f"{rate / other:.2f}" if other else "-" for other in against.values()]
        memory = each.get("worker_gpu_bytes")
        rows.append((name, f"{rate:,.0f}", *parts, f"{memory / 2**20:.0f} MiB" if memory else "-"))
    return (
        f"ResNet-20, batches of {result['batch']}, exact float32, images and augmentation on the GPU; live runs have "
        f"{result['workers']} workers on it.\n\n{table(rows)}"
    )


def main() -> None:
    """Measure, print the table, and write the result."""
    exit_on_sigterm()
    arguments = ArgumentParser(description=__doc__)
    arguments.add_argument("--workers", type=int, default=WORKERS)
    arguments.add_argument(
        "--seconds", type=float, default=SECONDS, help="that each live variant is measured for, plain ones half"
    )
    arguments.add_argument("--into", type=Path, metavar="FILE", help="file of the result, as JSON")
    a = arguments.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu_workers: torch sees no GPU here, expected one", file=sys.stderr)
        sys.exit(2)

    def write(result: dict[str, Any]) -> None:
        if a.into is not None:
            a.into.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    result = measured(a.workers, a.seconds, write)
    print(as_markdown(result))


if __name__ == "__main__":
    main()
