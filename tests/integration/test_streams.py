"""Streams over loopback, by shared memory and by TCP: the replies of a service in process, to the bit."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch

from ormo_rpc.compression.wire_options import WireDtype
from ormo_rpc.options import parts
from ormo_rpc.transports.base import Transport
from tests.support.processes import PATIENCE_SECONDS
from tests.support.stream_peers import BOTH, FACTS, LARGE, SHARED, SMALL, TCP, WORKERS, cluster, mapping


@pytest.mark.parametrize("transport", BOTH)
@pytest.mark.parametrize("algorithm", parts("algorithm"))
def test_every_algorithm_gets_the_same_pushes_and_replies_by_stream_as_in_process(algorithm: str, transport: Transport) -> None:
    with cluster(algorithm=algorithm) as run:
        run.start(*[transport] * WORKERS)
        run.run(24, random.Random(algorithm))
        assert run.pushed == 24
        run.check_same_state()
        came, _ = next(iter(run.held.values()))
        line = mapping(came.params)
        if transport is SHARED:
            assert run.pool is not None
            assert re.search(rf" r--s .*/memfd:{run.pool.name} ", line), line  # which nobody can write to
        else:
            assert "memfd" not in line


@pytest.mark.parametrize("transports", [(SHARED,) * 3, (TCP,) * 3, (SHARED, TCP, SHARED)], ids=["shared", "tcp", "mixed"])
@pytest.mark.parametrize(
    ("scheduler", "options"), [("sync", {}), ("partial", {"k": 2}), ("ssp", {"s": 1})], ids=["sync", "partial", "ssp"]
)
def test_replies_held_back_by_a_barrier_arrive_together(
    scheduler: str, options: dict[str, Any], transports: tuple[Transport, ...]
) -> None:
    with cluster(scheduler=scheduler, **options) as run:
        run.start(*transports)
        run.run(30, random.Random(scheduler))
        assert run.pushed == 30
        assert run.server.iteration == 30
        run.check_same_state()


@pytest.mark.parametrize("transport", BOTH)
@pytest.mark.parametrize(
    ("dimension", "dtype", "algorithm"),
    [
        (LARGE, torch.float64, "ormo"),
        (SMALL, torch.float32, "ormo"),
        (SMALL, torch.float64, "dana"),
        (1, torch.float32, "asgd"),
    ],
    ids=str,
)
def test_other_sizes_dtypes_and_batch_norm_statistics_cross_by_stream(
    dimension: int, dtype: torch.dtype, algorithm: str, transport: Transport
) -> None:
    """Small parameters come with the frame, although gradients are shared; statistics come behind the gradient."""
    with cluster(dimension=dimension, dtype=dtype, algorithm=algorithm, buffers=True) as run:
        run.start(*[transport] * WORKERS)
        run.run(40, random.Random(5))
        run.check_same_state()
        assert run.server.buffers.current["mean"].any()
        shared = "memfd" in mapping(next(iter(run.held.values()))[0].params)
        assert shared == (transport is SHARED and dimension == LARGE)


@pytest.mark.parametrize("transport", BOTH)
@pytest.mark.parametrize("wire", [WireDtype.bf16, WireDtype.fp16])
@pytest.mark.parametrize("algorithm", ["ormo", "pnm"])  # one whose step reads 16 bits, and one that gets them widened
def test_pushes_and_parameters_rounded_to_16_bits_cross_unchanged(
    algorithm: str, wire: WireDtype, transport: Transport
) -> None:
    with cluster(dimension=2 * LARGE, algorithm=algorithm, wire=wire) as run:
        run.start(*[transport] * WORKERS)
        run.run(24, random.Random(algorithm))
        assert run.pushed == 24
        run.check_same_state()
        assert run.service.push_format.size == 2 * 2 * LARGE
        came, _ = next(iter(run.held.values()))
        assert came.params.dtype == torch.bfloat16
        assert ("memfd" in mapping(came.params)) == (transport is SHARED)


@pytest.mark.parametrize("transport", BOTH)
def test_at_the_end_every_worker_is_stopped_and_leaves(transport: Transport) -> None:
    with cluster(total_tickets=9, dimension=SMALL) as run:
        run.start(*[transport] * WORKERS)
        run.run(9, random.Random(1))
        assert not run.held
        assert run.server.ended
        run.check_same_state()
        for left, worker in zip((2, 1, 0), run.workers, strict=True):
            worker.client.leave()  # returns when it was heard
            assert len(run.service.memberships) == left
        assert run.service.evictions == []
        run.workers[0].client.leave()  # to nobody: no error


def test_a_push_that_is_repeated_is_applied_once_and_gets_the_identical_reply() -> None:
    with cluster() as run:
        run.start(SHARED, TCP, SHARED)
        for worker in (0, 1):
            before, _ = run.held[worker]
            run.step(worker)
            answer, _ = run.held[worker]
            assert before.ticket is not None
            again = run.workers[worker].push(before, run.gradient(before.ticket)).result(PATIENCE_SECONDS)
            assert [getattr(again, name) for name in FACTS] == [getattr(answer, name) for name in FACTS]
            assert torch.equal(again.params, run.held[worker][1].params)
        assert run.server.iteration == 2
        run.run(10, random.Random(2))
