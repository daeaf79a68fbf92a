"""The codec: numbers cross to the bit, whatever they are, and the layout follows from the message."""

from __future__ import annotations

import math
import struct
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ormo_rpc.errors import BY_NAME
from ormo_rpc.messages import ErrorReply, Push, Reply, number_fields
from ormo_rpc.transports.codec import PUSH, REPLY, Codec, pack_error, unpack_error

WHOLE, REAL = st.integers(-(2**63), 2**63 - 1), st.floats(width=64)


def numbers_of(message: type[Push] | type[Reply]) -> st.SearchStrategy[dict[str, Any]]:
    """Any numbers of a message."""
    kinds = {field.name: REAL if field.type is float else WHOLE for field in number_fields(message)}
    optional = {field.name for field in number_fields(message) if field.optional}
    return st.fixed_dictionaries({name: st.none() | kind if name in optional else kind for name, kind in kinds.items()})


def check(codec: Codec[Any], message: Any, numbers: dict[str, Any]) -> None:
    header = codec.pack(message)
    assert len(header) == codec.size
    came = codec.unpack(b"before" + header, 6)
    assert came.keys() == numbers.keys()
    for name, number in numbers.items():
        if isinstance(number, float) and math.isnan(number):
            assert math.isnan(came[name])
        else:
            assert (type(came[name]), repr(came[name])) == (type(number), repr(number))  # -0.0 is not 0.0


@given(numbers_of(Push))
def test_the_numbers_of_a_push_cross(numbers: dict[str, Any]) -> None:
    check(PUSH, Push(**numbers, grad=torch.empty(0)), numbers)


@given(numbers_of(Reply))
def test_the_numbers_of_a_reply_cross(numbers: dict[str, Any]) -> None:
    check(REPLY, Reply(**numbers, params=torch.empty(0)), numbers)


@pytest.mark.parametrize(("message", "others"), [(Push, {"grad", "buffers", "metrics"}), (Reply, {"params", "buffers"})])
def test_every_field_is_a_number_or_travels_in_the_payload(message: Any, others: set[str]) -> None:
    assert {field.name for field in fields(message)} == {field.name for field in number_fields(message)} | others


@given(st.binary(min_size=PUSH.size, max_size=PUSH.size))
def test_any_bytes_are_numbers(header: bytes) -> None:
    numbers = PUSH.unpack(header)
    assert {name for name, number in numbers.items() if number is None} <= {"loss"}


def test_a_header_that_is_too_short_is_an_error() -> None:
    with pytest.raises(struct.error):
        PUSH.unpack(bytes(PUSH.size - 1))


def test_the_layout_does_not_depend_on_the_machine() -> None:
    """Little endian, without gaps: written out by hand."""
    push = Push(worker=1, ticket=2, stamp=-1, grad=torch.empty(0), loss=0.5, samples=3, incarnation=4)
    assert PUSH.pack(push).hex() == (
        "0000000000000000" "0100000000000000" "0200000000000000" "ffffffffffffffff"
        "000000000000e03f"  # 2^-1: sign 0, exponent 1022 = 0x3fe, fraction 0
        "0300000000000000" "0400000000000000"
        "000000000000f03f"  # 2^0, the loss scale: sign 0, exponent 1023 = 0x3ff, fraction 0
    )  # fmt: skip


@pytest.mark.parametrize("name", BY_NAME)
def test_an_error_crosses_with_its_type_and_text(name: str) -> None:
    error = unpack_error(pack_error(ErrorReply(error=name, text="why: é")))
    assert (type(error), str(error)) == (BY_NAME[name], "why: é")
