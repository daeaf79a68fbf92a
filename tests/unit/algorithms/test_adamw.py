"""AdamW and ordered AdamW: torch.optim.AdamW, synchronous AdamW over rounds or buckets, and numbers worked out by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from ormo_rpc.algorithms.groups import Group, Groups, uniform
from ormo_rpc.algorithms.ormo_adamw import OrMoAdamW
from ormo_rpc.kernels.compiled import fastest_kernel
from ormo_rpc.kernels.steps import CHUNK
from ormo_rpc.messages import Reply
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.schedule import Quadratic, Run, Schedule, normal, schedules

D = 10
PROBLEM = Quadratic(D, smallest=0.05)
GROUPS = (
    Group(start=0, stop=3, weight_decay=0.1, lr_factor=0.3),
    Group(start=3, stop=4, weight_decay=0.0, lr_factor=1.0),
    Group(start=4, stop=8, weight_decay=0.2, lr_factor=7.0),
    Group(start=8, stop=10, weight_decay=0.2, lr_factor=0.0),
)
DTYPES = (torch.float32, torch.float64)


def rate(iteration: int) -> float:
    return (0.1, 0.1, 0.03, 0.0, 0.07)[iteration % 5]


def gradient_at(params: Tensor, ticket: int) -> Tensor:
    """A gradient that depends on every bit of the parameters, and on the ticket."""
    return (PROBLEM.gradient_at(params.double()) + normal(D, 0, ticket)).to(params.dtype)


def by_reply(reply: Reply) -> Tensor:
    return gradient_at(reply.params, reply.ticket or 0)


class Torch:
    """`torch.optim.AdamW` on ranges of a vector."""

    def __init__(self, start: Tensor, groups: Groups = (), **options: Any) -> None:
        self.groups = groups or uniform(len(start))
        made = [
            {"params": [nn.Parameter(group.of(start).clone())], "weight_decay": group.weight_decay} for group in self.groups
        ]
        self.optimizer = torch.optim.AdamW(made, **options)

    def step(self, grad: Tensor, lr: float) -> None:
        """Take a step at a learning rate."""
        for group, theirs in zip(self.groups, self.optimizer.param_groups, strict=True):
            theirs["lr"] = lr * group.lr_factor
            theirs["params"][0].grad = group.of(grad).clone()
        self.optimizer.step()

    def state(self, name: str) -> Tensor:
        """``exp_avg`` or ``exp_avg_sq``."""
        found = [self.optimizer.state[group["params"][0]][name] for group in self.optimizer.param_groups]
        return torch.cat(found)

    @property
    def params(self) -> Tensor:
        """The parameters."""
        return torch.cat([group["params"][0].detach() for group in self.optimizer.param_groups])


def begin(
    algorithm: str = "ormo_adamw",
    *,
    num_workers: int,
    tickets: int,
    dtype: torch.dtype = torch.float64,
    scheduler: str = "async",
    momentum: float = 0.9,
    gradient: Callable[[Reply], Tensor] = by_reply,
    lr: Callable[[int], float] = rate,
    **options: Any,
) -> tuple[Run[ParameterServer], list[Event]]:
    events: list[Event] = []
    server = build_server(
        algorithm=algorithm,
        scheduler=scheduler,
        params=normal(D, 1, 0).to(dtype),
        num_workers=num_workers,
        lr=lr,
        momentum=momentum,
        total_tickets=tickets,
        record=events.append,
        **options,
    )
    return Run(server=server, gradient=gradient, num_workers=num_workers).start(), events


# --------------------------------------------------------------------------------------------- K = 1 = torch.optim.AdamW


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [(), uniform(D, 0.1), GROUPS], ids=["no decay", "decay", "groups"])
@pytest.mark.parametrize(("momentum", "beta2"), [(0.9, 0.999), (0.0, 0.99), (0.6, 0.0)])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("adamw", {}), ("adamw_da", {}), ("ormo_adamw", {}), ("ormo_adamw", {"window": 0}), ("ormo_adamw", {"window": 3})],
)
def test_one_worker_is_torch_adamw_to_the_bit(
    algorithm: str, options: dict[str, Any], momentum: float, beta2: float, groups: Groups, dtype: torch.dtype
) -> None:
    options = {**options, "beta2": beta2, "groups": groups or None}
    run, _ = begin(algorithm, num_workers=1, tickets=40, dtype=dtype, momentum=momentum, **options)
    adamw = Torch(run.server.params, groups, betas=(momentum, beta2), weight_decay=0.0)
    for step in run.steps([]):
        assert step.push is not None
        adamw.step(gradient_at(adamw.params, step.push.ticket), rate(step.push.ticket))
        assert torch.equal(run.server.params, adamw.params)


# ---------------------------------------------------------------------------------------------- sync = AdamW on the mean


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    workers=st.integers(1, 6),
    tickets=st.integers(1, 30),
    schedule=schedules(),
    window=st.integers(0, 3),
    grouped=st.booleans(),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_under_sync_it_is_synchronous_adamw_on_the_mean_to_the_bit(
    dtype: torch.dtype, workers: int, tickets: int, schedule: Schedule, window: int, grouped: bool, momentum: float
) -> None:
    groups = GROUPS if grouped else uniform(D)
    run, _ = begin(
        num_workers=workers,
        tickets=tickets,
        scheduler="sync",
        dtype=dtype,
        momentum=momentum,
        window=window,
        groups=groups,
    )
    ends = check_rounds(run, schedule, groups, momentum, workers=lambda: workers)
    assert len(ends) == -(-tickets // workers)  # a last round of fewer counts too


def check_rounds(
    run: Run[ParameterServer], schedule: Schedule, groups: Groups, momentum: float, workers: Callable[[], int]
) -> list[tuple[Tensor, ...]]:
    """Compare each round's end with AdamW on the sum of its gradients, in order of arrival, divided by K at its first one.

    What is kept of the rounds before the window is that of AdamW so many rounds ago. Returns ``w, m, v`` of each round.
    """
    server, algorithm = run.server, run.server.algorithm
    assert isinstance(algorithm, OrMoAdamW)
    adamw = Torch(server.params, groups, betas=(momentum, 0.999), weight_decay=0.0)
    total, size, began, applied = torch.zeros_like(server.params), 0, 0, 0
    ends: list[tuple[Tensor, ...]] = []
    for step in run.steps(schedule):
        if step.push is not None:
            size = size or workers()
            total += step.push.grad
            applied += 1
        if step.kind in ("push", "leave") and step.replies and applied > began:
            adamw.step(total / size, rate(began))
            total, size, began = torch.zeros_like(total), 0, applied
            ends.append((adamw.params, adamw.state("exp_avg").clone(), adamw.state("exp_avg_sq").clone()))
            assert torch.equal(server.params, adamw.params)
            if len(ends) > algorithm.window + 1:
                before = ends[-algorithm.window - 2]
                assert all(map(torch.equal, (algorithm.base, algorithm.m, algorithm.v), before))
    return ends


@pytest.mark.parametrize("change", ["leave", "join"])
@given(before=st.integers(0, 12), number=st.integers(0, 3), schedule=schedules(max_size=12))
def test_under_sync_it_stays_so_when_a_worker_leaves_or_joins(
    change: str, before: int, number: int, schedule: Schedule
) -> None:
    run, _ = begin(num_workers=4, tickets=33, scheduler="sync")
    oldest: Schedule = [("push", 0)] * 12
    now: Schedule = [("leave", number)] if change == "leave" else [("join", 0)]
    # A round that begins with K workers is divided by K, whoever leaves before its end.
    everything = [*[*schedule, *oldest][:before], *now, *schedule]
    assert len(check_rounds(run, everything, uniform(D), 0.9, workers=lambda: len(run.members))) >= 33 // 5


# --------------------------------------------------------------------------------------- not the order, only the buckets


def replay(start: Tensor, pushes: Sequence[tuple[int, Tensor]], sizes: Sequence[int], rates: Sequence[float]) -> Tensor:
    """AdamW over buckets: a step for each, on the sum of its gradients divided by its size."""
    sums: defaultdict[int, Tensor] = defaultdict(lambda: torch.zeros(D, dtype=torch.float64))
    for bucket, grad in pushes:
        sums[bucket] += grad
    adamw = Torch(start, betas=(0.9, 0.999), weight_decay=0.0)
    for bucket, (size, lr) in enumerate(zip(sizes, rates, strict=True)):
        adamw.step(sums[bucket] / size, lr)
    return adamw.params


@given(workers=st.integers(1, 5), schedule=schedules(changes=True))
def test_with_a_long_window_it_is_adamw_over_the_buckets_for_any_schedule(workers: int, schedule: Schedule) -> None:
    run, events = begin(num_workers=workers, tickets=30, window=40)
    server, start = run.server, run.server.params.clone()
    pushes: list[tuple[int, Tensor]] = []
    sizes: list[int] = []
    rates: list[float] = []
    for step in run.steps(schedule):
        if step.push is None:
            continue
        issued = {e.data["stamp"]: e.data["bucket"] for e in events if e.kind in (Kind.issue, Kind.reissue)}
        handed = [reply.stamp for earlier in run.history[:-1] for reply in earlier.replies if reply.ticket is not None]
        pushes.append((issued[step.push.stamp], step.push.grad))
        while len(sizes) <= issued[max(handed)]:
            sizes.append(len(run.members))
            rates.append(rate(len(pushes) - 1))
        # Rounding of the sums, and of steps that are up to 32 rates long.
        torch.testing.assert_close(server.params, replay(start, pushes, sizes, rates), rtol=0, atol=1e-11)


def by_ticket(reply: Reply) -> Tensor:
    return normal(D, 0, reply.ticket or 0)


@given(workers=st.integers(1, 5), tickets=st.integers(1, 25), one=schedules(), other=schedules())
def test_two_orders_of_arrival_give_the_same_state(workers: int, tickets: int, one: Schedule, other: Schedule) -> None:
    # As in test_ormo.py: under async with constant K a ticket has the same bucket in every order.
    params = [
        begin(num_workers=workers, tickets=tickets, gradient=by_ticket, window=25)[0].finish(schedule).server.params
        for schedule in (one, other)
    ]
    torch.testing.assert_close(params[0], params[1], rtol=0, atol=1e-11)


nearly_in_order = st.lists(st.tuples(st.just("push"), st.integers(0, 1)), max_size=25)


@given(workers=st.integers(2, 5), one=nearly_in_order, other=nearly_in_order)
def test_within_the_default_window_the_order_does_not_matter_either(workers: int, one: Schedule, other: Schedule) -> None:
    ends: list[Tensor] = []
    for schedule in (one, other):
        run, events = begin(num_workers=workers, tickets=25, gradient=by_ticket)
        run.finish(schedule)
        assume(latest(events, workers) <= 1)
        ends.append(run.server.params)
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-11)


def latest(events: Sequence[Event], workers: int) -> int:
    """The largest number of buckets that a gradient was late: bucket of the newest index handed out - its own."""
    applied = [(e.data["iteration"], e.data["stamp"]) for e in events if e.kind is Kind.apply]
    # Under async index t is handed out right after gradient t - 1.
    return max(-(-iteration // workers) - -(-stamp // workers) for iteration, stamp in applied)


def test_the_order_matters_to_adamw_in_order_of_arrival() -> None:
    # So the tests above can fail.
    orders: list[Schedule] = [[("push", 0)] * 9, [("push", 2)] * 9]
    params = [begin("adamw", num_workers=3, tickets=9, gradient=by_ticket)[0].finish(order).server.params for order in orders]
    assert (params[0] - params[1]).abs().max() > 0.01


def test_workers_that_are_alike_are_at_most_a_bucket_late() -> None:
    for workers in (2, 4, 16):
        run, events = begin(num_workers=workers, tickets=100, gradient=by_ticket)
        run.finish()
        assert latest(events, workers) == 1


# --------------------------------------------------------------------------------------------------------------- by hand


def test_a_late_gradient_changes_the_mean_of_its_own_bucket() -> None:
    # beta1 = beta2 = 0, no decay: a bucket's step is eta times the sign of its mean, but for eps. K = 2, eta = 1, from 0.
    # Ticket 0, g = 1, bucket 0: w = -1. Its worker gets index 1, of bucket 1, with ticket 2.
    # Ticket 2, g = 1: bucket 1 opens, w = -1 - 1 = -2. It gets index 2, of bucket 1 as well, with ticket 3.
    # Ticket 1, g = -3, late by a bucket: the mean of bucket 0 is -1, w = 1 - 1 = 0.
    # Ticket 3, g = -3: bucket 2 was opened by the index 3 that the late worker got, so it is late too: the mean of bucket 1 is
    # -1, w = 1 + 1 + 0 = 2; the step of bucket 2 is 0 / (0 + eps).
    grads = {0: 1.0, 1: -3.0, 2: 1.0, 3: -3.0}
    server = build_server(
        algorithm="ormo_adamw", params=torch.zeros(1, dtype=torch.float64), num_workers=2, lr=1.0, momentum=0.0, beta2=0.0
    )

    def gradient(reply: Reply) -> Tensor:
        return torch.tensor([grads[reply.ticket or 0]], dtype=torch.float64)

    run = Run(server=server, gradient=gradient, num_workers=2).start()
    found: list[float] = []
    for ticket in (0, 2, 1, 3):
        run.push(next(reply for (_, number), reply in run.outstanding.items() if number == ticket))
        found.append(server.params.item())
    assert found == pytest.approx([-1.0, -2.0, 0.0, 2.0], abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- long vectors


@pytest.mark.parametrize("algorithm", ["adamw", "ormo_adamw"])
@pytest.mark.parametrize("pushed", [None, torch.bfloat16], ids=["as it is", "bfloat16"])
def test_long_vectors_and_rounded_messages_change_no_bit(algorithm: str, pushed: torch.dtype | None) -> None:
    length = 17 * CHUNK + 5
    groups = (Group(start=0, stop=CHUNK + 3, weight_decay=0.1), Group(start=CHUNK + 3, stop=length, lr_factor=0.5))
    servers = [
        build_server(
            algorithm=algorithm,
            params=torch.linspace(-1, 1, length),
            num_workers=2,
            lr=rate,
            groups=groups,
            kernel=kernel,
            sent_dtype=torch.bfloat16,
            pushed_dtype=pushed,
        )
        for kernel in (None, fastest_kernel(length))
    ]

    def gradient(reply: Reply) -> Tensor:
        return torch.linspace(-1, 2, length).roll(1000 * (reply.ticket or 0)).to(pushed or torch.float32)

    runs = [Run(server=server, gradient=gradient, num_workers=2).start() for server in servers]
    for turn in range(7):
        steps = [run.push(list(run.outstanding.values())[turn % 2]) for run in runs]
        assert torch.equal(servers[0].params, servers[1].params)
        for run, step in zip(runs, steps, strict=True):
            assert torch.equal(step.replies[0].params, run.server.params.to(torch.bfloat16))
