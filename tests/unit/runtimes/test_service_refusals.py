"""Pushes that the service refuses: not finite, of wrong length, or for a ticket that the worker does not hold."""

from __future__ import annotations

import math
import re

import pytest
import torch

from ormo_rpc.errors import PushRefused, StaleSession, WorkerBanned
from ormo_rpc.messages import Reply
from ormo_rpc.server.loss_scale import LossScale
from tests.support.buffers import wire
from tests.support.service import DIMENSION, begun, gradient, owner, total


def test_a_gradient_that_is_not_finite_goes_to_another_worker() -> None:
    there = owner(2)
    bad, good = begun(there)
    payload = gradient(0)
    payload[2] = math.nan
    answer = there.push(bad, payload).value()
    assert answer.ticket == 2  # other work
    assert not there.service.server.params.any()
    answer = there.push(good).value()
    assert (answer.worker, answer.ticket) == (1, 0)  # the refused one
    there.push(answer)
    assert torch.equal(there.service.server.params, -(gradient(0) + gradient(1)))


def test_a_worker_whose_gradients_are_never_finite_is_banned(caplog: pytest.LogCaptureFixture) -> None:
    there = owner(2, total_tickets=9)
    there.service.max_not_finite = 3
    bad, good = begun(there)
    nan = torch.full((DIMENSION,), math.nan, dtype=torch.float64)
    for _ in range(2):
        bad = there.push(bad, nan).value()
        good = there.push(good).value()
    answer = there.push(bad, nan)
    with pytest.raises(WorkerBanned, match=r"\Aworker 0: 3 gradients in a row were not finite \(runtime\.max_not_finite\)\Z"):
        answer.wait()
    assert "worker 0 (pid 1000 on here) was banned: 3 gradients in a row" in caplog.text
    assert sorted(there.service.server.members) == [1]
    while good.ticket is not None:
        good = there.push(good).value()
    assert torch.equal(there.service.server.params, -total(9))  # its tickets were done by the other one


def test_a_finite_gradient_resets_the_count_of_non_finite_ones() -> None:
    there = owner(2)
    there.service.max_not_finite = 2
    reply, _ = begun(there)
    nan = torch.full((DIMENSION,), math.nan, dtype=torch.float64)
    for payload in (nan, None, nan, None):
        reply = there.push(reply, payload).value()
    assert sorted(there.service.server.members) == [0, 1]


@pytest.mark.parametrize("buffers", [0, 3])
@pytest.mark.parametrize("difference", [-7, -4, -3, -1, 1, 5])
def test_a_payload_of_wrong_length_is_refused_and_nothing_changes(buffers: int, difference: int) -> None:
    there = owner(2, buffers=buffers)
    reply, _ = begun(there)
    size = 8 * DIMENSION + (16 + 32 if buffers else 0)  # a mark, and three numbers of 8 bytes, each at a multiple of 16
    length = max(0, size + 8 * difference)
    with pytest.raises(PushRefused) as caught:
        there.push(reply, torch.zeros(length, dtype=torch.uint8))
    expected = rf"push: payload: got \({length},\) of torch.uint8 on cpu, expected {size} bytes .*"
    assert re.fullmatch(expected, str(caught.value))
    assert there.service.server.iteration == 0
    statistics = {"mean": torch.arange(3.0, dtype=torch.float64)} if buffers else {}
    assert there.push(reply, wire(there.service.push_format, gradient(0), statistics)).value().ticket == 2
    assert [value.tolist() for value in there.service.server.buffers.current.values()] == ([[0, 1, 2]] if buffers else [])


def test_a_refused_push_does_not_complete_the_open_future() -> None:
    seen: list[int] = []
    there = owner(2, scheduler="sync", observe=lambda server: seen.append(server.iteration))
    first, second = begun(there)
    held = there.push(first)
    with pytest.raises(
        PushRefused, match=r"\Apush of worker 0: ticket: got 1, which is held by worker 1; push for a ticket .*"
    ):
        there.push(Reply(worker=0, ticket=1, stamp=0, params=first.params, lr=0.0, steps=1, incarnation=0))
    with pytest.raises(StaleSession, match=r"\Apush of worker 0 for ticket 0: incarnation: got 9, expected 0; .*"):
        there.push(Reply(worker=0, ticket=0, stamp=0, params=first.params, lr=0.0, steps=1, incarnation=9))
    assert not held.done()
    there.push(second)
    assert held.value().ticket == 2
    assert seen == [1, 2]  # nothing to see after what was refused


def test_a_refused_push_is_no_failure_of_the_service() -> None:
    there = owner(2)
    first, _ = begun(there)
    with pytest.raises(PushRefused):
        there.push(first, torch.zeros(DIMENSION + 1, dtype=torch.float64))
    with pytest.raises(PushRefused):
        there.push(Reply(worker=0, ticket=1, stamp=0, params=first.params, lr=0.0, steps=1, incarnation=0))
    assert there.service.failure is None
    assert there.push(first).value().ticket == 2


def test_a_worker_whose_gradients_overflow_is_not_banned(caplog: pytest.LogCaptureFixture) -> None:
    there = owner(2, loss_scale=LossScale(initial=16.0))
    there.service.max_not_finite = 2
    reply, _ = begun(there)
    nan = torch.full((DIMENSION,), math.nan, dtype=torch.float64)
    for scale in (16.0, 8.0, 4.0, 2.0):
        assert reply.loss_scale == scale
        reply = there.push(reply, nan).value()
    assert sorted(there.service.server.members) == [0, 1]
    assert not there.service.evictions
    assert not caplog.text
