"""Pushes of 16 bits: to every algorithm they are what the same numbers in the dtype of the parameters are, to the bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ormo_rpc import ParameterServer, Push, PushRefused, build_server
from ormo_rpc.kernels.compiled import fastest_kernel
from ormo_rpc.messages import Reply
from ormo_rpc.options import find, parts
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.validation import ROW, NormLimit, NormPolicy
from ormo_rpc.storage.journal import FileJournal, recover

ROUNDED = [torch.bfloat16, torch.float16]
ORDER = [0, 1, 1, 2, 0, 1, 1, 2, 0, 2]
"""The workers in the order of their pushes."""


def server(
    algorithm: str, pushed: torch.dtype | None, *, length: int = 70_001, events: list[Event] | None = None, **more: object
) -> ParameterServer:
    """A server with compiled steps, where there are any."""
    return build_server(
        algorithm=algorithm,
        params=torch.ones(length),
        num_workers=3,
        lr=lambda t: 0.1 / (t + 1),
        record=[].append if events is None else events.append,
        kernel=fastest_kernel(length),
        pushed_dtype=pushed,
        **more,  # pyright: ignore[reportArgumentType] # options
    )


def gradients(algorithm: str, length: int, dtype: torch.dtype) -> list[Tensor]:
    size = length * find("algorithm", algorithm).VECTORS_PUSHED
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator).to(dtype) for _ in ORDER]


def pushed(reply: Reply, grad: Tensor) -> Push:
    assert reply.ticket is not None
    return Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=grad, incarnation=reply.incarnation)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("algorithm", parts("algorithm"))
def test_a_rounded_push_is_the_same_numbers_to_every_algorithm(algorithm: str, dtype: torch.dtype) -> None:
    length = 70_001  # long enough for compiled steps, with a rest
    events: list[Event] = []
    rounded, exact = server(algorithm, dtype, events=events), server(algorithm, None)
    held = [{reply.worker: reply for reply in each.start()} for each in (rounded, exact)]
    grads = gradients(algorithm, length, dtype)
    for worker, grad in zip(ORDER, grads, strict=True):
        before = grad.clone()
        sender = worker if worker in held[0] else min(held[0])  # a rule of rounds holds others back
        for each, replies, what in ((rounded, held[0], grad), (exact, held[1], grad.float())):
            replies |= {reply.worker: reply for reply in each.receive(pushed(replies.pop(sender), what))}
        assert torch.equal(grad, before)
        assert torch.equal(rounded.params, exact.params)
    assert rounded.params.dtype == torch.float32
    for name, value in rounded.algorithm.state_dict().items():
        other = exact.algorithm.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, Tensor) and isinstance(other, Tensor) else value == other
    # The evidence in the trace: the sums of rows have 8 or 11 bits each.
    for event, grad in zip([each for each in events if "grad_sum" in each.data], grads, strict=True):
        exactly, size = grad.double().sum().item(), grad.double().abs().sum().item()
        assert float.fromhex(event.data["grad_sum"]) == pytest.approx(exactly, abs=2**-8 * size / math.sqrt(ROW))


def test_the_sum_of_a_rounded_push_changes_with_one_value() -> None:
    events: list[Event] = []
    sums: set[str] = set()
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(70_001, generator=generator).bfloat16()
    for place, change in ((0, 0), (0, 4), (ROW, 8), (70_000, 16)):
        one = server("asgd", torch.bfloat16, events=events)
        changed = grad.clone()
        changed[place] += change
        one.receive(pushed(one.start()[0], changed))
        sums.add(next(event for event in reversed(events) if event.kind is Kind.apply).data["grad_sum"])
    assert len(sums) == 4


@pytest.mark.parametrize("value", [20.0, torch.finfo(torch.float16).max])
def test_the_sum_in_the_trace_is_a_number_where_that_of_a_row_is_beyond_float16(value: float) -> None:
    """Rows of the sums infinity and minus infinity would have NaN, whatever came."""
    grad = torch.full((3 * ROW,), value, dtype=torch.float16)
    grad[ROW : 2 * ROW] = -value
    one = server("asgd", torch.float16, length=grad.numel())
    checked = one.validate(pushed(one.start()[0], grad))
    assert checked.grad_sum == value * ROW
    changed = grad.clone()
    changed[5] /= 2
    assert one.validate(pushed(one.start()[0], changed)).grad_sum != checked.grad_sum


@pytest.mark.parametrize("length", [1, 3, ROW, ROW + 1])
def test_a_value_that_is_not_finite_is_found_at_any_place_of_a_rounded_push(length: int) -> None:
    one = server("ormo", torch.bfloat16, length=length)
    reply = one.start()[0]
    for place in {0, length - 1, length // 2}:
        grad = torch.zeros(length, dtype=torch.bfloat16)
        grad[place] = math.inf
        assert f"got 1 of {length} values NaN or infinite" in str(one.validate(pushed(reply, grad)).rejected)
    large = torch.full((length,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    assert one.validate(pushed(reply, large)).grad is not None  # their sum is beyond the range, they are not


def test_a_limit_to_the_norm_holds_for_rounded_pushes() -> None:
    grad = torch.tensor([3.0, 4.0]).bfloat16()
    for policy in NormPolicy:
        guard = NormLimit(1.0, policy)
        one = build_server(
            algorithm="asgd", params=torch.zeros(2), lr=1.0, norm_limit=guard, pushed_dtype=torch.bfloat16, num_workers=1
        )
        (reply,) = one.start()
        if policy is NormPolicy.refuse:
            assert "got the norm 5" in str(one.validate(pushed(reply, grad)).rejected)
        else:
            one.receive(pushed(reply, grad))
            torch.testing.assert_close(one.params, torch.tensor([-0.6, -0.8]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_push_of_another_dtype_than_that_of_the_wire_is_refused(dtype: torch.dtype) -> None:
    one = server("ormo", torch.bfloat16, length=3)
    said = rf"^push of worker 0 for ticket 0: gradient: got dtype {dtype}, expected torch.bfloat16, as the wire has it$"
    with pytest.raises(PushRefused, match=said):
        one.receive(pushed(one.start()[0], torch.ones(3, dtype=dtype)))
    assert (one.iteration, one.params.tolist()) == (0, [1.0] * 3)


def test_a_pushed_dtype_of_other_than_16_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^pushed_dtype: got torch.int8, expected torch.bfloat16 or torch.float16, or None$"):
        server("ormo", torch.int8)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_the_journal_keeps_rounded_pushes_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    grads = gradients("ormo", 1001, dtype)
    first, again = (server("ormo", dtype, length=1001) for _ in range(2))
    journal = FileJournal(tmp_path)
    held = {reply.worker: reply for reply in first.start()}
    journal.start([0, 1, 2], first.incarnation)
    for worker, grad in zip(ORDER, grads, strict=True):
        push = pushed(held.pop(worker), grad)
        held |= {reply.worker: reply for reply in first.receive(push)}
        journal.push(push, rejected=False)
    journal.close()
    assert recover(tmp_path, 0, again) == 1 + len(ORDER)
    assert torch.equal(again.params, first.params)
    assert first.iteration == len(ORDER)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.log"))
    assert len(ORDER) * 2 * 1001 < size < len(ORDER) * 4 * 1001  # 2 bytes for each value
