"""Regions: servers that are workers of another server, against HALoS and HierMo with all their regions on one server."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.algorithms.halos import HALoS
from ormo_rpc.algorithms.hiermo import HierMo
from ormo_rpc.messages import Push, Reply
from ormo_rpc.server.buffer_rules import Rule, RuleKind
from ormo_rpc.server.build import build_server
from ormo_rpc.server.loss_scale import LossScale
from ormo_rpc.server.region import RegionServer
from tests.support.quadratic import PROBLEM, D, begin, close
from tests.support.schedule import Schedule, answer, normal, pushed, schedules

J = 3
OPTIONS: dict[str, Any] = {"exchange": J, "region_period": 2, "merge_weight": 0.4, "local_steps": 2}


def start() -> Tensor:
    """Return ``w_0``."""
    return torch.linspace(-1, 1, D, dtype=torch.float64)


def new_region(num_workers: int, params: Tensor | None = None, **others: Any) -> RegionServer:
    """Make a region with the options above."""
    rule = HALoS(region_workers=num_workers, **OPTIONS).region_rule()
    return RegionServer(rule, start() if params is None else params, num_workers, J, **others)


def ticket(number: int, params: Tensor, worker: int = 0) -> Reply:
    """Return a reply of the global server."""
    return Reply(worker=worker, ticket=number, stamp=number, params=params, lr=0.1, steps=2 * J, incarnation=0)


@given(schedule=schedules())
def test_two_regions_with_servers_of_their_own_are_those_of_one_server(schedule: Schedule) -> None:
    # One worker in each region: it works while its region's server works for the global one, and sees the same parameters.
    together = begin("halos", num_workers=2, tickets=12 * J, lr=0.1, regions=2, **OPTIONS)
    server = build_server(
        algorithm="halos", params=start(), num_workers=2, lr=0.1, total_tickets=40, region_workers=1, **OPTIONS
    )
    regions, outstanding = [new_region(1), new_region(1)], dict[int, Reply]()

    def hand_out(replies: list[Reply]) -> None:
        for reply in replies:
            if reply.ticket is not None:
                (outstanding[reply.worker],) = regions[reply.worker].grant(reply)

    hand_out(server.start())
    work = pushed(regions[0].core.algorithm, PROBLEM.gradient_at)
    for number, step in enumerate(together.steps(schedule), start=1):
        if number == 12 * J:
            break  # at the end the one server closes its rounds
        r = step.worker
        reply = outstanding.pop(r)
        replies, pushes = regions[r].receive(answer(reply, work(reply)))
        for local in replies:
            outstanding[r] = local
        for push in pushes:
            hand_out(server.receive(push))
        close(server.params, together.server.params)
        for q in range(2):
            expected = together.server.algorithm.state_dict()[f"region_th/{q}"]
            assert isinstance(expected, Tensor)
            close(regions[q].core.params, expected)


@pytest.mark.parametrize(("R", "N", "pi"), [(2, 3, 2), (3, 1, 1), (1, 2, 3)])
@given(orders=st.lists(st.integers(0, 99), max_size=20))
def test_edges_with_servers_of_their_own_are_those_of_one_server(R: int, N: int, pi: int, orders: list[int]) -> None:
    # Worker j of edge e is worker e + R j of the one server. Each has a shift of its own in the gradient, so who is averaged
    # with whom matters; in which order pushes come does not.
    shifts = torch.randn(R * N, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options: dict[str, Any] = {"local_steps": 2, "edge_rounds": pi, "edge_momentum": 0.2}
    server = build_server(
        algorithm="hiermo",
        params=start(),
        num_workers=R,
        lr=0.05,
        momentum=0.5,
        region_workers=N,
        total_tickets=9 * R,
        **options,
    )
    work = [
        pushed(server.algorithm, lambda x, shift=shift: PROBLEM.gradient_at(x) + shift)
        for shift in shifts  # pyright: ignore[reportUnknownVariableType] # torch does not say what a tensor iterates over
    ]
    together = begin(
        "hiermo",
        num_workers=R * N,
        tickets=4 * R * N * pi,
        lr=0.05,
        momentum=0.5,
        regions=R,
        gradient=lambda reply: work[reply.worker](reply),
        **options,
    )
    rule = HierMo(region_workers=N, **options).region_rule()
    edges, outstanding = dict[int, RegionServer](), list[tuple[int, Reply]]()

    def hand_out(replies: list[Reply]) -> None:
        for reply in replies:
            edge = edges.setdefault(reply.worker, RegionServer(rule, reply.params, N, pi * N))
            outstanding.extend((reply.worker, local) for local in edge.grant(reply))

    hand_out(server.start())
    for number, _ in enumerate(together.steps([]), start=1):
        position = orders[number % len(orders)] % len(outstanding) if orders else 0
        edge, reply = outstanding.pop(position)
        replies, pushes = edges[edge].receive(answer(reply, work[edge + R * reply.worker](reply)))
        outstanding.extend((edge, local) for local in replies)
        for push in pushes:
            hand_out(server.receive(push))
        if number % (R * N * pi) == 0:  # a round of the cloud
            close(server.params, together.server.params)


@given(schedule=schedules(changes=True), seed=st.integers(0, 5), ahead=st.booleans())
def test_parts_are_committed_once_though_workers_leave_join_and_fail(schedule: Schedule, seed: int, ahead: bool) -> None:
    region, members, gone = new_region(3), {0, 1, 2}, list[int]()
    committed, sent, granted = Counter[int](), list[Push](), 0
    outstanding, failed = list[Reply](), set[int]()

    def grant() -> None:
        nonlocal granted
        outstanding.extend(region.grant(ticket(granted, start())))
        granted += 1

    def push(position: int) -> None:
        reply = outstanding.pop(position)
        assert reply.ticket is not None
        grad = normal(D, seed, reply.ticket)
        fails = reply.ticket % 4 == 1 and reply.ticket not in failed
        if fails:
            failed.add(reply.ticket)
            grad = grad * float("nan")
        else:
            committed[reply.ticket] += 1
        replies, pushes = region.receive(answer(reply, grad))
        outstanding.extend(replies)
        sent.extend(pushes)
        for _ in pushes:
            grant()

    for _ in range(1 + ahead):
        grant()
    for action, number in schedule:
        if action == "push" and outstanding:
            push(number % len(outstanding))
        elif action == "join":
            worker = gone.pop() if gone else max(members) + 1
            members.add(worker)
            outstanding.extend(region.join(worker))
        elif action == "leave" and len(members) > 1:
            worker = sorted(members)[number % len(members)]
            members.remove(worker)
            gone.append(worker)
            outstanding[:] = [reply for reply in outstanding if reply.worker != worker]
            outstanding.extend(region.leave(worker))
    while len(sent) < 8:
        push(0)  # never nobody at work, or this fails
    assert set(committed.values()) == {1}
    assert [push.ticket for push in sent] == sorted(push.ticket for push in sent) or ahead
    assert len({push.ticket for push in sent}) == len(sent)
    for made in sent:
        assert all(committed[part] == 1 for part in range(made.ticket * J, made.ticket * J + J))


def test_an_edge_sends_what_came_of_a_ticket_of_which_the_last_push_was_refused() -> None:
    rule = HierMo(region_workers=2, edge_rounds=1, edge_momentum=0.0).region_rule()
    edge = RegionServer(rule, start().repeat(2), 2, 2)
    for number in range(2):
        first, second = edge.grant(ticket(number, start().repeat(2)))
        moved = torch.ones(2 * D, dtype=torch.float64)
        edge.receive(answer(first, moved))
        (again,), _ = edge.receive(answer(second, math.nan * moved))
        assert (again.worker, again.ticket) == (first.worker, second.ticket)
        _, (push,) = edge.receive(answer(again, moved))
        close(push.grad, 2 * moved)  # two rounds, each of one push


def test_what_a_region_sends_sums_to_how_far_its_own_momentum_carried_it() -> None:
    # With tickets ahead it merges in the middle of one: a merge moves th and the point that it measures from alike.
    region, outstanding, moved = new_region(2), list[Reply](), torch.zeros(D, dtype=torch.float64)
    merges = torch.zeros(D, dtype=torch.float64)

    def grant(number: int) -> None:
        nonlocal merges
        at, before = torch.full((D,), number / 10, dtype=torch.float64), region.core.params.clone()
        outstanding.extend(region.grant(ticket(number, at)))
        close(region.core.params - before, 0.4 * (at - before))
        merges = merges + region.core.params - before

    grant(0)
    grant(1)
    for number in range(2, 6):
        while True:
            reply = outstanding.pop(0)
            assert reply.ticket is not None
            replies, pushes = region.receive(answer(reply, normal(D, 0, reply.ticket)))
            outstanding.extend(replies)
            if pushes:
                moved = moved + pushes[0].grad
                break
        close(region.core.params, start() + merges - moved)
        grant(number)


def test_a_region_that_diverges_says_so_for_all_its_tickets() -> None:
    region = new_region(1)
    outstanding = region.grant(ticket(0, start())) + region.grant(ticket(1, start(), worker=1))
    pushes = list[Push]()
    while not region.ended:  # as soon as the first part has come back, and is not finite again
        outstanding, pushes = region.receive(answer(outstanding[0], torch.full((D,), float("nan"), dtype=torch.float64)))
    assert region.ended
    assert [(push.ticket, push.worker) for push in pushes] == [(0, 0), (1, 1)]
    assert all(push.grad.isnan().all() for push in pushes)


def test_a_region_has_a_loss_scale_of_its_own_and_sends_what_is_not_scaled() -> None:
    region = new_region(1, loss_scale=LossScale(initial=8.0))
    (reply,) = region.grant(ticket(0, start()))
    assert reply.loss_scale == 8.0
    overflow = replace(answer(reply, torch.full((D,), math.inf, dtype=torch.float64)), loss_scale=8.0)
    ((reply,), pushes) = region.receive(overflow)
    assert (reply.ticket, reply.loss_scale, pushes) == (1, 4.0, [])  # and ticket 0 again, after those that are new
    done = list[int]()
    while not pushes:
        assert reply.ticket is not None
        done.append(reply.ticket)
        replies, pushes = region.receive(replace(answer(reply, normal(D, 0, reply.ticket)), loss_scale=4.0))
        reply = replies[0] if replies else reply
    assert (sorted(done), pushes[0].loss_scale) == ([0, 1, 2], 1.0)


def test_a_region_reports_losses_samples_and_buffers_of_its_parts() -> None:
    rules = {"r": Rule(RuleKind.average, 0.5, "n"), "n": Rule(RuleKind.count)}
    region = new_region(1, buffer_rules=rules)
    (reply,) = region.grant(ticket(4, start()))
    pushes = list[Push]()
    for number in range(J):
        push = Push(
            worker=0,
            ticket=4 * J + number,
            stamp=reply.stamp,
            grad=torch.zeros(D, dtype=torch.float64),
            loss=float(number),
            samples=2 + number,
            buffers={"b": torch.tensor([float(number)]), "r": torch.tensor([float(number)]), "n": torch.tensor(1)},
        )
        replies, pushes = region.receive(push)
        reply = replies[0] if replies else reply
    (sent,) = pushes
    # The losses 0, 1 and 2 are means over 2, 3 and 4 samples.
    assert (sent.ticket, sent.stamp, sent.loss, sent.samples) == (4, 4, (0 * 2 + 1 * 3 + 2 * 4) / 9, 9)
    assert (sent.buffers["b"].item(), sent.buffers["n"].item()) == (J - 1, J)
    assert sent.buffers["r"].item() == pytest.approx((1 / 4 * 1 + 1 / 2 * 2) / (7 / 8))  # r <- (r + b) / 2 for b = 0, 1, 2
