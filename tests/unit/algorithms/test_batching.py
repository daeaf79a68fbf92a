"""Algorithms that discard, collect, average or take local steps: against torch.optim, plain loops and closed forms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from ormo_rpc.config.schema import Config, Train
from ormo_rpc.messages import Reply
from ormo_rpc.models import MLP
from ormo_rpc.options import find
from ormo_rpc.runtimes.job import Job
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.reference import heavy_ball
from tests.support.schedule import Quadratic, Run, Schedule, noise, pushed, schedules

D = 5
BETA = 0.9
PROBLEM = Quadratic(D, smallest=0.1)


def close(got: Tensor, expected: Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def decaying(iteration: int) -> float:
    return 0.1 / (1 + iteration)


def begin(
    algorithm: str,
    *,
    num_workers: int,
    tickets: int,
    scheduler: str = "async",
    lr: float | Callable[[int], float] = 0.1,
    momentum: float = BETA,
    record: Callable[[Event], None] = lambda _: None,
    gradient: Callable[[Reply], Tensor] | None = None,
    **options: Any,
) -> Run[ParameterServer]:
    """A started run; unless another gradient is given, a worker computes what it pushes from the quadratic `PROBLEM`."""
    server = build_server(
        algorithm=algorithm,
        scheduler=scheduler,
        params=torch.linspace(-1, 1, D, dtype=torch.float64),
        num_workers=num_workers,
        lr=lr,
        momentum=momentum,
        total_tickets=tickets,
        record=record,
        **options,
    )
    work = pushed(server.algorithm, PROBLEM.gradient_at) if gradient is None else gradient
    return Run(server=server, gradient=work, num_workers=num_workers).start()


def torch_sgd(start: Tensor, steps: int, *, lr: float, nesterov: bool = False) -> list[Tensor]:
    """The parameters of ``torch.optim.SGD`` on the quadratic after 0, 1, ..., steps steps."""
    parameter = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=BETA, nesterov=nesterov)
    path = [start.clone()]
    for _ in range(steps):
        parameter.grad = PROBLEM.gradient_at(parameter.detach())
        optimizer.step()
        path.append(parameter.detach().clone())
    return path


# ------------------------------------------------------------------------------------------------------ accepted or not


@given(schedule=schedules(), batch=st.integers(1, 5), num_workers=st.integers(1, 5))
def test_rennala_accepts_exactly_the_gradients_of_the_present_version(schedule: Schedule, batch: int, num_workers: int) -> None:
    events: list[Event] = []
    run = begin("rennala", num_workers=num_workers, tickets=17, batch=batch, record=events.append)
    handed = dict.fromkeys(run.outstanding, 0)
    version, applied, discarded = 0, 0, list[int]()
    for step in run.steps(schedule):
        assert step.push is not None
        taken_at = handed.pop((step.worker, step.push.ticket))
        fates = [event.kind for event in events if event.kind in (Kind.apply, Kind.discard)]
        accepted = fates[-1] is Kind.apply
        assert accepted == (taken_at == version)
        if accepted:
            applied += 1
            version = applied // batch
        else:
            discarded.append(step.push.ticket)
        handed.update({(reply.worker, reply.ticket): version for reply in step.replies if reply.ticket is not None})
    assert applied == run.server.iteration == 17
    reissued = [event.data["ticket"] for event in events if event.kind is Kind.reissue]
    assert sorted(reissued) == sorted(discarded), "every discarded ticket comes back, once for each time"


def test_a_discarded_gradient_does_not_advance_the_iteration_of_ringmaster() -> None:
    # R = 2, three workers. Worker 0 pushes stamps 0 and 1 with delays 0 and 0, so t = 2, and the first gradients of the others
    # have the delay 2 each: both are discarded, t stays 2, and both get fresh parameters and a discarded ticket again.
    run = begin("ringmaster", num_workers=3, tickets=20, delay_threshold=2)
    for _ in range(2):
        run.push(next(reply for reply in run.outstanding.values() if reply.worker == 0))
    assert run.server.iteration == 2
    params = run.server.params.clone()
    for worker, again in ((1, 1), (2, 2)):
        step = run.push(next(reply for reply in run.outstanding.values() if reply.worker == worker))
        (fresh,) = step.replies
        assert (run.server.iteration, fresh.stamp, fresh.ticket) == (2, 2, again)
        assert torch.equal(fresh.params, params)
    assert torch.equal(run.server.params, params)


@pytest.mark.parametrize("algorithm", ["rennala", "ringmaster"])
@pytest.mark.parametrize("scheduler", ["sync", "partial", "ssp"])
def test_a_barrier_is_refused_with_the_reason(algorithm: str, scheduler: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^scheduler: got '{scheduler}', which {algorithm} does not run under: .*; use async$"
    ):
        begin(algorithm, num_workers=2, tickets=4, scheduler=scheduler)


# ------------------------------------------------------------------------------------------------------------- buffers


@pytest.mark.parametrize(("algorithm", "option"), [("rennala", "batch"), ("fedbuff", "buffer")])
def test_the_rest_of_a_buffer_is_applied_at_the_end(algorithm: str, option: str) -> None:
    # Ten gradients, B = 4: two steps, and a rest of two that weigh 1/4 each like all others.
    options: dict[str, Any] = {option: 4}
    run = begin(algorithm, num_workers=1, tickets=10, gradient=noise(D), **options).finish()
    total = torch.stack([push.grad for push in run.pushes]).sum(0)
    close(run.server.params, torch.linspace(-1, 1, D, dtype=torch.float64) - 0.1 / 4 * total)


@pytest.mark.parametrize("activation", [0.0, 0.1, 0.25])
def test_delayed_nesterov_closes_its_last_round_at_the_end(activation: float) -> None:
    # Six gradients, N = 4, beta = 1/2. Each acts at once, as g / 4. The fourth makes m_1 = (g_1 + ... + g_4) / 4 and brings
    # (1 - 4c + c) beta m_1; the three before it bring c beta m_0 = 0. The fifth and sixth bring c beta m_1 each, and closing
    # their round (1 - 2c) beta m_2 with m_2 = m_1 / 2 + (g_5 + g_6) / 4.
    run = begin(
        "delayed_nesterov",
        num_workers=1,
        tickets=6,
        momentum=0.5,
        gradient=noise(D),
        period=4,
        activation=activation,
    ).finish()
    g = torch.stack([push.grad for push in run.pushes])
    first = g[:4].sum(0) / 4
    second = first / 2 + g[4:].sum(0) / 4
    c = activation
    moved = g.sum(0) / 4 + ((1 - 3 * c) * first + 2 * c * first + (1 - 2 * c) * second) / 2
    close(run.server.params, torch.linspace(-1, 1, D, dtype=torch.float64) - 0.1 * moved)


@pytest.mark.parametrize("algorithm", ["rennala", "fedbuff", "delayed_nesterov"])
@pytest.mark.parametrize("tickets", [8, 10])
def test_a_second_flush_changes_no_bit(algorithm: str, tickets: int) -> None:
    server = begin(algorithm, num_workers=1, tickets=tickets, gradient=noise(D)).finish().server
    before = server.state_dict()
    server.algorithm.flush(0.1)
    after = server.state_dict()
    assert torch.equal(after["params"], before["params"])
    assert all(
        torch.equal(torch.as_tensor(after["algorithm_state"][k]), torch.as_tensor(v))
        for k, v in before["algorithm_state"].items()
    )


def test_delayed_nesterov_of_period_one_is_nesterov_momentum_of_torch() -> None:
    run = begin("delayed_nesterov", num_workers=1, tickets=40, period=1)
    path = torch_sgd(run.server.params, 40, lr=0.1, nesterov=True)
    for number, _ in enumerate(run.steps([]), start=1):
        close(run.server.params, path[number])


# ------------------------------------------------------------------------------------------------- averages and momenta


def test_pnm_without_momentum_is_sgd() -> None:
    run = begin("pnm", num_workers=1, tickets=30, momentum=0.0, beta2=0.0)
    w = run.server.params.clone()
    for _ in run.steps([]):
        w = w - 0.1 * PROBLEM.gradient_at(w)
        close(run.server.params, w)


def test_a_constant_gradient_moves_pnm_by_eta_over_the_norm_of_its_coefficients() -> None:
    # Both momenta tend to g, so the step to eta ((1 + b) - b) g / sqrt((1 + b)^2 + b^2), with b = 1: eta g / sqrt(5).
    run = begin("pnm", num_workers=2, tickets=400, gradient=lambda _: torch.ones(D, dtype=torch.float64))
    for _, _ in zip(range(399), run.steps([]), strict=False):
        pass
    before = run.server.params.clone()
    run.finish()
    close(before - run.server.params, torch.full((D,), 0.1 / 5**0.5, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("lr", [0.1, decaying])
def test_spa_is_y_of_ordered_momentum_where_one_worker_runs(lr: float | Callable[[int], float]) -> None:
    spa, ormo = (begin(name, num_workers=1, tickets=40, lr=lr) for name in ("spa", "ormo"))
    for _ in zip(spa.steps([]), ormo.steps([]), strict=True):
        w, u = ormo.server.params, ormo.server.algorithm.state_dict()["u"]
        z = spa.server.algorithm.state_dict()["z"]
        assert isinstance(z, Tensor)
        close(spa.server.params, w)
        close(z, w - BETA / (1 - BETA) * u)


# --------------------------------------------------------------------------------------------------------- local steps


@given(schedule=schedules(), scheduler=st.sampled_from(["async", "sync"]))
def test_easgd_is_the_plain_loop_and_exchanges_keep_the_sum(schedule: Schedule, scheduler: str) -> None:
    K, H, a, lr = 3, 3, 0.2, 0.1
    run = begin("easgd", num_workers=K, tickets=20, scheduler=scheduler, lr=lr, local_steps=H, elasticity=a)
    centre = run.server.params.clone()
    own = [centre.clone() for _ in range(K)]
    total = (1 + K) * centre
    for step in run.steps(schedule):
        assert step.push is not None
        x = own[step.worker]
        for _ in range(H):
            x = x - lr * PROBLEM.gradient_at(x)
        difference = a * (x - centre)
        centre, own[step.worker] = centre + difference, x - difference
        close(run.server.params, centre)
        for worker, value in enumerate(own):
            kept = run.server.algorithm.state_dict()[f"own/{worker}"]
            assert isinstance(kept, Tensor)
            close(kept, value)
        total = total - step.push.grad
        close(run.server.params + sum(own), total)


def test_a_worker_of_easgd_that_comes_back_starts_at_the_centre() -> None:
    run = begin("easgd", num_workers=2, tickets=30).follow([("push", 0), ("push", 0), ("push", 1)])
    run.leave(1)
    assert "own/1" not in run.server.algorithm.state_dict()
    (reply,) = run.join(1).replies
    assert torch.equal(reply.params, run.server.params)


@given(schedule=schedules(changes=True), scheduler=st.sampled_from(["async", "sync", "partial", "ssp"]))
def test_orlomo_with_one_local_step_is_ordered_momentum(schedule: Schedule, scheduler: str) -> None:
    local = begin("orlomo", num_workers=3, tickets=25, scheduler=scheduler, local_steps=1)
    ordered = begin("ormo", num_workers=3, tickets=25, scheduler=scheduler)
    for _ in zip(local.steps(schedule), ordered.steps(schedule), strict=True):
        got, expected = (run.server.algorithm.state_dict() for run in (local, ordered))
        close(local.server.params, ordered.server.params)
        close(torch.as_tensor(got["u"]), torch.as_tensor(expected["u"]))
        assert got["index"] == expected["index"]


def test_orlomo_with_one_worker_is_momentum_sgd_of_torch() -> None:
    H = 4
    run = begin("orlomo", num_workers=1, tickets=30, local_steps=H, lr=0.05)
    path = torch_sgd(run.server.params, 30 * H, lr=0.05)
    for number, _ in enumerate(run.steps([]), start=1):
        close(run.server.params, path[number * H])


def test_synchronous_orlomo_is_heavy_ball_over_the_sums_of_local_parts() -> None:
    # With its own gradients g_kh of all workers known, a round is H steps of v <- beta v + eta sum_k g_kh; x <- x - v.
    K, H, lr, rounds = 3, 4, 0.05, 6
    run = begin("orlomo", num_workers=K, tickets=K * rounds, scheduler="sync", local_steps=H, lr=lr)
    start = run.server.params.clone()
    w, u, sums = start.clone(), torch.zeros_like(start), list[Tensor]()
    for number, _ in enumerate(run.steps([]), start=1):
        if number % K:
            continue
        in_round = list[Tensor]()
        x, v = w.clone(), u.clone()  # all workers of a quadratic take the same steps
        for _ in range(H):
            gradient = PROBLEM.gradient_at(x)
            v = BETA * v + lr * gradient
            x = x - v
            in_round.append(K * lr * gradient)
        sums += in_round
        w, u = heavy_ball(start, sums, BETA)
        close(run.server.params, w)
        close(torch.as_tensor(run.server.algorithm.state_dict()["u"]), u)


@given(schedule=schedules(), num_workers=st.integers(1, 5))
def test_a_push_of_orlomo_with_none_between_ends_where_its_worker_did(schedule: Schedule, num_workers: int) -> None:
    # The worker's end is x = w - (beta + ... + beta^H) u - p of what it was sent, redone here step by step.
    run = begin("orlomo", num_workers=num_workers, tickets=40, lr=0.05).follow(schedule)
    for _ in range(8):
        newest = max(run.outstanding.values(), key=lambda reply: reply.stamp, default=None)
        if newest is None or newest.stamp != run.server.iteration:
            break
        x, v = newest.params.clone().split(D)
        for _ in range(newest.steps):
            v = BETA * v + 0.05 * PROBLEM.gradient_at(x)
            x = x - v
        run.push(newest)
        close(run.server.params, x)


@given(schedule=schedules(), seed=st.integers(0, 9))
def test_only_the_buckets_of_local_momenta_matter_to_orlomo(schedule: Schedule, seed: int) -> None:
    H, beta = 3, 0.5
    events: list[Event] = []
    work = noise(2 * D, seed)
    run = begin("orlomo", num_workers=3, tickets=20, momentum=beta, local_steps=H, gradient=work, record=events.append)
    for _ in run.steps(schedule):
        pass
    bucket = {event.data["ticket"]: event.data["bucket"] for event in events if event.kind is Kind.apply}
    rounds: dict[int, Tensor] = defaultdict(lambda: torch.zeros(2 * D, dtype=torch.float64))
    for push in run.pushes:
        rounds[bucket[push.ticket]] += push.grad
    w, u = torch.linspace(-1, 1, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    for number in range(int(run.server.algorithm.state_dict()["index"]) + 1):
        m, p = rounds[number].split(D)
        w = w - (beta - beta ** (H + 1)) / (1 - beta) * u - p
        u = beta**H * u + m
    close(run.server.params, w)
    close(torch.as_tensor(run.server.algorithm.state_dict()["u"]), u)


# -------------------------------------------------------------------------------------------------------- real workers

STEPS, BATCH = 4, 359
"""1,437 samples are one ticket of four batches of 359, and a last one of a single sample, hence of one batch."""


def job(algorithm: str, **options: Any) -> Job:
    return Job(
        Config(
            workers=1,
            algorithm=find("algorithm", algorithm)(local_steps=STEPS, **options),
            model=MLP(hidden=8, depth=1, dropout=0.0),
            train=Train(epochs=2, batch_size=BATCH, lr=0.05, momentum=BETA, weight_decay=0.01),
        )
    )


def plain_steps(of: Job, module: nn.Module, optimizer: torch.optim.Optimizer, ticket: int) -> None:
    """The same ticket in plain PyTorch."""
    indices = of.epochs.indices(ticket)
    for part in indices.tensor_split(min(STEPS, len(indices))):
        inputs, targets = of.data.train.batch(part, torch.Generator())
        optimizer.zero_grad()
        functional.cross_entropy(module(inputs), targets).backward()
        optimizer.step()


def flat(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def test_a_real_worker_of_orlomo_is_momentum_sgd_of_torch_over_tickets_of_several_batches() -> None:
    one = job("orlomo")
    assert [len(one.epochs.indices(ticket)) for ticket in range(one.total_tickets)] == [4 * BATCH, 1, 4 * BATCH, 1]
    worker, server, module = one.worker(), one.server(lambda _: None, lambda: 0.0), one.model().module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=BETA, weight_decay=0.01)
    (reply,) = server.start()
    plain_steps(one, module, optimizer, 0)
    (reply,) = server.receive(worker.compute(reply))
    close(server.params, flat(module), atol=2e-6)  # float32, values of order 1
    # The one-batch ticket is the last one of four steps: the momentum drifts for all four, the gradient enters with weight 1.
    w, u = (value.clone() for value in reply.params.chunk(2))
    worker.compute(reply)
    moved = worker.push.chunk(2)
    assert torch.equal(*moved)
    (reply,) = server.receive(worker.compute(reply))
    close(server.params, w - sum(BETA**j for j in range(1, 5)) * u - moved[1], atol=2e-6)
    close(torch.as_tensor(server.algorithm.state_dict()["u"]), BETA**4 * u + moved[0], atol=2e-6)
    while reply.ticket is not None:
        (reply,) = server.receive(worker.compute(reply))
    assert (server.iteration, server.status.value) == (4, "completed")


def test_real_workers_of_easgd_are_the_plain_loop_over_tickets_of_several_batches() -> None:
    one = job("easgd", elasticity=0.3)
    worker, server, module = one.worker(), one.server(lambda _: None, lambda: 0.0), one.model().module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, weight_decay=0.01)
    centre = flat(module)
    (reply,) = server.start()
    for ticket in range(one.total_tickets):
        assert reply.ticket == ticket
        plain_steps(one, module, optimizer, ticket)
        own = flat(module)
        delta = 0.3 * (own - centre)
        centre = centre + delta
        nn.utils.vector_to_parameters(own - delta, module.parameters())
        (reply,) = server.receive(worker.compute(reply))
        close(server.params, centre, atol=2e-6)  # float32, values of order 1
    assert reply.ticket is None
