"""The memory that server and worker share: reused, never while it is read, and replaced by TCP where it cannot be shared."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ormo_rpc.errors import TransportRefused
from ormo_rpc.kernels import pool
from ormo_rpc.transports.base import Transport
from ormo_rpc.transports.stream import client, server
from ormo_rpc.transports.stream.shared_memory import AVAILABLE, SegmentHandle, SharedMemoryPool
from tests.support.stream_peers import SHARED, SMALL, TCP, WORKERS, StreamWorker, cluster, mapping


def segments_of(pool: SharedMemoryPool) -> int:
    """Count the segments of a pool that this process has; a mapping of Python's has a descriptor of its own."""
    files: set[int] = set()
    for each in Path("/proc/self/fd").iterdir():
        try:
            if pool.name in str(each.readlink()):
                files.add(each.stat().st_ino)
        except OSError:  # closed meanwhile, such as that of this very listing
            continue
    return len(files)


@pytest.mark.parametrize("algorithm", ["ormo", "dc_asgd", "dana"])
def test_memory_of_parameters_is_reused_but_not_while_a_worker_reads_it(algorithm: str) -> None:
    """K replies are out, w is the next one or one more, and one is written; an algorithm that sends more has as much for it.

    In `Cluster.step` all replies that are out are compared with those of the reference after every push.
    """
    with cluster(algorithm=algorithm) as run:
        run.start(*[SHARED] * WORKERS)
        run.run(240, random.Random(algorithm))
        assert run.pushed == 240
        assert run.pool is not None
        probe = 1
        assert WORKERS < segments_of(run.pool) - probe <= WORKERS + 2
        for worker in run.workers:
            assert worker.pool is not None
            assert segments_of(worker.pool) == 1


def test_a_slow_worker_keeps_its_parameters_while_the_others_push(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "WORTH_POOLING", 0)  # small vectors, too, lie in shared memory
    with cluster(dimension=SMALL) as run:
        run.start(*[SHARED] * WORKERS)
        came, _ = run.held[0]
        bits = came.params.clone()
        for _ in range(5):
            run.run(20, random.Random(9), among=(1, 2))
            assert torch.equal(came.params, bits)
        run.step(0)
        assert not torch.equal(run.held[0][0].params, bits)
        run.check_same_state()


def test_transport_shm_shares_memory_with_every_worker() -> None:
    with cluster(SHARED) as run:
        run.start(*[SHARED] * WORKERS)
        run.run(6, random.Random(1))
        run.check_same_state()


def cannot(handle: SegmentHandle, _size: int) -> Tensor:
    raise FileNotFoundError(f"[Errno 2] No such file or directory: '/proc/{handle.pid}/fd/{handle.descriptor}'")


@pytest.mark.skipif(not AVAILABLE, reason="this system has no memfd_create")
@pytest.mark.parametrize("module", [server, client], ids=["the server cannot", "the worker cannot"])
def test_a_worker_that_cannot_share_memory_is_refused_with_the_reason(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(SHARED) as run:
        monkeypatch.setattr(module, "attach", cannot)
        said = r"\Atransport=shm: another machine: no shared memory; take transport=auto, or another one\Z"
        with pytest.raises(TransportRefused, match=said):
            StreamWorker(run, 0, SHARED)
        run.start(*[TCP] * WORKERS)  # it serves the others
        run.run(6, random.Random(1))
        run.check_same_state()


@pytest.mark.parametrize(
    ("transport", "reason"),
    [(TCP, "the server shares no memory"), (SHARED, "the server's system has no memory that could be shared")],
    ids=["tcp", "no memfd"],
)
def test_a_server_without_shared_memory_gives_the_reason(
    transport: Transport, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if transport is not TCP:
        monkeypatch.setattr(server, "AVAILABLE", False)
    with (
        cluster(transport, dimension=SMALL) as run,
        pytest.raises(TransportRefused, match=rf"\Atransport=shm: {reason}; take transport=auto, or another one\Z"),
    ):
        StreamWorker(run, 0, SHARED)


def test_a_run_continues_over_tcp_when_descriptors_are_scarce(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with cluster(SHARED) as run:
        run.start(*[SHARED] * WORKERS)
        hoard = [run.service.server.algorithm.empty() for _ in range(WORKERS + 1)]  # all that is left of what was reserved
        monkeypatch.setattr("resource.getrlimit", lambda _: (2, 2))
        run.run(12, random.Random(1))
        run.check_same_state()
        places = [mapping(came.params) for came, _ in run.held.values()]
        assert not all("memfd" in place for place in places)
        del hoard
    assert sum("memory is not shared from now on" in record.getMessage() for record in caplog.records) >= 1


def test_a_worker_with_too_many_open_segments_closes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[int] = []
    really = client.attach
    with cluster(SHARED) as run:
        run.start(*[SHARED] * WORKERS)
        (first, *_) = run.workers

        def scarce(handle: SegmentHandle, size: int) -> Tensor:
            if len(first.client._attached) >= 2:  # pyright: ignore[reportPrivateUsage] # which of them fill the table
                refused.append(handle.descriptor)
                raise OSError(errno.EMFILE, "Too many open files")
            return really(handle, size)

        monkeypatch.setattr(client, "attach", scarce)
        run.run(20, random.Random(1), among=(0,))
        run.check_same_state()
    assert refused
