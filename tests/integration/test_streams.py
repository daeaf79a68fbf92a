"""StreamServer over loopback, by shared memory and by TCP: what the service says in process, to the bit."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch

from ormo_rpc.compression.wire_options import Transport, WireDtype
from ormo_rpc.options import parts
from tests.support.processes import PATIENCE_SECONDS
from tests.support.stream_peers import BOTH, FACTS, LARGE, SHARED, SMALL, TCP, WORKERS, attach, mapping


@pytest.mark.parametrize("transport", BOTH)
@pytest.mark.parametrize("algorithm", parts("algorithm"))
def test_every_algorithm_says_by_a_stream_what_it_says_in_process(algorithm: str, transport: Transport) -> None:
    with attach(algorithm=algorithm) as house:
        house.enter(*[transport] * WORKERS)
        house.go_on(24, random.Random(algorithm))
        assert house.pushed == 24
        house.check_same_state()
        came, _ = next(iter(house.held.values()))
        line = mapping(came.params)
        if transport is SHARED:
            assert house.segments is not None
            assert re.search(rf" r--s .*/memfd:{house.segments.origin.name} ", line), line  # which nobody can write to
        else:
            assert "memfd" not in line


@pytest.mark.parametrize("transports", [(SHARED,) * 3, (TCP,) * 3, (SHARED, TCP, SHARED)], ids=["shared", "tcp", "mixed"])
@pytest.mark.parametrize(
    ("scheduler", "options"), [("sync", {}), ("partial", {"k": 2}), ("ssp", {"s": 1})], ids=["sync", "partial", "ssp"]
)
def test_a_barrier_holds_answers_back_and_gives_them_all_at_once(
    scheduler: str, options: dict[str, Any], transports: tuple[Transport, ...]
) -> None:
    with attach(scheduler=scheduler, **options) as house:
        house.enter(*transports)
        house.go_on(30, random.Random(scheduler))
        assert house.pushed == 30
        assert house.server.iteration == 30
        house.check_same_state()


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
def test_other_sizes_and_dtypes_and_batch_norm(
    dimension: int, dtype: torch.dtype, algorithm: str, transport: Transport
) -> None:
    """What is small comes with the frame, although its gradients are shared; statistics come behind the gradient."""
    with attach(dimension=dimension, dtype=dtype, algorithm=algorithm, buffers=True) as house:
        house.enter(*[transport] * WORKERS)
        house.go_on(40, random.Random(5))
        house.check_same_state()
        assert house.server.buffers.updates == 40
        shared = "memfd" in mapping(next(iter(house.held.values()))[0].params)
        assert shared == (transport is SHARED and dimension == LARGE)


@pytest.mark.parametrize("transport", BOTH)
@pytest.mark.parametrize("wire", [WireDtype.bf16, WireDtype.fp16])
@pytest.mark.parametrize("algorithm", ["ormo", "pnm"])  # one whose step reads 16 bits, and one that gets them widened
def test_what_is_rounded_both_ways_is_the_same_numbers(algorithm: str, wire: WireDtype, transport: Transport) -> None:
    with attach(dimension=2 * LARGE, algorithm=algorithm, wire=wire) as house:
        house.enter(*[transport] * WORKERS)
        house.go_on(24, random.Random(algorithm))
        assert house.pushed == 24
        house.check_same_state()
        assert house.service.format.size == 2 * 2 * LARGE
        came, _ = next(iter(house.held.values()))
        assert came.params.dtype == torch.bfloat16
        assert ("memfd" in mapping(came.params)) == (transport is SHARED)


@pytest.mark.parametrize("transport", BOTH)
def test_a_run_ends_for_all_and_goodbye_is_heard(transport: Transport) -> None:
    with attach(total_tickets=9, dimension=SMALL) as house:
        house.enter(*[transport] * WORKERS)
        house.go_on(9, random.Random(1))
        assert not house.held
        assert house.server.ended
        house.check_same_state()
        for left, client in zip((2, 1, 0), house.clients, strict=True):
            client.calls.leave()  # returns when it was heard
            assert len(house.service.memberships) == left
        assert house.service.evictions == []
        house.clients[0].calls.leave()  # to nobody: no error


def test_a_push_that_is_repeated_is_applied_once_and_gets_the_identical_reply() -> None:
    with attach() as house:
        house.enter(SHARED, TCP, SHARED)
        for worker in (0, 1):
            before, _ = house.held[worker]
            house.step(worker)
            answer, _ = house.held[worker]
            assert before.ticket is not None
            again = house.clients[worker].push(before, house.gradient(before.ticket)).result(PATIENCE_SECONDS)
            assert [getattr(again, name) for name in FACTS] == [getattr(answer, name) for name in FACTS]
            assert torch.equal(again.params, house.held[worker][1].params)
        assert house.server.iteration == 2
        house.go_on(10, random.Random(2))
