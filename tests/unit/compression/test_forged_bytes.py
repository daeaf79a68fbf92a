"""Forged and corrupted bytes of a push: decoded or refused, and nothing beside their place is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.compression import Encoder, PushFormat
from ormo_rpc.compression.wire_options import WireDtype
from ormo_rpc.errors import PushRefused
from ormo_rpc.messages import Push
from ormo_rpc.server.validation import validate_push
from ormo_rpc.worker.faults import FaultInjector
from tests.support.buffers import averages
from tests.support.compression import CASES, DIMENSION, STATISTICS, encoded, gradients, made

SENTINEL = 12345.0


def unpacked(format_: PushFormat, payload: Tensor) -> str:
    """The server's answer to a payload, "taken" or the name of the refusal; nothing beside its place is written."""
    room = torch.full((format_.length + 32,), SENTINEL)
    outcome, said = "taken", "push of worker 3"
    try:
        grad, reported = format_.unpack(payload, room[16:-16], "push of worker 3")
        push = Push(worker=3, ticket=0, stamp=0, grad=grad, buffers=reported)
        buffers = averages({name: torch.zeros(shape) for name, shape in STATISTICS.items()}, {"mean": 0.5, "var": 0.5})
        validate_push(push, torch.empty(DIMENSION), buffers, dtype=format_.pushed_dtype)
        assert torch.isfinite(grad).all()
    except PushRefused as error:
        outcome, said = type(error).__name__, str(error)
    assert said.startswith("push of worker 3")
    assert (room[:16] == SENTINEL).all()
    assert (room[-16:] == SENTINEL).all()
    return outcome


@pytest.mark.parametrize(("name", "wire"), CASES)
@given(data=st.data())
def test_any_bytes_are_decoded_or_refused(name: str, wire: WireDtype, data: st.DataObject) -> None:
    format_ = made(name, wire)
    if data.draw(st.booleans()):
        payload = torch.tensor(list(data.draw(st.binary(min_size=format_.size, max_size=format_.size))), dtype=torch.uint8)
    else:  # what is nearly right goes deeper
        encoder = Encoder(format_)
        encoded(encoder, gradients(1)[0])
        payload = encoder.wire.clone()
        for place, byte in data.draw(st.lists(st.tuples(st.integers(0, format_.size - 1), st.integers(0, 255)), max_size=6)):
            payload[place] = byte
    assert unpacked(format_, payload) in ("taken", "PushRefused", "NonFiniteGradient")


@pytest.mark.parametrize(("name", "wire"), CASES)
def test_other_tensors_than_the_bytes_are_refused(name: str, wire: WireDtype) -> None:
    format_ = made(name, wire)
    good = torch.zeros(format_.size, dtype=torch.uint8)
    bad: list[Any] = [
        good[1:],
        torch.zeros(format_.size + 1, dtype=torch.uint8),
        good.view(1, -1),
        good.to(torch.int8),
        torch.zeros(format_.size),
        torch.empty(format_.size, dtype=torch.uint8, device="meta"),
        good.to_sparse(),
        None,
        b"bytes",
        torch.zeros(0, dtype=torch.uint8),
    ]
    for payload in bad:
        assert unpacked(format_, payload) == "PushRefused"


@pytest.mark.parametrize(("name", "wire"), CASES)
def test_a_payload_that_a_fault_corrupts_is_found_not_finite(name: str, wire: WireDtype) -> None:
    format_, reported = made(name, wire), list[str]()
    encoder = Encoder(format_)
    encoded(encoder, gradients(1)[0])
    assert unpacked(format_, encoder.wire) == "taken"
    FaultInjector(["corrupt@3:0"], 3, 0, reported.append).before_push(encoder.payload)
    assert reported == ["fault corrupt@3:0, push 0"]
    assert unpacked(format_, encoder.wire) == "NonFiniteGradient"
