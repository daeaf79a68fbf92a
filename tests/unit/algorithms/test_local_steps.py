"""Algorithms with local steps, OrLoMo and EASGD: torch.optim, plain loops and real workers."""

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

from ormo_rpc.config.schema import Config
from ormo_rpc.config.training import Train
from ormo_rpc.messages import Reply
from ormo_rpc.models import MLP
from ormo_rpc.options import find
from ormo_rpc.runtimes.job import Job
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.quadratic import BETA, PROBLEM, D, begin, close, torch_sgd
from tests.support.reference import heavy_ball
from tests.support.schedule import Schedule, noise, pushed, schedules


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


def own_problems(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return the matrix and the vector of a linear gradient ``A x - b`` for each worker."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            PROBLEM.matrix + 0.1 * torch.randn(D, D, generator=generator, dtype=torch.float64),
            torch.randn(D, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def prsgdm(x: Tensor, m: Tensor, problems: list[tuple[Tensor, Tensor]], steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """Take a round of PRSGDm: each worker steps from the same ``x`` and ``m``, then both are averaged."""
    ends = list[tuple[Tensor, Tensor]]()
    for matrix, vector in problems:
        x_k, m_k = x, m
        for _ in range(steps):
            m_k = BETA * m_k + lr * (matrix @ x_k - vector)
            x_k = x_k - m_k
        ends.append((x_k, m_k))
    return torch.stack([x for x, _ in ends]).mean(0), torch.stack([m for _, m in ends]).mean(0)


@pytest.mark.parametrize("schedule", [[], [("push", n) for n in (2, 1, 0, 1, 1, 2)]], ids=["in order", "out of order"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("K", "H"), [(3, 4), (1, 3), (5, 1)])
def test_synchronous_orlomo_that_averages_is_prsgdm(K: int, H: int, decay: float, schedule: Schedule) -> None:
    problems, rounds = own_problems(K), 8

    def lr(t: int) -> float:
        return 0.05 / (1 + decay * t)

    run = begin(
        "orlomo",
        num_workers=K,
        tickets=K * rounds,
        scheduler="sync",
        local_steps=H,
        lr=lr,
        combine="mean",
        gradient=lambda reply: of_worker(run.server, problems)(reply),
    )
    x, m = run.server.params.clone(), torch.zeros(D, dtype=torch.float64)
    for number, _ in enumerate(run.steps(schedule), start=1):
        if number % K == 0:
            x, m = prsgdm(x, m, problems, H, lr(number - K))  # the rate when the round's tickets were handed out
            close(run.server.params, x, atol=1e-12)
            close(torch.as_tensor(run.server.algorithm.state_dict()["u"]), m, atol=1e-12)


def of_worker(server: ParameterServer, problems: list[tuple[Tensor, Tensor]]) -> Callable[[Reply], Tensor]:
    """Return the pushes of workers that have a problem each."""

    def push(reply: Reply) -> Tensor:
        matrix, vector = problems[reply.worker]
        return pushed(server.algorithm, lambda x: matrix @ x - vector)(reply)

    return push


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_rounds_after_a_worker_has_left_or_joined_are_prsgdm_of_those_who_are_there(before: int) -> None:
    problems, H = own_problems(5), 3
    run = begin(
        "orlomo",
        num_workers=4,
        tickets=60,
        scheduler="sync",
        local_steps=H,
        lr=0.05,
        combine="mean",
        gradient=lambda reply: of_worker(run.server, problems)(reply),
    )
    run.follow([("push", 0)] * (4 + before))
    for change, present in (("leave", [0, 1, 2]), ("join", [0, 1, 2, 3])):
        run.leave(3) if change == "leave" else run.join(3)
        state = None
        for step in run.steps([("push", 0)] * 30):
            if len(step.replies) < len(present):
                continue
            # A round begins: everybody was answered at once, and no push of the former round is out.
            w, u = run.server.params.clone(), torch.as_tensor(run.server.algorithm.state_dict()["u"]).clone()
            if state is not None:
                x, m = prsgdm(*state, [problems[worker] for worker in present], H, 0.05)
                close(w, x, atol=1e-12)
                close(u, m, atol=1e-12)
                break
            state = w, u
        assert state is not None


def test_a_push_of_orlomo_counts_by_the_workers_when_its_ticket_was_handed_out() -> None:
    # beta = 0 and H = 1: w <- w - 0.1 / K g, all gradients 1. In the steps below K is 4, then 3 for tickets handed out without
    # worker 3, then 4 again.
    run = begin(
        "orlomo",
        num_workers=4,
        tickets=30,
        momentum=0.0,
        local_steps=1,
        combine="mean",
        gradient=lambda _: 0.1 * torch.ones(2 * D, dtype=torch.float64),
    )

    def moved(worker: int) -> float:
        before = run.server.params.clone()
        run.push(next(reply for reply in run.outstanding.values() if reply.worker == worker))
        return float((before - run.server.params)[0])

    weights = [moved(0)]
    run.leave(3)
    weights += [moved(1), moved(1), moved(2)]
    run.join(3)
    weights += [moved(3), moved(1), moved(1)]
    assert weights == pytest.approx([0.1 / K for K in (4, 4, 3, 4, 4, 3, 4)], rel=1e-12)


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
    """Compute a ticket in plain PyTorch."""
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
