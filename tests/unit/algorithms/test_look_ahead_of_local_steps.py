"""Momentum look-ahead on local steps, MLA and HeLoCo: closed forms, plain loops, torch.optim and real workers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from ormo_rpc.algorithms.heloco import HeLoCo
from ormo_rpc.config.schema import Config
from ormo_rpc.config.training import Train
from ormo_rpc.models import MLP
from ormo_rpc.options import find
from ormo_rpc.runtimes.job import Job
from ormo_rpc.server.build import build_server
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.quadratic import BETA, PROBLEM, begin, close
from tests.support.schedule import Schedule, normal, schedules

GAMMA = 0.7


def momentum_of(server: ParameterServer) -> Tensor:
    """Return a copy of ``m``."""
    return torch.as_tensor(server.algorithm.state_dict()["m"]).clone()


@pytest.mark.parametrize("name", ["mla", "heloco"])
@given(schedule=schedules(changes=True), mu=st.sampled_from([0.0, 0.5, 0.9]))
def test_workers_are_sent_where_the_momentum_leads(name: str, schedule: Schedule, mu: float) -> None:
    run = begin(name, num_workers=3, tickets=20, momentum=mu)
    for step in run.steps(schedule):
        ahead = run.server.params - GAMMA * mu * momentum_of(run.server)
        for reply in step.replies:
            close(reply.params, run.server.params if reply.ticket is None else ahead, atol=1e-12)


@given(schedule=schedules(), mu=st.sampled_from([0.0, 0.5, 0.9]))
def test_y_takes_one_plus_mu_of_each_push_of_mla(schedule: Schedule, mu: float) -> None:
    run = begin("mla", num_workers=3, tickets=20, momentum=mu)

    def y() -> Tensor:
        return run.server.params - GAMMA * mu**2 / (1 - mu) * momentum_of(run.server)

    expected = y()
    for step in run.steps(schedule):
        assert step.push is not None
        expected = expected - GAMMA * (1 + mu) * step.push.grad
        close(y(), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["mla", "heloco"])
@given(schedule=schedules())
def test_without_momentum_it_is_asynchronous_local_sgd(name: str, schedule: Schedule) -> None:
    H, lr = 3, 0.1
    options: dict[str, Any] = {"cosine_ok": -1.0} if name == "heloco" else {}
    run = begin(name, num_workers=3, tickets=20, momentum=0.0, local_steps=H, lr=lr, outer_lr=1.0, **options)
    w = run.server.params.clone()
    starts = dict.fromkeys(run.outstanding, w)
    for step in run.steps(schedule):
        assert step.push is not None
        start = x = starts.pop((step.worker, step.push.ticket))
        for _ in range(H):
            x = x - lr * PROBLEM.gradient_at(x)
        w = w - (start - x)
        close(run.server.params, w)
        starts.update({(reply.worker, reply.ticket): w for reply in step.replies if reply.ticket is not None})


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_local_steps_are_those_of_torch(beta: float) -> None:
    run = begin("mla", num_workers=1, tickets=4, local_steps=5, local_momentum=beta, lr=lambda t: 0.1 / (1 + t))
    for _ in range(4):
        (reply,) = run.outstanding.values()
        parameter = nn.Parameter(reply.params.clone())
        sgd = torch.optim.SGD([parameter], lr=reply.lr, momentum=beta)
        for _ in range(5):
            parameter.grad = PROBLEM.gradient_at(parameter.detach())
            sgd.step()
        push = run.push(reply).push
        assert push is not None
        close(push.grad, reply.params - parameter.detach())


def test_synchronous_rounds_without_momentum_are_local_sgd() -> None:
    K = 3
    rounds = begin("mla", num_workers=K, tickets=30, scheduler="sync", momentum=0.0, outer_lr=1 / K)
    averaged = begin("local_sgd", num_workers=K, tickets=30, momentum=0.0)
    for number, _ in enumerate(zip(rounds.steps([]), averaged.steps([]), strict=True), start=1):
        if number % K == 0:
            close(rounds.server.params, averaged.server.params)


# ----------------------------------------------------------------------------------------------------- the correction


def corrected(push: Tensor, momentum: Tensor, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return what enters the recursion of HeLoCo for a push when its momentum is given."""
    server = build_server(algorithm="heloco", params=torch.zeros(len(push), dtype=dtype), num_workers=1, shapes=shapes or None)
    assert isinstance(server.algorithm, HeLoCo)
    server.algorithm.m.copy_(momentum)
    return server.algorithm.corrected(push.to(dtype))


def test_a_part_opposed_to_the_momentum_is_cut_and_the_rest_stays() -> None:
    # cos = -3/5, |D| = 5, |m| = 2: the confidence is 5 / (5 + 3 * 2), b = 0.5 * 0.6 * 5 / 11 = 3 / 22.
    got = corrected(torch.tensor([-3.0, 4.0]), torch.tensor([2.0, 0.0]))
    close(got, torch.tensor([-3.0 * (1 - 3 / 22), 4.0], dtype=torch.float64))


def test_at_most_half_of_it_is_cut() -> None:
    # b = 0.5 * 1 * 1000 / 1000.003 is below 1/2 by little; with k_s = 0.5 the bound is reached in the limit alone.
    got = corrected(torch.tensor([-1000.0, 0.0]), torch.tensor([0.001, 0.0]))
    close(got, torch.tensor([-1000.0 * (1 - 0.5 * 1000 / 1000.003), 0.0], dtype=torch.float64), atol=1e-10)


def test_one_near_a_right_angle_is_turned_and_keeps_its_length() -> None:
    # cos = 0, |D| = 2, |m| = 1: the confidence is 2 / 5, l = 0.4, u = (0.4, 0.6).
    got = corrected(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
    close(got, torch.tensor([0.8, 1.2], dtype=torch.float64) / math.hypot(0.4, 0.6))
    assert float(got.norm()) == pytest.approx(2.0, rel=1e-14)


def test_each_tensor_has_an_angle_of_its_own() -> None:
    # The second tensor goes with its momentum and stays to the bit, the third has no direction, the fourth no momentum.
    push = torch.tensor([-3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 0.0, -5.0], dtype=torch.float64)
    momentum = torch.tensor([2.0, 0.0, 1.0, 2.0, 3.0, 4.0, 7.0, 0.0], dtype=torch.float64)
    got = corrected(push, momentum, (2,), (2, 2), (1, 1), ())
    assert torch.equal(got[2:], push[2:])
    close(got[:2], torch.tensor([-3.0 * (1 - 3 / 22), 4.0], dtype=torch.float64))


@pytest.mark.parametrize("angle", [0.2, 1.45, 2.5])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12])
def test_the_correction_does_not_depend_on_the_unit(angle: float, size: float) -> None:
    push, momentum = torch.tensor([math.cos(angle), math.sin(angle), 0.0]), torch.tensor([1.5, 0.0, 0.0])
    got = corrected(size * push, size * momentum, dtype=torch.float32)
    torch.testing.assert_close(got / size, corrected(push, momentum).float(), rtol=0, atol=1e-6)


def test_cosine_minus_one_is_mla_although_it_is_rounded() -> None:
    # The cosine of a vector and its opposite can be rounded to below -1.
    for seed in range(200):
        push = normal(7, 0, seed)
        server = build_server(algorithm="heloco", params=torch.zeros(7), num_workers=1, cosine_ok=-1.0)
        assert isinstance(server.algorithm, HeLoCo)
        server.algorithm.m.copy_(-3 * push)
        assert torch.equal(server.algorithm.corrected(push.float()), push.float())


# -------------------------------------------------------------------------------------------------------- the layout


def job(algorithm: str, **options: Any) -> Job:
    return Job(
        Config(
            workers=1,
            algorithm=find("algorithm", algorithm)(local_steps=4, **options),
            model=MLP(hidden=8, depth=1, dropout=0.0),
            train=Train(epochs=1, batch_size=359, lr=0.05, momentum=BETA, weight_decay=0.01),
        )
    )


def test_the_server_of_a_job_knows_the_tensors_of_its_model() -> None:
    one = job("heloco")
    algorithm, module = one.server(lambda _: None, lambda: 0.0).algorithm, one.model().module
    parameters = list(module.parameters())
    assert [tuple(shape) for shape in algorithm.shapes] == [tuple(each.shape) for each in parameters]
    for got, parameter in zip(algorithm.tensors(algorithm.params), parameters, strict=True):
        assert torch.equal(got, parameter)
        assert got.untyped_storage().data_ptr() == algorithm.params.untyped_storage().data_ptr()


def test_without_shapes_it_is_one_tensor_and_wrong_ones_are_refused() -> None:
    algorithm = build_server(algorithm="heloco", params=torch.zeros(6), num_workers=1).algorithm
    assert [each.shape for each in algorithm.tensors(algorithm.params)] == [(6,)]
    with pytest.raises(ValueError, match=r"^shapes: got 5 elements in 2 tensors, expected 6, those of params$"):
        build_server(algorithm="heloco", params=torch.zeros(6), num_workers=1, shapes=[(2, 2), ()])


def test_a_real_worker_takes_fewer_steps_where_fewer_batches_are_left() -> None:
    # 1,437 samples are a ticket of four batches of 359, and a last one of a single sample, hence of one batch.
    one = job("mla", outer_lr=1.0)
    assert [len(one.epochs.indices(ticket)) for ticket in range(one.total_tickets)] == [4 * 359, 1]
    worker, server, module = one.worker(), one.server(lambda _: None, lambda: 0.0), one.model().module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, weight_decay=0.01)
    w = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    m = torch.zeros_like(w)
    (reply,) = server.start()
    for ticket in range(2):
        start = w - BETA * m
        close(reply.params, start, atol=2e-6)  # float32, values of order 1
        nn.utils.vector_to_parameters(start.clone(), module.parameters())
        indices = one.epochs.indices(ticket)
        for part in indices.tensor_split(min(4, len(indices))):
            inputs, targets = one.data.train.batch(part, torch.Generator())
            optimizer.zero_grad()
            functional.cross_entropy(module(inputs), targets).backward()
            optimizer.step()
        moved = start - nn.utils.parameters_to_vector(module.parameters()).detach()
        m = BETA * m + (1 - BETA) * moved
        w = w - moved - BETA * m
        (reply,) = server.receive(worker.compute(reply))
        close(server.params, w, atol=2e-6)
    assert reply.ticket is None
