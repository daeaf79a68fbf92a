"""An eager worker on a GPU makes the pushes that it makes on the CPU, within the rounding of their dtype."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import pytest
import torch

from benchmarks.gpu_images import images
from ormo_rpc.composing import compose
from ormo_rpc.data import Resident
from ormo_rpc.kernels.page_locked import zeros
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.job import Job
from ormo_rpc.seeding import generator

SMALL = ("dataset._target_=benchmarks.gpu_images.images", "train.batch_size=16", "train.weight_decay=0.01", "workers=1")
COLOURED = (*SMALL, "+dataset.side=32", "+dataset.channels=3", "+dataset.count=64", "+dataset.augment=true")
TICKETS = (0, 3, 5)


@dataclass(frozen=True)
class Case:
    """Options of a run, and the relative error that their arithmetic allows.

    Attributes:
        options: Beside `SMALL`.
        error: Of the norm of a push's difference, and of losses.
        data: The data set.
        exact: Options of the same in more bits, where rounding in fewer is more than a small part of the push: the GPU may then
            be off by some times what the CPU is.
    """

    options: tuple[str, ...]
    error: float = 1e-5
    data: tuple[str, ...] = SMALL
    exact: tuple[str, ...] | None = None


TIMES = 4
"""The GPU may be off by so many times what the CPU is off from more bits: it adds up in another order."""
WIDE = "model._target_=tests.gpu.networks.WideResNet20"
CASES = {
    "mlp": Case(("model=mlp",)),
    "cnn": Case(("model=cnn",)),
    "wide": Case((WIDE, "train.clip_norm=1"), error=1e-9, data=COLOURED),
    "resnet20": Case(("model=resnet20", "train.clip_norm=1"), data=COLOURED, exact=(WIDE, "train.clip_norm=1")),
    "channels_last": Case(("model=resnet20", "worker.channels_last=true"), data=COLOURED, exact=(WIDE,)),
    "frozen_norm": Case(("model._target_=tests.support.odd_models.FrozenNorm",)),
    "norm_called_twice": Case(("model._target_=tests.support.odd_models.NormCalledTwice",)),
    "not_resident": Case(("model=cnn", "worker.data_on_device=false")),
    "accumulate": Case(("model=mlp", "worker.accumulate=4")),
    "local_steps": Case(("algorithm=local_sgd", "model=mlp"), error=1e-4),
    "fp16_wire": Case(("model=mlp", "wire.dtype=fp16"), error=2e-3),
    "bf16_wire": Case(("model=mlp", "wire.dtype=bf16"), error=1e-2),
    "topk": Case(("model=mlp", "compression=topk", "compression.ratio=0.1"), error=2e-2),
    "powersgd": Case(("model=mlp", "compression=powersgd"), error=1e-3),
    "bf16": Case(("model=cnn", "worker.autocast=bf16"), error=5e-2, exact=("model=cnn",)),
    "fp16": Case(("model=cnn", "worker.autocast=fp16", "worker.loss_scale=1024"), error=1e-2),
    "tf32": Case(("model=cnn", "worker.tf32=true"), error=1e-2),
}


def pushes(options: tuple[str, ...], device: torch.device) -> list[Push]:
    """The pushes of three tickets at the initial parameters, copied to the CPU."""
    job = Job(compose([*options, f"worker.device={device}"]))
    assert job.device(0) == device
    worker = job.worker(functools.partial(zeros, page_locked=device.type == "cuda"), device)
    assert worker.wire.device.type == "cpu"
    assert worker.push.device == device
    worker.warm_up()
    worker.forget()
    (first,) = job.server(lambda _: None, lambda: 0.0).start([0])
    return [copied(worker.compute(dataclasses.replace(first, ticket=ticket))) for ticket in TICKETS]


def copied(push: Push) -> Push:
    """A push on the CPU that the next one does not write over."""
    buffers = {name: each.to("cpu", copy=True) for name, each in push.buffers.items()}
    return dataclasses.replace(push, grad=push.grad.to("cpu", torch.float64, copy=True), buffers=buffers)


def relative(push: Push, best: Push) -> float:
    """The norm of the difference from the best push there is, relative to that."""
    norm = best.grad.norm().item()
    assert norm > 0
    return (push.grad - best.grad).norm().item() / norm


@pytest.mark.parametrize("name", CASES)
def test_a_push_of_the_gpu_is_that_of_the_cpu(name: str, gpu: torch.device) -> None:
    case, cpu = CASES[name], torch.device("cpu")
    there, here = (pushes((*case.data, *case.options), device) for device in (gpu, cpu))
    exact = here if case.exact is None else pushes((*case.data, *case.exact), cpu)
    # One ticket's batch may have a value at a kink, and another's none.
    off_here = max(relative(other, best) for other, best in zip(here, exact, strict=True))
    allowed = case.error if case.exact is None else TIMES * off_here
    for one, other, best in zip(there, here, exact, strict=True):
        assert (one.ticket, one.samples, list(one.buffers)) == (other.ticket, other.samples, list(other.buffers))
        assert one.loss == pytest.approx(other.loss, rel=case.error)
        assert relative(one, best) <= allowed
        for key, value in other.buffers.items():
            assert torch.allclose(one.buffers[key].double(), value.double(), rtol=max(1e-4, case.error), atol=1e-5), key


def test_draws_of_a_ticket_are_the_same_again(gpu: torch.device) -> None:
    """Dropout draws on the GPU: not what the CPU draws, but again the same for the same ticket, and others for another."""
    options = (*SMALL, "model._target_=tests.support.odd_models.DropoutNet", "worker.deterministic=true")
    try:
        once, again = pushes(options, gpu), pushes(options, gpu)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(once, again, strict=True))
    assert once[0].loss != once[1].loss


def test_batches_that_are_loaded_ahead_are_the_same(gpu: torch.device) -> None:
    job = Job(compose([*COLOURED, "model=resnet20"]))
    worker = job.worker(functools.partial(zeros, page_locked=True), gpu)
    (reply,) = job.server(lambda _: None, lambda: 0.0).start([0])
    losses = list[float | None]()
    for ahead in (False, True):
        if ahead:
            worker.load(reply)
        losses.append(worker.compute(reply).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("options", [(), ("wire.dtype=bf16",), ("compression=topk",)], ids=["exact", "bf16", "topk"])
def test_a_push_that_is_copied_meanwhile_is_the_same_once_it_is_waited_for(options: tuple[str, ...], gpu: torch.device) -> None:
    wires = list[torch.Tensor]()
    for deferred in (False, True):
        job = Job(compose([*COLOURED, "model=resnet20", "worker.deterministic=true", *options]))
        worker = job.worker(functools.partial(zeros, page_locked=True), gpu)
        if deferred:
            worker.defer_copy()
        (first,) = job.server(lambda _: None, lambda: 0.0).start([0])
        for ticket in (0, 1):
            worker.compute(dataclasses.replace(first, ticket=ticket))
            worker.wait_for_copy()
            wires.append(worker.wire.clone())
    torch.use_deterministic_algorithms(False)
    assert torch.equal(wires[0], wires[2])
    assert torch.equal(wires[1], wires[3])


def test_an_evaluation_on_the_gpu_is_that_of_the_cpu(gpu: torch.device) -> None:
    found = list[dict[str, float]]()
    for device in (gpu, torch.device("cpu")):
        job = Job(compose([*COLOURED, "model=resnet20", f"worker.device={device}"]))
        evaluator, server = job.evaluator(), job.server(lambda _: None, lambda: 0.0)
        assert evaluator is not None
        found.append(dict(evaluator(server.params, server.buffers.copy()).test))
        assert evaluator.model.device == device
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_worker_of_a_loaded_reply_leaves_it_as_it_is(gpu: torch.device) -> None:
    job = Job(compose([*SMALL, "model=mlp"]))
    worker = job.worker(functools.partial(zeros, page_locked=True), gpu)
    reply: Reply
    (reply,) = job.server(lambda _: None, lambda: 0.0).start([0])
    before = reply.params.clone()
    worker.compute(reply)
    assert torch.equal(reply.params, before)


def test_batches_that_are_made_on_the_gpu_have_the_bits_of_the_cpu(gpu: torch.device) -> None:
    split = images(count=512, side=32, channels=3, augment=True).train
    assert isinstance(split, Resident)
    there, indices = split.to(gpu), torch.arange(512)
    for number in (None, 7):
        drawn = None if number is None else generator(0, "augment", number)
        again = None if number is None else generator(0, "augment", number)
        for made, expected in zip(there.batch(indices, drawn), split.batch(indices, again), strict=True):
            assert made.device == gpu
            assert torch.equal(made.cpu(), expected)
