"""Elastic consistency, ``||w_t - w_i||^2 / eta^2``, as the server measures it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.messages import Reply
from ormo_rpc.server.build import build_server
from ormo_rpc.server.elastic import CHUNK, ElasticConsistency
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.schedule import Run, Schedule, schedules

D, K, ETA = 7, 4, 0.05


class Measured:
    """A server, a schedule's run of it, and what it measured.

    Args:
        gradient: The gradient of a reply.
        options: Arguments of `build_server`.
    """

    def __init__(self, gradient: Any, **options: Any) -> None:
        self.events: list[Event] = []
        arguments: dict[str, Any] = {"num_workers": K, "elastic_every": 1, "lr": ETA, "momentum": 0.9} | options
        params = torch.linspace(-1, 1, D, dtype=torch.float64)
        self.server = build_server(params=params, record=self.events.append, **arguments)
        self.run: Run[ParameterServer] = Run(self.server, gradient, arguments["num_workers"]).start()

    @property
    def values(self) -> list[tuple[int, float | None]]:
        """Delay and measurement of each applied gradient."""
        return [(event.data["delay"], event.elastic) for event in self.events if event.kind is Kind.apply]


@given(schedules())
def test_with_constant_gradients_it_is_the_squared_delay_times_that_of_a_gradient(schedule: Schedule) -> None:
    constant = torch.arange(1, D + 1, dtype=torch.float64)
    measured = Measured(lambda _: constant, algorithm="asgd")
    measured.run.follow(schedule)
    expected = [(delay, pytest.approx(delay**2 * float(constant @ constant))) for delay, _ in measured.values]
    assert measured.values == expected


@pytest.mark.parametrize("algorithm", ["ormo", "dana", "smega2", "easgd", "fedbuff"])
@settings(max_examples=10)
@given(schedule=schedules())
def test_it_compares_the_parameters_with_what_the_worker_was_sent(algorithm: str, schedule: Schedule) -> None:
    expected: list[float] = []

    def gradient(reply: Reply) -> Tensor:
        moved = measured.server.params - reply.params[:D]  # called just before the push is received
        expected.append(float(moved @ moved) / ETA**2)
        return torch.sin(reply.params[:D] + reply.worker)

    measured = Measured(gradient, algorithm=algorithm)
    measured.run.follow(schedule)
    assert [value for _, value in measured.values] == pytest.approx(expected)


@pytest.mark.parametrize("scheduler", ["async", "sync"])
def test_a_single_worker_is_never_behind(scheduler: str) -> None:
    measured = Measured(lambda reply: reply.params, algorithm="ormo", scheduler=scheduler, num_workers=1)
    measured.run.follow([("push", 0)] * 5)
    assert measured.values == [(0, 0.0)] * 5


def test_it_is_measured_now_and_then_and_never_with_a_learning_rate_of_0_or_without_what_was_sent() -> None:
    measured = Measured(lambda reply: reply.params, lr=lambda t: 0.0 if t == 3 else ETA, elastic_every=2)
    measured.run.follow([("push", 0)] * 7)
    found = [value for _, value in measured.values]
    assert [value is not None for value in found] == [False, True, False, False, False, True, False]

    resumed = Measured(lambda reply: reply.params)
    resumed.server.load_state_dict(measured.server.state_dict())  # without the replies
    resumed.events.clear()
    resumed.run.outstanding = measured.run.outstanding
    resumed.run.push(next(iter(measured.run.outstanding.values())))
    assert [value for _, value in resumed.values] == [None]


def test_long_vectors_are_compared_in_parts_also_with_parameters_that_were_rounded() -> None:
    params = torch.randn(2 * CHUNK + 5, generator=torch.Generator().manual_seed(0))
    sent = torch.cat([params * 0.5, params]).bfloat16()  # two vectors
    context = PushContext(worker=0, ticket=0, iteration=0, stamp=0, bucket=0, newest_bucket=0, concurrency=1, lr=ETA, sent=sent)
    moved = params.double() - sent[: params.numel()].double()
    expected = float(moved @ moved) / ETA**2
    assert ElasticConsistency(1).measure(params, context) == pytest.approx(expected, rel=1e-5)
    assert ElasticConsistency(1).measure(params * float("inf"), context) is None
