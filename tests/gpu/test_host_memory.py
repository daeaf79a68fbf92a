"""Memory of the CPU that a server on a GPU reads pushes from, and copies replies and states to."""

from __future__ import annotations

import functools
import threading

import pytest
import torch

from ormo_rpc.kernels.compiled import fastest_kernel
from ormo_rpc.kernels.host_copies import PART, on_host
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.distributed.server_process.gpu_memory import GpuSide
from ormo_rpc.server.build import build_server


def test_large_tensors_are_copied_to_the_host_part_by_part(gpu: torch.device) -> None:
    values = torch.arange(2 * PART // 4 + 1_234, dtype=torch.float32)
    there = values.to(gpu)
    later = there.clone()
    copied = on_host({"a": there, "b": [there, there[:0], later.add_(1)], "d": values})
    first, empty, changed = copied["b"]
    assert torch.equal(first, values)
    assert copied["a"] is first
    assert empty.numel() == 0
    assert torch.equal(changed, values + 1)
    assert copied["d"] is values


def test_replies_of_one_stamp_share_a_copy_in_page_locked_memory(gpu: torch.device) -> None:
    dimension = 100_000
    side = GpuSide(gpu)
    params = torch.randn(dimension, device=gpu)
    side.reserve(params, 3)
    buffers = torch.arange(64, device=gpu).to(torch.uint8)
    first, second = (
        Reply(worker=worker, ticket=worker, stamp=3, params=params, lr=0.1, steps=1, incarnation=0, buffers=buffers)
        for worker in (0, 1)
    )
    copies = [side.on_host(each) for each in (first, second)]
    assert copies[0].params is copies[1].params
    assert copies[0].buffers is copies[1].buffers
    assert copies[0].params.is_pinned()
    assert torch.equal(copies[0].params, params.cpu())
    assert torch.equal(copies[1].buffers, buffers.cpu())
    other = side.on_host(Reply(worker=0, ticket=5, stamp=4, params=params + 1, lr=0.1, steps=1, incarnation=0, buffers=buffers))
    assert other.buffers is copies[0].buffers
    assert torch.equal(other.params, params.cpu() + 1)
    assert torch.equal(copies[0].params, params.cpu())


@pytest.mark.parametrize("workers", [4, 40])
def test_pushes_of_several_threads_are_applied_as_on_the_cpu(gpu: torch.device, workers: int) -> None:
    """Each in a stream of its thread's, of which there are 32: 40 threads use some of them, and their memory, together."""
    side = GpuSide(gpu)
    dimension, rounds = 300_000, 120 // workers
    server = build_server(
        algorithm="asgd",
        params=torch.zeros(dimension, device=gpu),
        num_workers=workers,
        lr=1.0,
        kernel=fastest_kernel(dimension, gpu),
    )
    replies = {reply.worker: reply for reply in server.start()}
    lock = threading.Lock()
    wrong: list[str] = []

    def work(worker: int) -> None:
        reply = replies[worker]
        payload = torch.empty(dimension).pin_memory()
        for number in range(rounds):
            payload.fill_(-float(worker + 1))  # a power of two apart would be exact; so are sums of small integers
            assert reply.ticket is not None
            push = Push(worker=worker, ticket=reply.ticket, stamp=reply.stamp, grad=payload, loss=1.0)
            validated = side.validated(functools.partial(server.validate, push))
            payload.fill_(torch.nan)  # its memory is free again
            with lock:
                answers = server.commit(push, validated)
            (reply,) = answers
            sent = side.on_host(reply).params
            if not bool((sent == sent[0]).all()) or not float(sent[0]).is_integer():
                wrong.append(f"worker {worker}, round {number}: {sent.unique()[:5]}")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert torch.equal(server.params.cpu(), torch.full((dimension,), float(rounds * sum(range(1, workers + 1)))))
