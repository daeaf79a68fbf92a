"""The dummy worker: its pushes, that it computes nothing for a ticket, and the replay of a run with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ormo_rpc
from ormo_rpc.composing import compose
from ormo_rpc.compression import PushFormat
from ormo_rpc.compression.wire_options import WireDtype
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.options import find, parts
from ormo_rpc.runtimes.job import Job
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.storage.run_directory import read_trace
from ormo_rpc.worker.dummy import SCALE, DummyWorker
from ormo_rpc.worker.faults import FaultInjector
from ormo_rpc.worker.worker import Worker
from tests.unit.worker.test_worker import EPOCHS, data, module

SETTING = ("worker.dummy=true", "logger=none", "logger.progress=false", "workers=3", "seed=4")


def job(*overrides: str) -> Job:
    return Job(compose((*SETTING, *overrides)))


def server_of(some: Job) -> ParameterServer:
    return some.server(lambda _: None, lambda: 0.0)


def test_the_option_selects_the_dummy_worker_and_disables_evaluations() -> None:
    assert type(job().worker()) is DummyWorker
    assert type(job("worker.dummy=false").worker()) is Worker
    assert job().evaluator() is None
    assert job("worker.dummy=false").evaluator() is not None


def test_every_ticket_of_every_worker_gets_the_same_small_numbers() -> None:
    some = job()
    one, other, server = some.worker(), some.worker(), server_of(some)
    pushes = [worker.compute(reply) for worker, reply in zip((one, other, one), server.start(), strict=True)]
    assert [(push.worker, push.ticket, push.loss, push.samples) for push in pushes] == [(k, k, None, 32) for k in range(3)]
    assert pushes[0].grad.data_ptr() == pushes[2].grad.data_ptr() == one.payload.data_ptr()  # nothing is copied
    assert torch.equal(pushes[0].grad, pushes[1].grad)
    # The deviation of n draws is within 5 standard errors, SCALE / sqrt(2 n), of SCALE.
    size = pushes[0].grad.numel()
    assert abs(pushes[0].grad.std().item() - SCALE) < 5 * SCALE / (2 * size) ** 0.5
    assert not torch.equal(pushes[0].grad, job("seed=5").worker().compute(server_of(some).start()[0]).grad)


def test_a_dummy_worker_computes_nothing_for_a_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    some = job()
    worker, reply = some.worker(), server_of(some).start()[0]
    worker.warm_up()
    pushed = worker.payload.clone()

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a pass over a vector: {arguments}, {options}")

    for owner, name in ((nn.Module, "__call__"), (torch, "randn"), (torch.Tensor, "mul_"), (torch.Tensor, "copy_")):
        monkeypatch.setattr(owner, name, fail)
    worker.compute(reply)
    monkeypatch.undo()
    assert torch.equal(worker.payload, pushed)


def test_it_draws_again_where_the_payload_has_moved() -> None:
    some = job()
    worker, reply = some.worker(), server_of(some).start()[0]
    before = worker.compute(reply).grad.clone()
    worker.payload = torch.zeros_like(worker.payload)  # such as memory that is shared with the server
    worker.push = worker.payload[: worker.push.numel()]
    assert torch.equal(worker.compute(reply).grad, before)


@pytest.mark.parametrize("wire", ["float32", "bf16"])
@pytest.mark.parametrize("kind", ["mlp", "norm"])
def test_a_fault_spoils_one_push_and_no_later_one(kind: str, wire: str) -> None:
    flat = FlatModel(module(kind))
    form = PushFormat(params=flat.params, buffers=flat.buffers.layout, dtype=flat.dtype, wire=WireDtype(wire))
    worker = DummyWorker(flat, data(), EPOCHS, find("algorithm", "ormo")(), seed=0, wire_format=form)
    reply = Reply(worker=0, ticket=0, stamp=0, params=flat.flat_params(), lr=0.1, steps=1, incarnation=0)
    injector = FaultInjector(["corrupt@0:1"], 0, 0, lambda _: None)
    sent: list[Tensor] = []
    for _ in range(3):
        worker.compute(reply)
        injector.before_push(worker.payload)
        sent.append(worker.wire.clone())
    assert bool((sent[1] == 0xFF).all())
    assert torch.equal(form.unpack(sent[2])[0], form.unpack(sent[0])[0])
    assert form.unpack(sent[2])[1] == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", parts("algorithm"))
def test_every_algorithm_accepts_the_pushes_of_a_dummy_worker(name: str) -> None:
    some = job(f"algorithm={name}")
    worker, server = some.worker(), server_of(some)
    pending = server.start()
    for _ in range(20):
        pending += server.receive(worker.compute(pending.pop(0)))
    assert server.iteration > 0
    assert bool(torch.isfinite(server.params).all())


def test_the_parameters_stay_finite_over_any_number_of_updates() -> None:
    # Each update moves a parameter by at most eta / (1 - beta) times its number: 1e5 of them by 1e5 * 10 * 0.02 * 1e-6 times a
    # normal draw, below 6 among so few: 0.12; a hundredth of them are done here.
    some = job("train.max_iterations=100000", "train.epochs=100000")
    worker, server = some.worker(), server_of(some)
    pending = server.start()
    first = server.params.clone()
    for _ in range(1000):
        pending += server.receive(worker.compute(pending.pop(0)))
    moved = (server.params - first).abs().max().item()
    assert 0 < moved < 0.12 / 100
    assert not server.ended


def test_no_buffers_go_with_it() -> None:
    worker = DummyWorker(FlatModel(module("norm")), data(), EPOCHS, find("algorithm", "ormo")(), seed=0)
    reply = Reply(worker=0, ticket=0, stamp=0, params=worker.model.flat_params(), lr=0.1, steps=1, incarnation=0)
    push: Push = worker.compute(reply)
    assert push.buffers == {}
    assert worker.wire.numel() > 4 * push.grad.numel(), "there is room for them"


def test_a_run_with_dummy_workers_is_recorded_and_replayed(tmp_path: Path) -> None:
    summary = ormo_rpc.train((*SETTING, "runtime=sim", "train.max_iterations=60"), run_dir=tmp_path / "run")
    assert (summary["status"], summary["iterations"], summary["train_loss"], summary["test_accuracy"]) == (
        *("completed", 60),
        *(None, None),
    )
    applied = [event for event in read_trace(tmp_path / "run")[1] if event["event"] == "apply"]
    assert len({event["grad_sum"] for event in applied}) == 1
    again = ormo_rpc.train(("runtime=replay", f"replay.run={tmp_path / 'run'}"), run_dir=tmp_path / "again")
    assert again["identical"] is True


def test_the_time_of_steps_is_within_that_of_the_whole() -> None:
    some = job()
    ticks = iter(range(10_000))
    server, worker = server_of(some), some.worker()
    server.timer = lambda: float(next(ticks))
    pending = server.start()  # three replies: a pair of looks at the timer each
    assert server.step_seconds == 3
    pending += server.receive(worker.compute(pending.pop(0)))  # a step and a reply
    assert server.step_seconds == 5
    assert next(ticks) == 10
