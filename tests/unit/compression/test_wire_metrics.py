"""The metrics among the bytes of a push: they come back as they were given, whatever the form, and forged ones are refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ormo_rpc.compression import Encoder, PushFormat
from ormo_rpc.compression.wire_metrics import ROOM, WireMetrics
from ormo_rpc.compression.wire_options import WireDtype
from ormo_rpc.errors import PushRefused
from ormo_rpc.messages import Push
from ormo_rpc.server.push_metrics import as_push_metrics
from ormo_rpc.transports.codec import PUSH
from ormo_rpc.transports.push_reader import PushReader
from tests.support.compression import CASES, COMPRESSIONS, SHAPES, STATISTICS, buffer_layout, encoded, gradients, layout

if TYPE_CHECKING:
    from ormo_rpc.transports.base import Service

NUMBERS: dict[str, Any] = {"worker": 1, "ticket": 2, "stamp": 0, "loss": 0.5, "samples": 8, "incarnation": 0}
EVERYTHING = {
    "tokens": 7,
    "hits": (3, 8),
    "norm": math.inf,
    "ünïcode/@5": -0.0,
    "tensor": torch.tensor([[2.5]]),
    "numpy": [np.float32(0.25), np.int64(4)],
    "true": True,
}
AS_FLOATS = {
    "tokens": 7.0,
    "hits": (3.0, 8.0),
    "norm": math.inf,
    "ünïcode/@5": -0.0,
    "tensor": 2.5,
    "numpy": (0.25, 4.0),
    "true": 1.0,
}


def formed(name: str, wire: WireDtype, *, metrics: bool, dtype: torch.dtype = torch.float32) -> PushFormat:
    return PushFormat(
        params=layout(SHAPES),
        buffers=buffer_layout(STATISTICS),
        dtype=dtype,
        compression=COMPRESSIONS[name],
        wire=wire,
        metrics=metrics,
    )


@dataclass
class Formed:
    """A service that knows the wire form alone."""

    push_format: PushFormat


def arrivals(form: PushFormat, wire: torch.Tensor, *, rpc: bool) -> Push:
    """The push that a transport makes of the bytes: that of the messages of torch's RPC, or any other one."""
    if rpc:
        from ormo_rpc.transports.rpc.server import _unpacked  # pyright: ignore[reportPrivateUsage] # what its call does

        header = PUSH.pack(Push(**NUMBERS, grad=torch.empty(0)))
        return _unpacked(cast("Service", Formed(form)), header, wire)
    return PushReader(form, wire).read(NUMBERS)


@pytest.mark.parametrize("rpc", [False, True], ids=["reader", "rpc"])
@pytest.mark.parametrize(("name", "wire"), CASES)
def test_metrics_cross_in_each_wire_form_and_change_nothing_else(name: str, wire: WireDtype, rpc: bool) -> None:
    with_room, without = formed(name, wire, metrics=True), formed(name, wire, metrics=False)
    encoder, other = Encoder(with_room), Encoder(without)
    gradient = gradients(1)[0]
    assert torch.equal(encoded(encoder, gradient), encoded(other, gradient))
    assert encoder.metrics.write(EVERYTHING) == AS_FLOATS
    assert math.copysign(1, encoder.metrics.read()["ünïcode/@5"]) == -1  # pyright: ignore[reportArgumentType] # a number
    assert without.size <= with_room.size - ROOM < without.size + 16
    assert torch.equal(encoder.wire[: without.size], other.wire)
    came, plain = arrivals(with_room, encoder.wire, rpc=rpc), arrivals(without, other.wire, rpc=rpc)
    assert (came.metrics, plain.metrics) == (AS_FLOATS, {})
    assert torch.equal(came.grad, plain.grad)
    assert encoder.metrics.write({}) == {}
    assert arrivals(with_room, encoder.wire, rpc=rpc).metrics == {}


@given(
    metrics=st.dictionaries(
        st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=60).filter(lambda name: name != "loss"),
        st.floats() | st.tuples(st.floats(), st.floats(min_value=0)),
        max_size=8,
    ),
    former=st.binary(min_size=ROOM, max_size=ROOM),
)
def test_any_metrics_come_back(metrics: dict[str, Any], former: bytes) -> None:
    region = torch.tensor(list(former), dtype=torch.uint8)
    wire = WireMetrics(region)
    size = 2 + sum(18 + len(name.encode()) for name in metrics)
    if size > ROOM:
        with pytest.raises(ValueError, match=r"^push: metrics: got .* expected at most 1022 bytes"):
            wire.write(metrics)
        assert bytes(region.numpy()) == former
        return
    assert repr(wire.write(metrics)) == repr(wire.read()) == repr(metrics)  # NaN is not equal to itself


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"loss": 1.0}, "got the name 'loss', expected 1 to 60 printable characters without blanks, and not loss"),
        ({"": 1.0}, "got the name '', expected .*"),
        ({"a b": 1.0}, "got the name 'a b', expected .*"),
        ({"a\nb": 1.0}, r"got the name 'a\\nb', expected .*"),
        ({"x" * 61: 1.0}, "got the name 'x{61}', expected .*"),
        ({3: 1.0}, "got a int as a name, expected a text"),
        ({"tokens": "many"}, r"tokens: got 'many', expected a number, or a pair \(sum, count\)"),
        ({"tokens": None}, "tokens: got 'None', expected .*"),
        ({"tokens": (1, 2, 3)}, r"tokens: got '\(1, 2, 3\)', expected .*"),
        ({"tokens": torch.ones(2)}, r"tokens: got 'tensor\(\[1., 1.\]\)', expected .*"),
        ({"tokens": 10**400}, "tokens: got '10+', expected .*"),
        ({"tokens": (1, -1)}, "tokens: got the count -1, expected a number >= 0"),
        ({f"metric_{n:02}": n for n in range(40)}, r"got 40 of them in 1080 bytes, expected at most 1022 bytes \(18 each, .*"),
    ],
)
def test_what_cannot_be_pushed_is_refused_in_the_worker(metrics: dict[Any, Any], text: str) -> None:
    wire = WireMetrics(torch.zeros(ROOM, dtype=torch.uint8))
    with pytest.raises(ValueError, match=f"^push: metrics: {text}$"):
        wire.write(metrics)
    assert wire.read() == {}


def test_a_form_without_room_takes_no_metrics() -> None:
    encoder = Encoder(formed("none", WireDtype.float32, metrics=False))
    assert encoder.metrics.write({}) == encoder.metrics.read() == {}
    with pytest.raises(ValueError, match=r"^push: metrics: got 1 of them in 24 bytes, expected at most 0 bytes .*"):
        encoder.metrics.write({"tokens": 1})


@given(data=st.data())
def test_forged_bytes_are_refused_or_valid(data: st.DataObject) -> None:
    region = torch.zeros(ROOM, dtype=torch.uint8)
    wire = WireMetrics(region)
    wire.write({"tokens": 3, "hits": (1, 2)})
    if data.draw(st.booleans()):
        region.copy_(torch.tensor(list(data.draw(st.binary(min_size=ROOM, max_size=ROOM))), dtype=torch.uint8))
        region[0], region[1] = data.draw(st.integers(0, 255)), data.draw(st.integers(0, 4))
    else:  # what is nearly right goes deeper
        for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 255)), min_size=1, max_size=4)):
            region[place] = byte
    try:
        found = wire.read()
    except PushRefused:
        return
    assert all(isinstance(each, float) for value in found.values() for each in (value if isinstance(value, tuple) else [value]))
    WireMetrics(torch.zeros(ROOM, dtype=torch.uint8)).write(found)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xff",  # an end beyond the room
        b"\x03\x00\x05",  # half an entry
        b"\x14\x00\xff" + bytes(17),  # a name beyond the end
        b"\x16\x00\x02\x00" + bytes(16) + b"\xff\xfe",  # a name that is no text
        b"\x14\x00" + bytes(18),  # a name of no characters
    ],
)
def test_bytes_that_are_no_metrics_are_refused(content: bytes) -> None:
    region = torch.zeros(ROOM, dtype=torch.uint8)
    region[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    with pytest.raises(PushRefused, match=r"^push: metrics: got .*"):
        WireMetrics(region).read()


def test_metrics_may_be_tensors_that_have_gradients(recwarn: pytest.WarningsRecorder) -> None:
    """As parts of a loss are."""
    value = torch.tensor(2.0, requires_grad=True)
    assert as_push_metrics({"part": value, "mean": (value * 3, 2)}) == {"part": 2.0, "mean": (6.0, 2.0)}
    assert not list(recwarn)
