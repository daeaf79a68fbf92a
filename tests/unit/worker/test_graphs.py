"""The worker that records its passes, on the CPU, where each pass is done anew: its results are those of the plain worker."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ormo_rpc import train
from ormo_rpc.composing import compose
from ormo_rpc.errors import ConfigError, ModelRefused
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.runtimes import job as jobs
from ormo_rpc.runtimes.job import Job
from ormo_rpc.worker.graphs import GraphWorker

ODD = "model._target_=tests.support.odd_models"
NORMED = ("dataset=digits", "model._target_=tests.unit.worker.test_graphs.normed")
RUN = ("runtime=sim", "logger=none", "workers=3", "train.batch_size=200", "heterogeneity=gamma")


def normed(dropout: float = 0.2) -> nn.Module:
    """Convolutions with three sorts of batch norms, and dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(96, 10),
        nn.BatchNorm1d(10, momentum=0.0),
    )


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have jobs build workers that record, from now on."""

    def begin(*, channels_last: bool = False) -> None:
        def build(model: FlatModel, *arguments: Any, **options: Any) -> GraphWorker:
            assert (options.pop("accumulate"), options.pop("compile")) == (1, None)
            options["channels_last"] = channels_last
            recorded = FlatModel(copy.deepcopy(model.module))
            return GraphWorker(recorded, model, *arguments, **options)

        monkeypatch.setattr(jobs, "Worker", build)

    return begin


def replies(job: Job, tickets: Iterable[int]) -> Iterable[Reply]:
    """Replies with parameters and buffers that differ from ticket to ticket."""
    model = job.model()
    params, buffers = model.flat_params(), model.buffers.initial
    vectors = torch.cat([params] + [0.1 * params] * (job.config.algorithm.VECTORS_SENT - 1))
    scale = 1.0 if job.config.worker.autocast.dtype is not torch.float16 else 512.0
    for ticket in tickets:
        yield Reply(
            worker=ticket % 3,
            ticket=ticket,
            stamp=ticket,
            params=vectors * (1 + 0.01 * ticket),
            lr=0.1,
            steps=job.config.algorithm.steps,
            incarnation=0,
            loss_scale=scale,
            buffers=buffers,
        )


def kept(push: Push) -> Push:
    """A copy of a push, whose memory the next one uses."""
    return replace(push, grad=push.grad.clone(), buffers={name: each.clone() for name, each in push.buffers.items()})


def same(one: Push, other: Push, *, exactly: bool = True) -> None:
    tolerance = 0.0 if exactly else 1e-5
    torch.testing.assert_close(one.grad, other.grad, rtol=tolerance, atol=tolerance)
    assert list(one.buffers) == list(other.buffers)
    for name, value in other.buffers.items():
        torch.testing.assert_close(one.buffers[name], value, rtol=tolerance, atol=tolerance)
    assert one.loss == pytest.approx(other.loss, rel=1e-12 if exactly else 1e-5)
    numbers = ("worker", "ticket", "stamp", "samples", "loss_scale")
    assert [getattr(one, name) for name in numbers] == [getattr(other, name) for name in numbers]


OPTIONS: dict[str, tuple[str, ...]] = {
    "norms": NORMED,
    "clip and decay": (*NORMED, "train.clip_norm=0.5", "train.weight_decay=0.01", 'train.no_decay=["*bias"]'),
    "local steps": (*NORMED, "algorithm=local_sgd", "algorithm.local_steps=3"),
    "two vectors": ("algorithm=hiermo", "workers=4", "algorithm.regions=2"),
    "bf16": (*NORMED, "worker.autocast=bf16"),
    "fp16": (*NORMED, "worker.autocast=fp16"),
    "top-k": ("compression=topk", "compression.error_feedback=true"),
    "frozen norm": (f"{ODD}.FrozenNorm",),
    "unused norm": (f"{ODD}.UnusedNorm",),
    "sent in 16 bits": ("wire.params=bf16", "wire.dtype=bf16"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pushes_are_those_of_a_plain_worker(name: str, recording: Callable[..., None]) -> None:
    config = compose([*RUN, *OPTIONS[name]])
    plain, job = Job(config).worker(), Job(config)
    recording()
    worker = job.worker()
    assert type(worker) is GraphWorker
    last = job.batches_per_epoch - 1  # a smaller batch
    order = list(replies(job, (0, 1, 2, last, 3, 4, 5)))
    expected = [kept(plain.compute(reply)) for reply in order]
    for number, (reply, push) in enumerate(zip(order, expected, strict=True)):
        worker.begin(reply, *order[number + 1 : number + 2])
        same(
            worker.compute(reply), push, exactly=name != "local steps"
        )  # the statistics of norms are averaged in another order


def test_channels_last_changes_the_memory_alone(recording: Callable[..., None]) -> None:
    # Without dropout, whose draws lie in memory as the images do.
    config = compose([*RUN, *NORMED, "model.dropout=0", "train.weight_decay=0.01"])
    plain, job = Job(config).worker(), Job(config)
    recording(channels_last=True)
    worker = job.worker()
    for reply in replies(job, range(3)):
        same(worker.compute(reply), plain.compute(reply), exactly=False)
    assert isinstance(worker, GraphWorker)
    weight = worker._recorded_model.trainable["3.weight"]  # pyright: ignore[reportPrivateUsage] # to see its memory
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_what_was_begun_and_dropped_changes_nothing(recording: Callable[..., None]) -> None:
    job = Job(compose([*RUN, *NORMED]))
    plain = job.worker()
    recording()
    worker = job.worker()
    order = list(replies(job, range(8)))
    for first, dropped in zip(order[::2], order[1::2], strict=True):
        worker.begin(dropped, first)
        worker.begin(first, order[-1])
        expected = kept(plain.compute(first))
        same(worker.compute(first), expected)
        same(worker.compute(first), expected)  # again, as nothing but the reply counts


def test_a_gradient_that_is_not_finite_leaves_nothing_behind(recording: Callable[..., None]) -> None:
    job = Job(compose([*RUN, *NORMED]))
    plain = job.worker()
    recording()
    worker = job.worker()
    good, bad, after = replies(job, range(3))
    bad.params.fill_(float("nan"))
    worker.begin(good, bad)
    worker.compute(good)
    worker.begin(bad, after)
    assert not worker.compute(bad).grad.isfinite().all()
    same(worker.compute(after), plain.compute(after))


def test_a_simulation_is_the_same_to_the_bit(recording: Callable[..., None], tmp_path: Path) -> None:
    options = (*RUN, *NORMED, "train.max_iterations=30", "runtime.latency_seconds=[0.2,0.01]")
    plain = train(options, run_dir=tmp_path / "plain")
    recording()
    ahead = train(options, run_dir=tmp_path / "ahead")
    for key in ("final_params_sha256", "final_buffers_sha256", "train_loss"):
        assert ahead[key] == plain[key]


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("NormCalledTwice", "calls the batch norm norm 2 times, expected at most once"),
        ("OldSpectralNorm", r"changes the buffer \S+, expected statistics of batch norms alone"),
        ("AverageInPlace", r"changes the buffer \S+, expected statistics of batch norms alone"),
    ],
)
def test_what_no_graph_holds_is_refused(model: str, line: str, recording: Callable[..., None]) -> None:
    job = Job(compose([*RUN, f"{ODD}.{model}"]))
    recording()
    with pytest.raises(ModelRefused, match=f"^worker.cuda_graph: got a pass that {line}; worker.cuda_graph=false"):
        job.worker().warm_up()


def test_another_result_than_without_a_graph_is_refused(
    recording: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(compose([*RUN, *NORMED]))
    recording()
    worker = job.worker()
    worker.warm_up()
    frozen = worker.data.batch(torch.arange(200), None)
    monkeypatch.setattr(worker.data, "make", lambda _: frozen)  # what a graph would make of Python's random numbers
    monkeypatch.setattr(worker.data, "batch", lambda *_: (frozen[0].flip(0), frozen[1]))
    with pytest.raises(
        ModelRefused, match=r"^worker.cuda_graph: the graph of ticket 0 differs .*: \w+: got values at a distance"
    ):
        worker.compute(next(iter(replies(job, [0]))))


@pytest.mark.parametrize(
    ("option", "line"),
    [("device=cpu", "or a GPU"), ("accumulate=2", "whole batch"), ("compile=eager", "one of them")],
)
def test_what_goes_not_together_is_refused(option: str, line: str) -> None:
    with pytest.raises(ConfigError, match=rf"^worker.cuda_graph: got true with worker.{option}, expected .*{line}"):
        compose(["worker.cuda_graph=true", f"worker.{option}"])
