"""The identities of ordered momentum: against torch.optim, heavy ball over rounds or buckets, and numbers made by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.algorithms._delay_adaptive import DelayRule
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.messages import Reply
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.reference import heavy_ball
from tests.support.schedule import Quadratic, Run, Schedule, Step, answer, noise, schedules

D = 5
BETA = 0.9


@dataclass
class Trial:
    """A run and its events."""

    run: Run[ParameterServer]
    events: list[Event] = field(default_factory=list[Event])

    def of(self, kind: Kind) -> list[Any]:
        """The data of the events of a kind."""
        return [event.data for event in self.events if event.kind is kind]


def begin(
    *,
    num_workers: int,
    tickets: int | None,
    algorithm: str = "ormo",
    scheduler: str = "async",
    momentum: float = BETA,
    lr: float | Callable[[int], float] = 0.1,
    gradient: Callable[[Reply], Tensor] | None = None,
    start: Tensor | None = None,
    **options: Any,
) -> Trial:
    events: list[Event] = []
    server = build_server(
        algorithm=algorithm,
        scheduler=scheduler,
        params=torch.linspace(-1, 1, D, dtype=torch.float64) if start is None else start,
        num_workers=num_workers,
        lr=lr,
        momentum=momentum,
        total_tickets=tickets,
        record=events.append,
        **options,
    )
    run = Run(server=server, gradient=gradient or noise(D), num_workers=num_workers).start()
    return Trial(run, events)


def close(got: Tensor, expected: Tensor) -> None:
    """Equal to rounding: values are of the size of 10, a run has up to a hundred steps: 1e-12 is some hundred roundings."""
    torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-12)


def u_of(server: ParameterServer) -> Tensor:
    u = server.algorithm.state_dict()["u"]
    assert isinstance(u, Tensor)
    return u


def closes_round(step: Step) -> bool:
    """Under sync a round ends with the call that lets the others go."""
    return step.kind in ("push", "leave") and len(step.replies) > 0


def check_rounds(run: Run[ParameterServer], schedule: Schedule, lr: Callable[[int], float]) -> int:
    """Compare w and u with heavy ball on the sums of the rounds, at each round's end; return how many rounds there were."""
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
@given(before=st.integers(0, 12), who=st.integers(0, 3), schedule=schedules(max_size=12))
def test_under_sync_it_stays_heavy_ball_when_one_of_four_is_lost_or_one_joins(
    change: str, before: int, who: int, schedule: Schedule
) -> None:
    # 0 to 12 pushes before it: at the very start, in the middle of a round, between rounds.
    problem = Quadratic(D, smallest=0.1)
    trial = begin(num_workers=4, tickets=33, scheduler="sync", gradient=problem.gradient)
    oldest: Schedule = [("push", 0)] * 12
    pushes = [*schedule, *oldest][:before]
    now: Schedule = [("leave", who)] if change == "leave" else [("join", 0)]
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
def test_one_worker_is_torch_sgd(schedule: Callable[[int], float], options: dict[str, Any], beta: float) -> None:
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
def test_every_gradient_moves_y_by_the_same_whatever_its_delay(scheduler: str, workers: int, schedule: Schedule) -> None:
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
def test_it_is_heavy_ball_over_the_buckets_that_grow_and_shrink(workers: int, schedule: Schedule) -> None:
    trial = begin(num_workers=workers, tickets=30)
    server, start = trial.run.server, trial.run.server.params.clone()
    attach = {0: 0}  # the bucket of each index, dealt out here with K as it is when one opens
    room = bucket = handed = 0
    received: defaultdict[int, Tensor] = defaultdict(lambda: torch.zeros(D, dtype=torch.float64))
    newest_before_push = 0
    for step in trial.run.steps(schedule):
        if step.push is not None:
            received[attach[step.push.stamp]] += 0.1 * step.push.grad
            newest_before_push = handed
            if room == 0:
                bucket, room = bucket + 1, len(trial.run.members)
            room -= 1
            attach[len(attach)] = bucket
            # A gradient that is missing counts as zero; buckets up to the newest that was handed out before the push.
            x, v = heavy_ball(start, [received[b] for b in range(newest_before_push + 1)], BETA)
            close(server.params, x)
            close(u_of(server), v)
            exponent = int(server.algorithm.state_dict()["index"]) - attach[step.push.stamp]  # e = I - b
            assert exponent >= 0
        handed = max([handed, *(attach[reply.stamp] for reply in step.replies if reply.ticket is not None)])
    assert {data["stamp"]: data["bucket"] for data in trial.of(Kind.apply)}.items() <= attach.items()


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


def test_figure_1() -> None:
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


# ------------------------------------------------------------------------------------------------ delay-adaptive learning rates


def context(delay: int, *, concurrency: int = 3, lr: float = 0.5) -> PushContext:
    return PushContext(
        worker=0,
        ticket=0,
        iteration=100,
        stamp=100 - delay,
        bucket=0,
        newest_bucket=0,
        concurrency=concurrency,
        lr=lr,
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # K = 3, so R = 2K = 6; eta = 0.5. At 12: 0.5 * 6 / 12 = 0.25, at 24: 0.125.
        ({}, {0: 0.5, 5: 0.5, 6: 0.5, 7: 0.5 * 6 / 7, 12: 0.25, 24: 0.125}),
        # R = 4: at 5: 0.5 * 4 / 5 = 0.4; at 8: 0.25.
        ({"threshold": 4}, {3: 0.5, 4: 0.5, 5: 0.4, 8: 0.25}),
        # L = 1/32: 1 / (4 L tau) = 8 / tau; at 7: 8/7 > 0.5, so 0.5; at 16: 0.5, at 32: 0.25.
        ({"smoothness": 1 / 32}, {6: 0.5, 7: 0.5, 16: 0.5, 32: 0.25}),
        # L = 1/4: 1 / tau, already smaller than 0.5 past the threshold: at 8: 0.125.
        ({"smoothness": 0.25}, {5: 0.5, 6: 0.5, 8: 0.125}),
        # eta K / max(K, tau), so its threshold is K = 3: at 4: 0.5 * 3 / 4 = 0.375; at 6: 0.25.
        ({"rule": DelayRule.mishchenko}, {2: 0.5, 3: 0.5, 4: 0.375, 6: 0.25}),
        # eta / tau past R = 6, a jump: at 8: 0.0625.
        ({"rule": DelayRule.koloskova}, {5: 0.5, 6: 0.5, 8: 0.0625, 10: 0.05}),
        ({"rule": DelayRule.koloskova, "threshold": 1}, {1: 0.5, 2: 0.25}),
        ({"rule": DelayRule.drop}, {5: 0.5, 6: 0.5}),
    ],
    ids=str,
)
def test_the_learning_rate_follows_the_delay(options: dict[str, Any], expected: dict[int, float]) -> None:
    algorithm = begin(num_workers=3, tickets=None, algorithm="ormo_da", **options).run.server.algorithm
    got = {delay: algorithm.learning_rate(context(delay)) for delay in expected}
    assert got == pytest.approx(expected, rel=1e-15, abs=0)
    assert all(algorithm.accepts(context(delay)) for delay in expected)


def test_drop_takes_nothing_past_the_threshold() -> None:
    algorithm = begin(num_workers=3, tickets=None, algorithm="ormo_da", rule=DelayRule.drop).run.server.algorithm
    assert [algorithm.accepts(context(delay)) for delay in (5, 6, 7, 50)] == [True, True, False, False]


def test_a_dropped_gradients_ticket_comes_back_with_fresh_parameters() -> None:
    # K = 2, threshold 1. Worker 0 pushes twice: t = 2. Worker 1's gradient of stamp 0 then has the delay 2 > 1.
    trial = begin(num_workers=2, tickets=6, algorithm="ormo_da", rule=DelayRule.drop, threshold=1)
    run = trial.run
    late = run.outstanding[1, 1]
    run.follow([("push", 0)])
    run.push(run.outstanding[0, 2])
    before = {"params": run.server.params.clone(), "u": u_of(run.server).clone()}
    (reply,) = run.server.receive(answer(late, torch.ones(D, dtype=torch.float64)))
    assert (reply.worker, reply.ticket, reply.stamp) == (1, 1, 2)
    assert torch.equal(run.server.params, before["params"])
    assert torch.equal(u_of(run.server), before["u"])
    assert torch.equal(reply.params, before["params"])
    assert run.server.iteration == 2
    (discarded,) = trial.of(Kind.discard)
    assert (discarded["ticket"], discarded["delay"], discarded["reason"]) == (1, 2, "refused by the algorithm")


@given(workers=st.integers(2, 5), schedule=schedules())
def test_a_late_gradient_moves_ormo_da_by_its_reduced_rate(workers: int, schedule: Schedule) -> None:
    # y = w - beta / (1 - beta) u moves by eta(tau) / (1 - beta) g, with R = 1: eta(tau) = 0.1 min(1, 1 / tau).
    trial = begin(num_workers=workers, tickets=25, algorithm="ormo_da", threshold=1)
    server = trial.run.server

    def y() -> Tensor:
        return server.params - BETA / (1 - BETA) * u_of(server)

    before = y()
    for t, step in enumerate(trial.run.steps(schedule)):
        assert step.push is not None
        rate = 0.1 * min(1.0, 1 / max(1, t - step.push.stamp))
        close(y(), before - rate / (1 - BETA) * step.push.grad)
        before = y()
