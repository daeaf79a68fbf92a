"""Measure the server's step on a GPU: ``python -m benchmarks.gpu_server_step``.

For each step and number D of parameters the GPU's time, by events around CUDA graphs of several steps, so that launching does
not count; the bytes that the step has to read and write; and their rate as a share of that of a long copy (bytes read and bytes
written) on the same card. Vectors that fit into the second-level cache may be faster than that. Beside it the time of a whole
push on the host: checks, step, snapshot and reply of `ParameterServer.receive`, for a gradient that lies on the GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ormo_rpc import Push, build_server
from ormo_rpc.kernels.compiled import fastest_kernel
from ormo_rpc.kernels.steps import AdamWStep, HeavyBallStep, OrMoStep, SGDStep, Step, Steps, TorchSteps
from ormo_rpc.kernels.triton_steps import triton_steps
from ormo_rpc.report.table import as_markdown as table

SIZES = (272_474, 2_000_000, 25_000_000, 100_000_000)
STEPS: Mapping[str, Step] = {
    "sgd": SGDStep(1e-3),
    "heavy ball": HeavyBallStep(0.9, 1e-3),
    "ormo, 1 shift": OrMoStep(1.0, 1, 0.9, 1e-3, 1.9e-3),
    "adamw": AdamWStep(1.0, 0.1, 0.999, 0.001, 1 - 1e-5, 1e-3, 0.03, 1e-8),
}
VECTORS = {"sgd": 3, "heavy ball": 5, "ormo, 1 shift": 5, "adamw": 7}
"""The vectors that a step reads or writes, each once; the gradient is one of them."""
GRADIENTS = {"float32": torch.float32, "bf16": torch.bfloat16}
COPY_BYTES = 1 << 30
"""Bytes of the copy that shares are of."""
STEPS_IN_GRAPH, ROUNDS, PUSHES = 5, 9, 60


def gpu_seconds(call: Callable[[], Any], device: torch.device, repeats: int = STEPS_IN_GRAPH) -> float:
    """The GPU's seconds for a call: the median over rounds, each a replayed graph of several calls."""
    call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    took: list[float] = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(took)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a long copy reads and writes together."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / gpu_seconds(lambda: target.copy_(source), device)


def measure_steps(steps: Steps, dimension: int, device: torch.device, rate: float) -> list[dict[str, Any]]:
    """One row for each step and dtype of the gradient."""
    u, v, w, out = (torch.rand(dimension, device=device) for _ in range(4))
    rows: list[dict[str, Any]] = []
    for dtype_name, dtype in GRADIENTS.items():
        grad = torch.randn(dimension, device=device).to(dtype)
        for name, step in STEPS.items():
            momentum, second = None if name == "sgd" else u, v if name == "adamw" else None

            def call(step: Step = step, momentum: Any = momentum, second: Any = second, grad: torch.Tensor = grad) -> None:
                steps(step, grad, momentum, w, out, None, second)

            seconds = gpu_seconds(call, device)
            moved = dimension * (4 * (VECTORS[name] - 1) + dtype.itemsize)
            rows.append(
                {"step": name, "gradient": dtype_name, "us": seconds * 1e6, "bytes": moved, "share": moved / seconds / rate}
            )
    return rows


def push_seconds(dimension: int, device: torch.device) -> float:
    """The host's seconds for a push to a server under OrMo, whose gradient is on the GPU: the median."""
    kernel = fastest_kernel(dimension, device)
    server = build_server(algorithm="ormo", params=torch.zeros(dimension, device=device), num_workers=4, lr=1e-6, kernel=kernel)
    grad = torch.randn(dimension, device=device)
    replies, took = server.start(), list[float]()
    for _ in range(PUSHES):
        reply = replies.pop(0)
        assert reply.ticket is not None
        push = Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=grad)
        began = time.perf_counter()
        replies += server.receive(push)
        took.append(time.perf_counter() - began)
    return statistics.median(took[PUSHES // 3 :])


def measure(sizes: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Everything, for `as_markdown`."""
    rate = copy_rate(device)
    fused = triton_steps(device)
    runs = {"torch": TorchSteps()} if fused is None else {"triton": fused, "torch": TorchSteps()}
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(device),
        "copy_bytes_per_second": rate,
        "steps": [],
        "push_us": {},
    }
    for dimension in sizes:
        for name, steps in runs.items():
            found = measure_steps(steps, dimension, device, rate)
            result["steps"] += [{"parameters": dimension, "implementation": name, **row} for row in found]
            torch.cuda.empty_cache()
        result["push_us"][str(dimension)] = push_seconds(dimension, device) * 1e6
        torch.cuda.empty_cache()
    return result


def as_markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result."""
    rate = result["copy_bytes_per_second"] / 1e9
    words = (
        f"{result['card']}: a copy of {COPY_BYTES >> 20} MiB reads and writes {rate:,.0f} GB/s together; shares are of that."
    )
    rows: list[tuple[str, ...]] = [("parameters", "step", "gradient", "implementation", "us", "MB", "share of the copy")]
    rows += [
        (
            f"{row['parameters']:,}",
            row["step"],
            row["gradient"],
            row["implementation"],
            f"{row['us']:,.1f}",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['share']:.0%}",
        )
        for row in result["steps"]
    ]
    pushes = [("parameters", "us of the host for a push under ormo")]
    pushes += [(f"{int(size):,}", f"{took:,.0f}") for size, took in result["push_us"].items()]
    return "\n\n".join([words, table(rows), table(pushes)])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--device", default="cuda:0", help="the GPU")
    parser.add_argument("--into", type=Path, metavar="FILE", help="file of the result, as JSON")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    torch.cuda.set_device(device)
    result = measure(arguments.parameters, torch.device("cuda", torch.cuda.current_device()))
    if arguments.into:
        arguments.into.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(as_markdown(result))


if __name__ == "__main__":
    main()
