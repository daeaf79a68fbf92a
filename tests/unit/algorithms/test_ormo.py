"""Identities of ordered momentum: torch.optim, heavy ball over rounds or buckets, and numbers worked out by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.messages import Reply
from ormo_rpc.server.events import Kind
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.ormo import BETA, D, begin, close, u_of
from tests.support.reference import heavy_ball
from tests.support.schedule import Quadratic, Run, Schedule, Step, schedules


def closes_round(step: Step) -> bool:
    """Tell if a step ends a round: under sync, one with replies."""
    return step.kind in ("push", "leave") and len(step.replies) > 0


def check_rounds(run: Run[ParameterServer], schedule: Schedule, lr: Callable[[int], float]) -> int:
    """Compare w and u with heavy ball on the sums of the rounds, at each round's end; return the number of rounds."""
    start = run.server.params.clone()
    sums, total, t = list[Tensor](), torch.zeros(D, dtype=torch.float64), 0
    for step in run.steps(schedule):
        if step.push is not None:
            total = total + lr(t) * step.push.grad
            t += 1
        if closes_round(step):
            sums.append(total)
            total = torch.zeros_like(total)
            x, v = heavy_ball(start, sums, BETA)
            close(run.server.params, x)
            close(u_of(run.server), v)
    return len(sums)


# ------------------------------------------------------------------------------------------------------- 1: sync = heavy ball


@given(workers=st.integers(1, 6), tickets=st.integers(1, 30), schedule=schedules(), decay=st.booleans())
def test_under_sync_it_is_heavy_ball_at_each_rounds_end(workers: int, tickets: int, schedule: Schedule, decay: bool) -> None:
    def lr(t: int) -> float:
        return 0.1 / (1 + t) if decay else 0.1

    problem = Quadratic(D, smallest=0.1)
    trial = begin(num_workers=workers, tickets=tickets, scheduler="sync", lr=lr, gradient=problem.gradient)
    # A last round of T mod K gradients counts too: ceil(T / K) rounds.
    assert check_rounds(trial.run, schedule, lr) == -(-tickets // workers)


@pytest.mark.parametrize("change", ["leave", "join"])
@given(before=st.integers(0, 12), leaver=st.integers(0, 3), schedule=schedules(max_size=12))
def test_under_sync_it_stays_heavy_ball_when_a_worker_leaves_or_joins(
    change: str, before: int, leaver: int, schedule: Schedule
) -> None:
    # 0 to 12 pushes before it: at the very start, in the middle of a round, between rounds.
    problem = Quadratic(D, smallest=0.1)
    trial = begin(num_workers=4, tickets=33, scheduler="sync", gradient=problem.gradient)
    oldest: Schedule = [("push", 0)] * 12
    pushes = [*schedule, *oldest][:before]
    now: Schedule = [("leave", leaver)] if change == "leave" else [("join", 0)]
    assert check_rounds(trial.run, [*pushes, *now, *schedule], lambda _: 0.1) >= 33 // 5
    assert len(trial.run.server.members) == (3 if change == "leave" else 5)


# ------------------------------------------------------------------------------------------------- 2: K = 1 = torch.optim.SGD


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (lambda _: 0.1, {}),
        (lambda _: 0.1, {"momentum_correction": True}),
        (lambda t: 0.2 / (1 + t), {"momentum_correction": True}),
        (lambda t: [0.1, 0.1, 0.3, 0.02][t % 4], {"momentum_correction": True}),
    ],
    ids=["constant", "constant-corrected", "decay-corrected", "up-and-down-corrected"],
)
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_with_one_worker_it_is_torch_sgd(schedule: Callable[[int], float], options: dict[str, Any], beta: float) -> None:
    problem = Quadratic(D, smallest=0.05)
    trial = begin(num_workers=1, tickets=40, momentum=beta, lr=schedule, gradient=problem.gradient, **options)
    p = trial.run.server.params.clone()
    sgd = torch.optim.SGD([p], lr=1.0, momentum=beta, dampening=0.0)
    for t, _ in enumerate(trial.run.steps([])):
        sgd.param_groups[0]["lr"] = schedule(t)
        p.grad = problem.matrix @ (p - problem.target)
        sgd.step()
        close(trial.run.server.params, p)
        if beta > 0:  # without momentum torch keeps no buffer
            close(u_of(trial.run.server), schedule(t) * sgd.state[p]["momentum_buffer"])


def test_without_the_correction_u_keeps_the_old_learning_rate() -> None:
    # beta = 1/2, K = 1, g = 1 twice, eta = 1 and then 1/4. Index 1 is bucket 1, so the second push shifts once:
    # paper: u = 1/2 * 1 + 1/4 = 3/4, w = 0 - 1 - 3/4 = -7/4. Corrected: u = 1/2 * 1/4 + 1/4 = 3/8, w = -1 - 3/8 = -11/8.
    for corrected, u, w in [(False, 0.75, -1.75), (True, 0.375, -1.375)]:
        trial = begin(
            num_workers=1,
            tickets=2,
            momentum=0.5,
            lr=lambda t: [1.0, 0.25][t],
            gradient=lambda _: torch.ones(1, dtype=torch.float64),
            start=torch.zeros(1, dtype=torch.float64),
            momentum_correction=corrected,
        )
        trial.run.finish()
        assert (u_of(trial.run.server).item(), trial.run.server.params.item()) == (u, w)


# --------------------------------------------------------------------------------------------------------- 3: the invariant y


@pytest.mark.parametrize("scheduler", ["async", "sync"])
@given(workers=st.integers(1, 5), schedule=schedules(changes=True))
def test_every_gradient_moves_y_alike_for_any_delay(scheduler: str, workers: int, schedule: Schedule) -> None:
    trial = begin(num_workers=workers, tickets=25, scheduler=scheduler)
    server = trial.run.server

    def y() -> Tensor:
        return server.params - BETA / (1 - BETA) * u_of(server)

    before = y()
    for step in trial.run.steps(schedule):
        moved = torch.zeros(D, dtype=torch.float64) if step.push is None else 0.1 / (1 - BETA) * step.push.grad
        close(y(), before - moved)
        before = y()


# --------------------------------------------------------------------------------------------------------- 4: beta = 0 is asgd


@pytest.mark.parametrize("scheduler", ["async", "sync"])
@given(workers=st.integers(1, 5), schedule=schedules(changes=True))
def test_without_momentum_it_is_asgd_to_the_bit(scheduler: str, workers: int, schedule: Schedule) -> None:
    # The gradient depends on the parameters, so one different bit would spread.
    gradient = Quadratic(D, smallest=0.1).gradient
    runs = [
        begin(num_workers=workers, tickets=25, momentum=0.0, algorithm=name, scheduler=scheduler, gradient=gradient).run
        for name in ("ormo", "asgd")
    ]
    for one, other in zip(runs[0].steps(schedule), runs[1].steps(schedule), strict=True):
        assert one.kind == other.kind
        assert torch.equal(runs[0].server.params, runs[1].server.params)


# ------------------------------------------------------------------------------------------ 5: not the order, only the buckets


@given(workers=st.integers(1, 5), tickets=st.integers(1, 25), one=schedules(), other=schedules())
def test_two_orders_of_arrival_give_the_same_state(workers: int, tickets: int, one: Schedule, other: Schedule) -> None:
    # Under async with constant K ticket K - 1 + n goes with index n whoever asks, so a gradient that depends on its ticket
    # alone is in the same bucket in every order; at the end all have arrived.
    servers = [begin(num_workers=workers, tickets=tickets).run.finish(schedule).server for schedule in (one, other)]
    close(servers[0].params, servers[1].params)
    close(u_of(servers[0]), u_of(servers[1]))


def test_the_order_matters_to_naive_momentum() -> None:
    # So the test above can fail: three workers, oldest first against newest first.
    orders: list[Schedule] = [[("push", 0)] * 9, [("push", 2)] * 9]
    params = [begin(num_workers=3, tickets=9, algorithm="naive").run.finish(order).server.params for order in orders]
    assert (params[0] - params[1]).abs().max() > 0.01


@given(workers=st.integers(1, 5), schedule=schedules(changes=True))
def test_it_is_heavy_ball_over_buckets_of_changing_size(workers: int, schedule: Schedule) -> None:
    trial = begin(num_workers=workers, tickets=30)
    server, start = trial.run.server, trial.run.server.params.clone()
    bucket_of = {0: 0}  # the bucket of each index, dealt out here with K as it is when one opens
    room = bucket = handed = 0
    received: defaultdict[int, Tensor] = defaultdict(lambda: torch.zeros(D, dtype=torch.float64))
    newest_before_push = 0
    for step in trial.run.steps(schedule):
        if step.push is not None:
            received[bucket_of[step.push.stamp]] += 0.1 * step.push.grad
            newest_before_push = handed
            if room == 0:
                bucket, room = bucket + 1, len(trial.run.members)
            room -= 1
            bucket_of[len(bucket_of)] = bucket
            # A gradient that is missing counts as zero; buckets up to the newest that was handed out before the push.
            x, v = heavy_ball(start, [received[b] for b in range(newest_before_push + 1)], BETA)
            close(server.params, x)
            close(u_of(server), v)
            exponent = int(server.algorithm.state_dict()["index"]) - bucket_of[step.push.stamp]  # e = I - b
            assert exponent >= 0
        handed = max([handed, *(bucket_of[reply.stamp] for reply in step.replies if reply.ticket is not None)])
    assert {data["stamp"]: data["bucket"] for data in trial.of(Kind.apply)}.items() <= bucket_of.items()


def test_a_bucket_keeps_the_size_that_it_was_opened_with() -> None:
    # K = 2: bucket 0 is index 0, bucket 1 is 1 and 2, bucket 2 is 3 and 4. A third worker joins at index 3, which is in bucket
    # 2 already, so bucket 3 is the first of three: 5, 6, 7. One leaves at index 6: bucket 3 stays, bucket 4 has two: 8 and 9.
    trial = begin(num_workers=2, tickets=None)
    oldest: Schedule = [("push", 0)]
    trial.run.follow([*oldest * 3, ("join", 0), *oldest * 3, ("leave", 0), *oldest * 6])
    buckets = {data["stamp"]: data["bucket"] for kind in (Kind.issue, Kind.reissue) for data in trial.of(kind)}
    assert buckets == {0: 0, 1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 3, 8: 4, 9: 4, 10: 5, 11: 5, 12: 6}


# ------------------------------------------------------------------------------------------------ 6: conservation of the delay


@given(workers=st.integers(1, 6), tickets=st.integers(1, 40), schedule=schedules(max_size=40))
def test_the_delay_is_conserved(workers: int, tickets: int, schedule: Schedule) -> None:
    """Under async, constant K, while every worker holds a ticket: delays so far + ages in flight = (K - 1) T.

    Each push makes the K - 1 others one older; the one that pushed turns its age into a delay and begins anew at age 0.
    """
    trial = begin(num_workers=workers, tickets=tickets)
    delays, checked = 0, 0
    for applied, step in enumerate(trial.run.steps(schedule), start=1):
        assert step.push is not None
        delays += (applied - 1) - step.push.stamp
        if len(trial.run.outstanding) == workers:
            ages = sum(applied - reply.stamp for reply in trial.run.outstanding.values())
            assert delays + ages == (workers - 1) * applied
            checked += 1
    # After push n the tickets 0 to K - 1 + n are out, so all hold one while n <= T - K.
    assert checked == max(0, tickets - workers)
    assert sum(data["delay"] for data in trial.of(Kind.apply)) == delays


# ----------------------------------------------------------------------------------------------------- 7: figure 1 of the paper


def test_figure_1_of_the_paper() -> None:
    # Synchronous, K = 4, ten gradients; g_t is the t-th unit vector and eta = 1, so coordinate t is the weight of g_t.
    # beta = 1/2: bucket 0 is g_0 to g_3, bucket 1 g_4 to g_7, bucket 2 g_8 and g_9, and I = 2. u_10 weighs them beta^2 = 1/4,
    # beta = 1/2, 1; w - w_0 = -(1 + beta + beta^2) = -7/4, -(1 + beta) = -3/2, -1. All are exact in binary.
    def unit(reply: Reply) -> Tensor:
        assert reply.ticket is not None
        return torch.eye(12, dtype=torch.float64)[reply.ticket]

    trial = begin(
        num_workers=4,
        tickets=12,
        scheduler="sync",
        momentum=0.5,
        lr=1.0,
        gradient=unit,
        start=torch.zeros(12, dtype=torch.float64),
    )
    trial.run.follow([("push", 0)] * 10)
    assert u_of(trial.run.server).tolist() == [0.25] * 4 + [0.5] * 4 + [1.0] * 2 + [0.0] * 2
    assert trial.run.server.params.tolist() == [-1.75] * 4 + [-1.5] * 4 + [-1.0] * 2 + [0.0] * 2


# ---------------------------------------------------------------------------------------------------- 9: naive against ordered


def with_one_slow_worker(algorithm: str, problem: Quadratic) -> float:
    """Worker 0 answers every 30th push, the three others take turns; the distance to the minimum, relative to the start's."""
    run = begin(
        num_workers=4,
        tickets=None,
        algorithm=algorithm,
        gradient=problem.gradient,
        start=torch.zeros(10, dtype=torch.float64),
    ).run
    start = problem.distance(run.server.params)
    for n in range(1, 1501):
        worker = 0 if n % 30 == 0 else 1 + n % 3
        run.push(next(reply for reply in run.outstanding.values() if reply.worker == worker))
    return problem.distance(run.server.params) / start


def test_naive_momentum_diverges_where_ordered_momentum_converges() -> None:
    # Condition number 100, largest curvature 1, lr 0.1, beta 0.9, delays 2 to 3 and 29. Measured: naive 1e27, ormo 3e-10,
    # asgd 0.04.
    problem = Quadratic(10, smallest=0.01)
    assert with_one_slow_worker("naive", problem) > 1e20
    assert with_one_slow_worker("ormo", problem) < 1e-8
    assert with_one_slow_worker("asgd", problem) > 0.01
