"""Pools of memory, alone and in a server: what is lent is not reused too early, and few vectors are made."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor

from ormo_rpc import Push, build_server
from ormo_rpc.kernels.compiled import compiled_steps, fastest_kernel
from ormo_rpc.kernels.kernel import Kernel
from ormo_rpc.kernels.pool import WORTH_POOLING, Pool
from ormo_rpc.kernels.steps import TorchSteps


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [3, 1_000_000])
def test_pooled_memory_is_reused_only_after_its_last_reference(dimension: int) -> None:
    pool = Pool(dimension, torch.float32)
    first = pool.take()
    address = first.data_ptr()
    assert address % 64 == 0
    view = first.detach()[1:]  # shares the memory, and knows nothing of the tensor that it was made from
    array = first.numpy()
    del first
    gc.collect()
    assert pool.take().data_ptr() != address
    del view
    gc.collect()
    assert pool.take().data_ptr() != address
    del array
    gc.collect()
    held = [pool.take() for _ in range(2)]
    assert address in [vector.data_ptr() for vector in held]
    assert len(pool.made) == 2
    assert pool.lent == 2


def test_pooled_memory_freed_in_other_threads_is_reused_once() -> None:
    pool = Pool(64, torch.float64)
    torn: list[str] = []

    def use(number: int) -> None:
        for turn in range(300):
            vector = pool.take()
            vector.fill_(number + turn / 1000)
            if not bool((vector == number + turn / 1000).all()):
                torn.append(f"{number}: {turn}")

    workers = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=30)
        assert not worker.is_alive()
    gc.collect()
    assert torn == []
    assert pool.lent == 0
    assert len(pool.made) <= 8, "two for each thread, at most: the one that it fills and the one that it lets go"


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ormo", "ormo_da", "asgd", "naive", "shifted", "fedbuff"])
def test_a_server_gives_the_same_bits_with_any_kernel_in_few_vectors(algorithm: str) -> None:
    dimension = WORTH_POOLING // 4 + 3  # long enough for a pool; float32
    pools: list[Pool] = []

    def empty(like: Tensor) -> Tensor:
        if not pools:
            pools.append(Pool(like.numel(), like.dtype))
        return pools[0].take()

    steps = compiled_steps() or TorchSteps()
    kernels = [Kernel(), fastest_kernel(dimension), Kernel(name="mine", steps=steps, empty=empty)]
    servers = [
        build_server(
            algorithm=algorithm, params=torch.ones(dimension), num_workers=3, lr=lambda t: 0.1 / (t + 1), kernel=kernel
        )
        for kernel in kernels
    ]
    generator, order = torch.Generator().manual_seed(0), [0, 1, 1, 2, 0, 1, 1, 1, 1, 0, 2]
    held = [{reply.worker: reply for reply in server.start()} for server in servers]
    before: list[tuple[Tensor, Tensor]] = []
    for number, worker in enumerate(order):
        if number == 6:  # a loaded state goes on alike, and what was handed out before stays
            before = [(reply.params, reply.params.clone()) for replies in held for reply in replies.values()]
            for server, replies in zip(servers, held, strict=True):
                server.load_state_dict(server.state_dict(replies=True))
                assert server.params.data_ptr() not in [reply.params.data_ptr() for reply in replies.values()]
        grad = torch.randn(dimension, generator=generator)
        for server, replies in zip(servers, held, strict=True):
            reply = replies.pop(worker)
            assert reply.ticket is not None
            push = Push(worker=worker, ticket=reply.ticket, stamp=reply.stamp, grad=grad)
            del reply
            replies |= {reply.worker: reply for reply in server.receive(push)}
        for server, replies in zip(servers, held, strict=True):
            assert torch.equal(server.params, servers[0].params)
            assert torch.equal(replies[worker].params, server.params)
            if server.algorithm.OUT_OF_PLACE:
                assert replies[worker].params.data_ptr() == server.params.data_ptr(), "the parameters are the snapshot"
        if number == 6:
            assert all(torch.equal(params, copy) for params, copy in before)
            before.clear()
    gc.collect()
    # The replies of 3 workers, the step's own new vector, and two more while a state is loaded and held by this test.
    assert len(pools[0].made) <= 6
    assert pools[0].lent <= 4


@pytest.mark.parametrize("sent_dtype", [None, torch.bfloat16])
def test_after_reserve_no_step_allocates(sent_dtype: torch.dtype | None) -> None:
    dimension, num_workers = WORTH_POOLING, 4
    pools: dict[torch.dtype, Pool] = {}

    def empty(like: Tensor) -> Tensor:
        return pools.setdefault(like.dtype, Pool(like.numel(), like.dtype)).take()

    server = build_server(
        params=torch.ones(dimension), num_workers=num_workers, kernel=Kernel(empty=empty), sent_dtype=sent_dtype
    )
    server.snapshots.reserve(num_workers)
    made = {dtype: len(pool.made) for dtype, pool in pools.items()}
    assert sum(made.values()) == num_workers + (1 if sent_dtype is None else 3)
    held = {reply.worker: reply for reply in server.start()}
    for worker in (0, 1, 2, 3, 3, 2, 1, 0, 1, 1):
        reply = held.pop(worker)
        assert reply.ticket is not None
        push = Push(worker=worker, ticket=reply.ticket, stamp=reply.stamp, grad=torch.ones(dimension))
        del reply
        held |= {reply.worker: reply for reply in server.receive(push)}
    assert {dtype: len(pool.made) for dtype, pool in pools.items()} == made
