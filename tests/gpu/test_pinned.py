"""Memory that is shared between processes is page-locked where a GPU copies from and to it, and let go in time."""

from __future__ import annotations

import gc

import pytest
import torch

from ormo_rpc.kernels import page_locked
from ormo_rpc.transports.stream.client import StreamWorkerSide
from ormo_rpc.transports.stream.shared_memory import SharedMemoryPool, attach

SIZE = 3_000_001


def test_a_segment_is_locked_and_still_shared(gpu: torch.device) -> None:
    side = StreamWorkerSide(share=True)
    side.page_locked = True
    payload = side.allocate(SIZE)
    assert side.pool is not None
    handle = side.pool.handle(payload)
    assert handle is not None, "the server finds it by its address"
    assert payload.is_pinned()
    values = torch.randint(0, 256, (SIZE,), dtype=torch.uint8)
    payload.copy_(values.to(gpu), non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(payload, values)
    assert torch.equal(attach(handle, SIZE), values)


def test_a_segment_of_another_one_is_locked_for_reading(gpu: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    pool = SharedMemoryPool()
    made = pool.vector(SIZE)
    made.copy_(torch.randint(0, 256, (SIZE,), dtype=torch.uint8))
    handle = pool.handle(made)
    assert handle is not None
    read = page_locked.lock(attach(handle, SIZE), read_only=True)
    assert torch.equal(read.to(gpu, non_blocking=True).cpu(), made), "locked or, where the driver refuses that, not"
    assert read.is_pinned() or "not page-locked" in caplog.text
    torch.ones(8, device=gpu).sum().item()  # a refusal leaves no error behind


def test_memory_is_unlocked_with_its_last_tensor(gpu: torch.device) -> None:
    pool = SharedMemoryPool()
    vector = pool.vector(SIZE)
    for _ in range(3):  # a second time it would be refused, were it still locked
        locked = page_locked.lock(vector)
        part = locked[100:200]
        del locked
        gc.collect()
        assert part.is_pinned(), "a view keeps it locked"
        assert part.to(gpu).shape == (100,)
        del part
        gc.collect()
        assert not vector.is_pinned()


def test_a_refusal_is_a_warning_once(
    gpu: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_locked, "_refused", set[int]())
    pool = SharedMemoryPool()
    vector = pool.vector(SIZE)
    locked = page_locked.lock(vector)
    assert locked.is_pinned()
    for _ in range(2):
        assert page_locked.lock(vector) is vector, "it is locked already"
    assert caplog.text.count("not page-locked") == 1
    assert torch.ones(8, device=gpu).sum().item() == 8


@pytest.mark.usefixtures("gpu")
def test_memory_that_is_not_mapped_is_locked_from_the_start() -> None:
    assert page_locked.zeros(100, page_locked=True).is_pinned()
    assert not page_locked.zeros(100, page_locked=False).is_pinned()
