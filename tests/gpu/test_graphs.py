"""Recorded passes against passes that are not, on the GPU and on the CPU; and models that are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ormo_rpc.composing import compose
from ormo_rpc.errors import ModelRefused
from ormo_rpc.runtimes.job import Job
from ormo_rpc.worker.graphs import GraphWorker
from tests.gpu.graph_models import check_same, kept, replies

RUN = ("runtime=sim", "logger=none", "train.batch_size=200", "worker.device=cuda", "worker.cuda_graph=true")
MODELS = "model._target_=tests.gpu.graph_models"
LAST_BITS = ("worker.channels_last=true", "worker.autocast=bf16")

CASES: dict[str, tuple[tuple[str, ...], float]] = {
    "mlp": ((), 1e-4),
    "cnn": (("model=cnn",), 1e-4),
    "resnet20": (("model=resnet20",), 1e-3),
    "resnet20, 16 bits": (("model=resnet20", *LAST_BITS), 0.3),
    "dropout": ((f"{MODELS}.dropping",), 1e-4),
    "dropout, 16 bits": ((f"{MODELS}.dropping", *LAST_BITS), 0.05),
    "fp16": (("model=cnn", "worker.autocast=fp16"), 0.05),
    "clip and decay": ((f"{MODELS}.dropping", "train.clip_norm=0.5", "train.weight_decay=0.01"), 1e-4),
    "local steps": ((f"{MODELS}.dropping", "algorithm=local_sgd", "algorithm.local_steps=3"), 1e-3),
    "top-k": (("compression=topk", "compression.error_feedback=true"), 1e-2),
    "copied batches": (("model=cnn", "worker.data_on_device=false"), 1e-4),
    "inputs changed in place": ((f"{MODELS}.Centring", "worker.data_on_device=false"), 1e-4),
    "mask of the newest size": ((f"{MODELS}.Masking",), 1e-4),
}


def workers(gpu: torch.device, *options: str) -> tuple[Job, GraphWorker]:
    """A job, and a worker that records."""
    job = Job(compose([*RUN, *options]))
    worker = job.worker(device=gpu)
    assert type(worker) is GraphWorker
    return job, worker


@pytest.mark.parametrize("name", CASES)
def test_pushes_are_those_of_passes_that_are_not_recorded(name: str, gpu: torch.device) -> None:
    options, allowed = CASES[name]
    job, worker = workers(gpu, *options)
    plain = Job(compose([*RUN, *options, "worker.cuda_graph=false"])).worker(device=gpu)
    worker.warm_up()
    scale = 1024.0 if "worker.autocast=fp16" in options else 1.0
    order = replies(job, (0, 1, 2, job.batches_per_epoch - 1, 3, 4), gpu, loss_scale=scale)
    for number, reply in enumerate(order):
        worker.begin(reply, *order[number + 1 : number + 2])
        check_same(kept(worker.compute(reply)), kept(plain.compute(reply)), allowed)


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet20"])
def test_pushes_are_those_of_the_cpu(model: str, gpu: torch.device) -> None:
    job, worker = workers(gpu, f"model={model}")
    plain = Job(compose([*RUN[:3], "worker.device=cpu", f"model={model}"])).worker()
    on_gpu, on_cpu = (replies(job, range(3), device) for device in (gpu, torch.device("cpu")))
    for there, here in zip(on_gpu, on_cpu, strict=True):
        check_same(kept(worker.compute(there)), kept(plain.compute(here)), 2e-3)


def test_dropout_is_a_function_of_the_ticket(gpu: torch.device) -> None:
    job, worker = workers(gpu, f"{MODELS}.dropping", "worker.deterministic=true")
    first, second, third = replies(job, range(3), gpu)
    worker.begin(first, second)
    one = kept(worker.compute(first))
    torch.rand(100, device=gpu)  # another use of the GPU's generator
    worker.begin(second, third)
    other = kept(worker.compute(second))
    worker.begin(third, first)
    worker.compute(third)
    again = kept(worker.compute(first))
    assert torch.equal(again.grad, one.grad)
    assert again.loss == one.loss
    assert not torch.equal(other.grad, one.grad)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("CalledTwice", "got a pass that calls the batch norm norm 2 times, expected at most once"),
        ("Spectral", r"got a pass that changes the buffer layer\.\S+, expected statistics of batch norms alone"),
        ("StochasticDepth", "got a pass that draws random numbers on the CPU, or from Python's or numpy's generator"),
        ("Waiting", r"got a pass that waits for the GPU at \S+graph_models\.py:\d+ .*item\(\)"),
    ],
)
def test_what_no_graph_holds_is_refused_in_a_line(model: str, line: str, gpu: torch.device) -> None:
    _, worker = workers(gpu, f"{MODELS}.{model}")
    with pytest.raises(ModelRefused, match=f"^worker.cuda_graph: {line}.*; worker.cuda_graph=false computes it as it is$"):
        worker.warm_up()


def test_control_flow_that_a_graph_freezes_is_refused(gpu: torch.device) -> None:
    job, worker = workers(gpu, f"{MODELS}.Alternating")
    order = replies(job, range(17), gpu)
    with pytest.raises(ModelRefused, match=r"^worker.cuda_graph: the graph of ticket \d+ differs from a pass without one"):
        _ = [worker.compute(reply) for reply in order]


def test_a_pass_that_cannot_be_recorded_ends_in_a_line(gpu: torch.device, tmp_path: Path) -> None:
    del gpu
    command = [sys.executable, "-m", "ormo_rpc", *RUN, f"{MODELS}.Synchronizing", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "worker.cuda_graph: got a pass that cannot be recorded" in done.stderr
    assert "Traceback" not in done.stderr
