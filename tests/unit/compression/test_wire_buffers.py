"""The buffers among the bytes of a push: those that are reported and no others, of any dtype, whatever the bytes are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.compression import Encoder, PushFormat
from ormo_rpc.compression.wire_buffers import WireBuffers
from ormo_rpc.errors import PushRefused
from ormo_rpc.messages import Push
from ormo_rpc.models.flat import Layout
from ormo_rpc.server.buffer_layout import ALIGNMENT, BufferLayout, same_bytes
from ormo_rpc.server.buffer_rules import Rule, RuleKind
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.validation import validate_push

TENSORS: dict[str, Tensor] = {
    "flags": torch.tensor([True, False, True]),
    "mean": torch.tensor([1.5, float("nan")]),
    "calls": torch.tensor(2**40),
    "wide": torch.tensor([[1.0], [-0.0]], dtype=torch.float64),
    "half": torch.tensor(0.5, dtype=torch.bfloat16),
    "complex": torch.tensor([1 + 2j, 3j], dtype=torch.complex128).conj(),
    "empty": torch.empty(0, 3),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "columns": torch.arange(6.0).view(2, 3).t(),
}
LAYOUT = BufferLayout(TENSORS)
FORMAT = PushFormat(params=Layout({"w": torch.zeros(3)}), buffers=LAYOUT, dtype=torch.float32)


@given(names=st.sets(st.sampled_from(sorted(TENSORS))), former=st.sets(st.sampled_from(sorted(TENSORS))))
def test_what_is_reported_arrives_and_nothing_else(names: set[str], former: set[str]) -> None:
    encoder = Encoder(FORMAT)
    encoder.buffers.write({name: torch.zeros_like(TENSORS[name]) for name in former})  # the push before
    written = encoder.buffers.write({name: TENSORS[name] for name in names})
    for found in (written, FORMAT.unpack(encoder.wire)[1]):
        assert found.keys() == names
        assert all(same_bytes(found[name], TENSORS[name]) for name in names)


def test_all_lie_at_aligned_places_and_come_back() -> None:
    flat = LAYOUT.pack(TENSORS)
    assert LAYOUT.size == flat.numel() == 16 + 16 + 16 + 16 + 16 + 32 + 0 + 16 + 32
    views = LAYOUT.views(flat)
    assert all((view.data_ptr() - flat.data_ptr()) % ALIGNMENT == 0 for view in views.values() if view.numel())
    assert all(same_bytes(views[name], value) for name, value in TENSORS.items())
    elsewhere = torch.zeros(flat.numel() + 1, dtype=torch.uint8)[1:].copy_(flat)  # an address at which no number may be
    assert all(same_bytes(value, TENSORS[name]) for name, value in LAYOUT.views(elsewhere).items())
    assert BufferLayout({}).views(torch.empty(0, dtype=torch.uint8)) == {}


@given(data=st.data())
def test_forged_bytes_are_decoded_to_valid_tensors(data: st.DataObject) -> None:
    """Marks that are neither 0 nor 1 report, and a bool is never anything but true or false."""
    size = WireBuffers.size(LAYOUT)
    region = torch.tensor(list(data.draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    marks = region[: len(TENSORS)].tolist()
    found = WireBuffers(LAYOUT, region).read()
    assert list(found) == [name for name, mark in zip(TENSORS, marks, strict=True) if mark]
    assert all((value.shape, value.dtype) == (TENSORS[name].shape, TENSORS[name].dtype) for name, value in found.items())
    if "flags" in found:
        assert set(found["flags"].view(torch.uint8).tolist()) <= {0, 1}
        expected = [each != 0 for each in region[16:19].tolist()]  # behind the marks
        assert found["flags"].tolist() == expected


RUNNING = RunningBuffers(
    {
        "mean": torch.zeros(2),
        "var": torch.ones(2),
        "calls": torch.tensor(0),
        "least": torch.tensor(float("inf")),
        "flags": torch.tensor([True, False]),
    },
    {
        "mean": Rule(RuleKind.average, 0.1, "calls"),
        "var": Rule(RuleKind.average, 0.1, "calls", variance=True),
        "calls": Rule(RuleKind.count),
    },
)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("buffers", "text"),
    [
        ({"mean": torch.tensor([0.0, NAN])}, "'mean': got 1 of 2 values NaN or infinite, .*"),
        ({"var": torch.tensor([0.0, INF])}, "'var': got 1 of 2 values NaN or infinite, .*"),
        ({"var": torch.tensor([1.0, -1e-30])}, "'var': got a negative variance, expected numbers >= 0"),
        ({"calls": torch.tensor(-1)}, "'calls': got -1 calls, expected a number from 0 to 2147483647"),
        ({"calls": torch.tensor(2**31)}, "'calls': got 2147483648 calls, expected a number from 0 to 2147483647"),
        ({"calls": torch.tensor(1.0)}, "'calls': got dtype torch.float32, expected torch.int64, .*"),
        ({"flags": torch.tensor([True])}, r"'flags': got shape \(1,\), expected \(2,\), .*"),
        ({"flags": torch.tensor([1, 0])}, "'flags': got dtype torch.int64, expected torch.bool, .*"),
        ({"least": torch.tensor([0.0])}, r"'least': got shape \(1,\), expected \(\), .*"),
    ],
)
def test_impossible_buffers_are_refused(buffers: dict[str, Tensor], text: str) -> None:
    fine = {"mean": torch.zeros(2), "var": torch.ones(2), "calls": torch.tensor(1)}
    push = Push(worker=0, ticket=0, stamp=0, grad=torch.zeros(3), buffers={**fine, **buffers})
    with pytest.raises(PushRefused, match=f"^push of worker 0 for ticket 0: buffer {text}$"):
        validate_push(push, torch.zeros(3), RUNNING)


def test_buffers_that_are_possible_alone_are_so_together() -> None:
    largest = torch.finfo(torch.float32).max
    buffers = {"mean": torch.tensor([largest, largest]), "var": torch.tensor([largest, 0.0])}  # their sum is infinite
    validate_push(Push(worker=0, ticket=0, stamp=0, grad=torch.zeros(3), buffers=buffers), torch.zeros(3), RUNNING)


def test_a_number_of_calls_that_is_nan_is_refused() -> None:
    running = RunningBuffers({"calls": torch.tensor(0.0)}, {"calls": Rule(RuleKind.count)})
    push = Push(worker=0, ticket=0, stamp=0, grad=torch.zeros(3), buffers={"calls": torch.tensor(NAN)})
    with pytest.raises(PushRefused, match=r"^push of worker 0 for ticket 0: buffer 'calls': got nan calls, expected .*"):
        validate_push(push, torch.zeros(3), running)


@pytest.mark.parametrize("value", [NAN, -INF, 0.0])
def test_other_buffers_may_have_any_value(value: float) -> None:
    buffers = {"least": torch.tensor(value), "calls": torch.tensor(0), "flags": torch.tensor([False, True])}
    push = Push(worker=0, ticket=0, stamp=0, grad=torch.zeros(3), buffers=buffers)
    validate_push(push, torch.zeros(3), RUNNING)
    running = RunningBuffers(RUNNING.current, RUNNING.rules)
    running.update(buffers)
    assert same_bytes(running.current["least"], torch.tensor(value))


def test_counts_do_not_overflow_and_no_call_moves_nothing() -> None:
    running = RunningBuffers(RUNNING.current, RUNNING.rules)
    for _ in range(1000):
        running.update({"mean": torch.ones(2), "calls": torch.tensor(2**31 - 1)})
    assert running.current["calls"] == 1000 * (2**31 - 1)
    assert running.current["mean"].tolist() == [1, 1]
    running.update({"mean": torch.zeros(2), "calls": torch.tensor(0)})
    assert running.current["mean"].tolist() == [1, 1]
