"""Properties of every algorithm under each of its schedulers; a new algorithm adds a row to ``contract.py``, nothing here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ormo_rpc.messages import Reply
from ormo_rpc.options import find, parts
from ormo_rpc.schedulers import incompatibility
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import Status
from tests.support.contract import ROWS, SCHEDULER_OPTIONS, Case, cases, same, tensors, values
from tests.support.contract_row import SCHEDULERS, Reduction, Row
from tests.support.schedule import Quadratic, Run, Schedule, noise, normal, pushed, schedules

ROUNDING = 1e-14
"""Relative to the sum of all that was added without its sign: about 45 roundings of float64."""

each_row = pytest.mark.parametrize(
    ("row", "scheduler"), [pytest.param(row, s, id=f"{row.name}-{s}") for row in ROWS for s in row.schedulers]
)


def first_and_another(schedulers: Sequence[str], number: int) -> Sequence[str]:
    """The first of some schedulers and another one, in turn: the state is that of the reference under all of them."""
    return [*dict.fromkeys((schedulers[0], schedulers[number % len(schedulers)]))]


def random_schedule(length: int, seed: int = 0) -> Schedule:
    picks = torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [("push", int(pick)) for pick in picks]


def test_every_algorithm_and_scheduler_has_its_row() -> None:
    assert sorted(row.name for row in ROWS) == list(parts("algorithm"))
    assert sorted(SCHEDULERS) == list(parts("scheduler"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_an_algorithm_runs_under_every_scheduler_that_it_does_not_refuse(row: Row) -> None:
    algorithm = find("algorithm", row.name)
    allowed = [name for name, scheduler in parts("scheduler").items() if incompatibility(algorithm, scheduler) is None]
    assert sorted(row.schedulers) == allowed


@each_row
@given(case=cases())
def test_the_state_equals_the_slow_reference_after_every_push(row: Row, scheduler: str, case: Case) -> None:
    reference = case.reference(row)
    run = case.run(row.name, scheduler, case.options(row))
    for step in run.steps(case.schedule):
        if step.kind != "push":
            continue
        got, expected = values(run.server), reference.state(run.history)
        assert expected.keys() >= {name for name, value in got.items() if isinstance(value, Tensor)}
        tolerance = ROUNDING * reference.scale(run.history)
        for name, value in expected.items():
            difference = (torch.as_tensor(got[name]) - torch.as_tensor(value)).abs().max().item()
            assert difference <= tolerance, f"{name} after push {len(run.pushes)}"


@each_row
@given(case=cases())
def test_each_ticket_is_committed_once_and_nothing_that_was_handed_out_is_written_to(
    row: Row, scheduler: str, case: Case
) -> None:
    events: list[Event] = []
    run = case.run(row.name, scheduler, case.options(row), record=events).finish(case.schedule)
    server = run.server
    applied = [event.data["ticket"] for event in events if event.kind is Kind.apply]
    assert sorted(applied) == list(range(case.tickets))
    assert [event.data["iteration"] for event in events if event.kind is Kind.apply] == list(range(case.tickets))
    assert run.stopped == run.members == set(server.members)
    assert (server.status, server.iteration, server.assignments.outstanding) == (Status.completed, case.tickets, {})

    for push in run.pushes:
        assert torch.equal(push.grad, normal(push.grad.numel(), case.seed, push.ticket))
    for params, at_issue in run.issued:
        assert torch.equal(params, at_issue)
    live = {tensor.untyped_storage().data_ptr() for tensor in tensors(server.algorithm)}
    stamps: dict[int, int] = {}
    if server.algorithm.OUT_OF_PLACE:  # the parameters themselves are handed out, and belong to the present stamp
        memory = server.params.untyped_storage().data_ptr()
        live.remove(memory)
        stamps[memory] = server.iteration
    for reply in (reply for step in run.history for reply in step.replies):
        memory = reply.params.untyped_storage().data_ptr()
        assert memory not in live
        assert stamps.setdefault(memory, reply.stamp) == reply.stamp, "replies share the memory of their own stamp only"


@each_row
@settings(max_examples=max(1, settings().max_examples // 2))
@given(case=cases(), rest=schedules(changes=True))
def test_a_saved_state_continues_identically_in_a_fresh_server(row: Row, scheduler: str, case: Case, rest: Schedule) -> None:
    original = case.run(row.name, scheduler, case.options(row)).follow(case.schedule)
    server = original.server
    saved = server.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same(loaded, saved)

    fresh = case.server(row.name, scheduler, case.options(row))
    fresh.load_state_dict(loaded)
    assert same(fresh.state_dict(), saved)
    copied = original.fork(fresh)
    done = len(original.history)
    if server.algorithm.READS_SENT:  # what was sent is no part of a saved state
        original.restart()
        copied.restart()
    original.finish(rest)
    copied.finish(rest)
    assert same(
        [describe(step.replies) for step in copied.history[done:]], [describe(s.replies) for s in original.history[done:]]
    )
    assert same(fresh.state_dict(), server.state_dict())
    assert same(saved, loaded), "continuing has changed the saved state"


@each_row
@settings(max_examples=max(1, settings().max_examples // 3))  # what is not repeatable is seen in any run
@given(case=cases())
def test_two_identical_runs_are_identical_to_the_bit(row: Row, scheduler: str, case: Case) -> None:
    runs = [case.run(row.name, scheduler, case.options(row)).finish(case.schedule) for _ in range(2)]
    first, second = ([describe(step.replies) for step in run.history] for run in runs)
    assert same(first, second)
    assert same(*(values(run.server) for run in runs))


@each_row
def test_memory_is_as_stated_and_does_not_grow(row: Row, scheduler: str) -> None:
    dimension, workers = 1000, 3
    for options in row.variants if scheduler == row.schedulers[0] else row.variants[:1]:
        server = build_server(
            algorithm=row.name,
            scheduler=scheduler,
            params=torch.zeros(dimension, dtype=torch.float64),
            num_workers=workers,
            lr=0.01,
            total_tickets=120,
            **SCHEDULER_OPTIONS.get(scheduler, {}),
            **options,
        )
        gradient = noise(dimension * server.algorithm.VECTORS_PUSHED)
        run = Run(server=server, gradient=gradient, num_workers=workers).start()
        run.finish(random_schedule(60))
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(server.algorithm)}
        # 8 bytes per float64; scalars kept as tensors would be less than one vector together.
        assert sum(held.values()) // (8 * dimension) == row.vectors(workers) + row.more_vectors(options)
        # Beside the algorithm: the parameters of the newest reply to each worker, and those being handed out, which are the
        # algorithm's own where it works out of place.
        others = {tensor.untyped_storage().data_ptr() for tensor in tensors(server)} - held.keys()
        assert len(others) <= workers + (not server.algorithm.OUT_OF_PLACE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "scheduler"),
    [
        pytest.param(row, s, id=f"{row.name}-{s}")
        for number, row in enumerate(ROWS)
        for s in first_and_another(row.schedulers, number)
    ],
)
def test_it_converges_on_a_quadratic(row: Row, scheduler: str) -> None:
    # Curvatures from 0.2 to 1, beta = 0.9. asgd, lr 0.1: a gradient shrinks the slowest direction by 0.1 * 0.2, so 1600 of them
    # by exp(-32) = 1e-14. Heavy ball under sync, lr 0.01: 400 rounds, each by sqrt(beta), as the motion is underdamped,
    # 4 * 0.01 * 0.2 > (1 - sqrt(beta))^2 = 0.003: 0.9^200 = 7e-10. What asynchrony changes is left to the bound.
    problem = Quadratic(6, smallest=0.2)
    server = build_server(
        algorithm=row.name,
        scheduler=scheduler,
        params=torch.zeros(6, dtype=torch.float64),
        num_workers=4,
        lr=row.lr,
        momentum=0.9,
        total_tickets=1600,
        **SCHEDULER_OPTIONS.get(scheduler, {}),
    )
    start = problem.distance(server.params)
    gradient = pushed(server.algorithm, problem.gradient_at)
    Run(server=server, gradient=gradient, num_workers=4).start().finish(random_schedule(1600))
    assert problem.distance(server.params) < row.remaining * start


@pytest.mark.parametrize(
    ("row", "reduction", "scheduler"),
    [
        pytest.param(row, reduction, s, id=f"{row.name}-{number}-{reduction.to}-{s}")
        for row in ROWS
        for number, reduction in enumerate(row.reductions)
        for s in first_and_another(reduction.schedulers, number + 1)
    ],
)
@given(case=cases())
def test_it_reduces_to_another_algorithm(row: Row, reduction: Reduction, scheduler: str, case: Case) -> None:
    if reduction.momentum is not None:
        case = replace(case, momentum=reduction.momentum)
    if reduction.num_workers is not None:
        pushes = [(action, number) for action, number in case.schedule if action == "push"]
        case = replace(case, num_workers=reduction.num_workers, schedule=pushes)
    run = case.run(row.name, scheduler, reduction.options or {}).finish(case.schedule)
    other = case.run(reduction.to, scheduler, {}).finish(case.schedule)
    for (params, _), (expected, _) in zip(run.issued, other.issued, strict=True):
        if reduction.exact:
            assert torch.equal(params, expected)
        else:
            torch.testing.assert_close(params, expected, rtol=0, atol=ROUNDING * case.reference(row).scale(run.history))


def describe(replies: tuple[Reply, ...]) -> list[dict[str, Any]]:
    """The content of replies."""
    return [{name: getattr(reply, name) for name in Reply.__dataclass_fields__} for reply in replies]
