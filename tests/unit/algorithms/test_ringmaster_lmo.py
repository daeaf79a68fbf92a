"""Asynchronous Muon: torch.optim.Muon, singular values, scales, groups and odd shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ormo_rpc.algorithms.groups import Group
from ormo_rpc.algorithms.ringmaster_lmo import Lmo, orthogonalised
from ormo_rpc.config.schema import Config
from ormo_rpc.config.training import Train
from ormo_rpc.messages import Push
from ormo_rpc.options import find
from ormo_rpc.runtimes.job import Job
from ormo_rpc.server.build import build_server
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.quadratic import begin, close, decaying
from tests.support.schedule import Schedule, normal, schedules

SHAPES = ((5, 3), (3, 5), (4, 2, 3, 3), (6,), (), (1, 1), (0, 7))
SIZES = [math.prod(shape) for shape in SHAPES]


def server_of(dtype: torch.dtype = torch.float64, **options: Any) -> ParameterServer:
    return build_server(
        algorithm="ringmaster_lmo", params=normal(sum(SIZES), 0, 0).to(dtype), num_workers=1, shapes=SHAPES, **options
    )


def train(server: ParameterServer, gradients: list[Tensor]) -> list[Tensor]:
    """Apply gradients of one worker, and return how far each has moved the parameters."""
    (reply,) = server.start()
    moves = list[Tensor]()
    for grad in gradients:
        before = server.params.clone()
        assert reply.ticket is not None
        (reply,) = server.receive(Push(worker=0, ticket=reply.ticket, stamp=reply.stamp, grad=grad.to(before.dtype)))
        moves.append(before - server.params)
    return moves


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (40, 40), (200, 10), (1, 9), (9, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_singular_values_end_near_1(shape: tuple[int, int], size: float) -> None:
    # A square normal matrix has singular values down to about 1 / n, which five steps do not bring up to 1.
    matrix = normal(math.prod(shape), 1, 0).view(shape).float() * size
    values = torch.linalg.svdvals(orthogonalised(matrix, 5))
    assert values.max() < 1.21
    assert values.min() > (0.1 if shape == (40, 40) else 0.66)
    # The directions are those of the matrix.
    u, _, v = torch.linalg.svd(matrix.double() / size, full_matrices=False)
    rotated = u.T @ orthogonalised(matrix, 5).double() @ v.T
    assert (rotated - rotated.diag().diag()).abs().max() < 1e-4


def test_a_step_of_each_tensor_has_its_size() -> None:
    (moved,) = train(server_of(lr=0.1, momentum=0.5), [normal(sum(SIZES), 2, 0)])
    grad = normal(sum(SIZES), 2, 0).split(SIZES)
    parts = moved.split(SIZES)
    for part, rows, factor in ((parts[0], 5, (5 / 3) ** 0.5), (parts[1], 3, 1.0), (parts[2], 4, 1.0)):
        values = torch.linalg.svdvals(part.view(rows, -1)) / (0.1 * factor)
        assert 0.66 < values.min() <= values.max() < 1.21
    for part, g in zip(parts[3:5], grad[3:5], strict=True):
        close(part, 0.1 * 0.5 * g)
    assert 0.66 < abs(float(parts[5])) / 0.1 < 1.21
    assert float(parts[5]) * float(grad[5]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2.0**-90, 2.0**60])
def test_the_scale_of_gradients_does_not_matter_to_matrices(dtype: torch.dtype, size: float) -> None:
    gradients = [normal(sum(SIZES), 3, n) for n in range(4)]
    ends = [train(server_of(dtype, lr=0.01), [s * g for g in gradients]) for s in (1.0, size)]
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one[: 15 + 15 + 72], other[: 15 + 15 + 72])


def test_gradients_of_zero_move_nothing() -> None:
    for moved in train(server_of(lr=0.1), [torch.zeros(sum(SIZES))] * 2):
        assert not moved.any()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rates", [(0.02,), (0.05, 0.0, 0.01)], ids=str)
def test_one_worker_is_muon_of_torch(decay: float, rates: tuple[float, ...]) -> None:
    shapes = ((5, 3), (3, 5), (16, 16))
    sizes = [math.prod(shape) for shape in shapes]
    server = build_server(
        algorithm="ringmaster_lmo",
        params=normal(sum(sizes), 0, 0).float(),
        num_workers=1,
        lr=lambda t: rates[t % len(rates)],
        momentum=0.9,
        shapes=shapes,
        groups=(Group(start=0, stop=sum(sizes), weight_decay=decay),),
    )
    parameters = [nn.Parameter(p.view(s).clone()) for p, s in zip(server.params.split(sizes), shapes, strict=True)]
    muon = torch.optim.Muon(parameters, weight_decay=decay, momentum=0.9, nesterov=False)
    gradients = [normal(sum(sizes), 4, n).float() for n in range(12)]
    train(server, gradients)
    for t, grad in enumerate(gradients):
        muon.param_groups[0]["lr"] = rates[t % len(rates)]
        for parameter, part, shape in zip(parameters, grad.split(sizes), shapes, strict=True):
            parameter.grad = part.view(shape)
        muon.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in parameters])
    # torch iterates in bfloat16, whose relative error is 2^-9, times up to 485 for what is nearly no part of a matrix.
    assert (server.params - expected).abs().max() < 0.1 * sum(rates[t % len(rates)] for t in range(12))
    assert float((server.params - expected).norm() / (expected - normal(sum(sizes), 0, 0).float()).norm()) < 0.02


@given(schedule=schedules(changes=True), rate=st.sampled_from([lambda _: 0.1, decaying]), beta=st.sampled_from([0.0, 0.5, 0.9]))
def test_without_lmo_and_bound_it_is_naive_at_a_lower_rate(
    schedule: Schedule, rate: Callable[[int], float], beta: float
) -> None:
    options: dict[str, Any] = {"lmo": "identity", "delay_threshold": 1000}
    run = begin("ringmaster_lmo", num_workers=3, tickets=20, momentum=beta, lr=rate, **options)
    naive = begin(
        "naive", num_workers=3, tickets=20, momentum=beta, lr=lambda t: (1 - beta) * rate(t), momentum_correction=True
    )
    for _ in zip(run.steps(schedule), naive.steps(schedule), strict=True):
        close(run.server.params, naive.server.params, atol=1e-12)


def test_decay_and_factors_are_those_of_each_group() -> None:
    grad, total = normal(sum(SIZES), 5, 0), sum(SIZES)
    groups = (Group(start=0, stop=30, weight_decay=0.5, lr_factor=2.0), Group(start=30, stop=total, lr_factor=0.25))
    plain = server_of(lr=0.1)
    (moved,) = train(plain, [grad])
    (grouped,) = train(server_of(lr=0.1, groups=groups), [grad])
    start = normal(total, 0, 0)
    close(grouped[:30], 0.1 * 2 * 0.5 * start[:30] + 2 * moved[:30])
    close(grouped[30:], 0.25 * moved[30:])


def test_the_tensors_of_a_job_are_those_of_its_model() -> None:
    one = Job(
        Config(
            workers=1,
            algorithm=find("algorithm", "ringmaster_lmo")(lmo=Lmo.spectral),
            model=find("model", "cnn")(),
            train=Train(epochs=1, lr=0.1, weight_decay=0.01),
        )
    )
    server, worker = one.server(lambda _: None, lambda: 0.0), one.worker()
    (reply,) = server.start()
    before = server.params.clone()
    server.receive(worker.compute(reply))
    moved = server.algorithm.tensors(before * (1 - 0.1 * 0.01) - server.params)
    convolutions = [each for each in moved if each.dim() == 4]
    assert convolutions
    for each in convolutions:
        rows, columns = len(each), each[0].numel()
        values = torch.linalg.svdvals(each.view(rows, columns)) / 0.1 / max(1.0, rows / columns) ** 0.5
        assert values.max() < 1.21
        assert values.median() > 0.5
