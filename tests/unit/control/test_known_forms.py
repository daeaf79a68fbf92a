"""Reading messages of a known form by comparing bytes: the same values as the allow-list's reader, and the same refusals."""

from __future__ import annotations

import io
import pickle
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.rpc import internal

from ormo_rpc.control.torch_rpc import known_forms, unpickling
from tests.support.mutations import mutated
from tests.support.peer import SYSTEM, Api

TENSOR = torch.arange(3.0)
FUNCTIONS = (Api.push, Api.fails)
MESSAGES = 4000


class Counted(unpickling.AllowListUnpickler):
    """The allow-list's reader, which counts what it reads."""

    functions = {(function.__module__, function.__qualname__): function for function in FUNCTIONS}  # noqa: RUF012 - as its base
    read_so_far = 0

    def load(self) -> Any:
        """Count and read."""
        Counted.read_so_far += 1
        return super().load()


@pytest.fixture(autouse=True)
def _counted() -> None:
    Counted.read_so_far = 0


def push(session_id: str, header: bytes, tensor: Tensor = TENSOR) -> internal.PythonUDF:
    return internal.PythonUDF(Api.push, (session_id, header, tensor), {})


def pickled(message: Any) -> bytes:
    return internal.serialize(message)[0]


def read(reader: Any, data: bytes, tensors: Sequence[Tensor] = (TENSOR,)) -> Any:
    """The message by this reader, or the refusal, as torch's own function reads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(internal, "_unpickler", reader)
        try:
            return internal.deserialize(data, list(tensors))
        except pickle.UnpicklingError as error:
            return error


def same(one: Any, other: Any) -> bool:
    """Compare two messages by types and values, and tensors by identity."""
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return one is other
    if isinstance(one, pickle.UnpicklingError):
        return str(one) == str(other)
    return one == other


def test_after_the_first_message_of_a_form_others_are_read_by_their_bytes() -> None:
    reader = known_forms.FormReader(Counted)
    for number in range(20):
        message, reply = push(f"{number:032}", bytes([number]) * 56), (bytes([number]) * 56, TENSOR)
        assert same(read(reader, pickled(message)), message)
        assert same(read(reader, pickled(reply)), reply)
    assert Counted.read_so_far == 2


@pytest.mark.slow
@given(st.text(min_size=32, max_size=32), st.binary(min_size=56, max_size=56))
def test_any_values_in_their_places_come_out_as_they_went_in(session_id: str, header: bytes) -> None:
    reader = known_forms.FormReader(Counted)
    read(reader, pickled(push("0" * 32, b"0" * 56)))
    before = Counted.read_so_far
    assert same(read(reader, pickled(push(session_id, header))), push(session_id, header))
    assert (Counted.read_so_far > before) is not session_id.isascii()
    read(reader, pickled((b"0" * 56, TENSOR)))
    before = Counted.read_so_far
    assert same(read(reader, pickled((header, TENSOR))), (header, TENSOR))
    assert Counted.read_so_far == before


@pytest.mark.parametrize("size", [1, 255, 256, 70_000])
def test_replies_with_buffers_of_any_size_are_known_from_the_second_on(size: int) -> None:
    reader = known_forms.FormReader(Counted)
    for number in range(3):
        reply = (bytes([number]) * size, TENSOR)
        assert same(read(reader, pickled(reply)), reply)
    assert Counted.read_so_far == 1


def test_mutated_messages_are_read_and_refused_as_by_the_allow_list_alone() -> None:
    reader = known_forms.FormReader(Counted)
    honest = [pickled(push("s" * 32, b"h" * 56)), pickled((b"h" * 56, TENSOR))]
    evil = [pickled(internal.PythonUDF(SYSTEM, ("s" * 32, b"h" * 56, TENSOR), {})), pickle.dumps(SYSTEM)]
    for data in honest:
        read(reader, data)
    assert len(reader.forms) == 2
    chance, outcomes = random.Random(5), Counter[str]()
    for number in range(MESSAGES):
        base = chance.choice(honest)
        data = flipped(base, chance) if number % 2 else mutated(base, chance, [*honest, *evil])
        before = Counted.read_so_far
        ours = read(reader, data)
        outcomes["by bytes" if Counted.read_so_far == before else "by opcodes"] += 1
        assert same(ours, read(Counted, data)), data
    assert min(outcomes["by bytes"], outcomes["by opcodes"]) > 500


def flipped(data: bytes, chance: random.Random) -> bytes:
    """Change some bytes and keep the length."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        changed[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(changed)


def test_each_single_byte_is_compared_or_taken() -> None:
    reader = known_forms.FormReader(Counted)
    honest = pickled(push("s" * 32, b"h" * 56))
    read(reader, honest)
    for place in range(len(honest)):
        for value in (0, honest[place] ^ 1, 0x80 | honest[place], ord("R"), ord(".")):
            data = honest[:place] + bytes([value]) + honest[place + 1 :]
            assert same(read(reader, data), read(Counted, data)), (place, value)


def test_a_known_form_without_its_tensor_is_refused() -> None:
    reader = known_forms.FormReader(Counted)
    data = pickled(push("s" * 32, b"h" * 56))
    read(reader, data)
    assert same(read(reader, data, ()), read(Counted, data, ()))
    assert isinstance(read(reader, data, ()), pickle.UnpicklingError)


@pytest.mark.parametrize(
    "message",
    [
        push("", b"h"),
        push("s", b""),
        internal.PythonUDF(Api.push, ("s", TENSOR, TENSOR), {}),
        internal.PythonUDF(Api.push, ("s", b"h"), {}),
        internal.RemoteException("why", ValueError),
        (b"h", None),
        None,
        "text",
    ],
)
def test_messages_of_other_kinds_are_not_learned(message: Any) -> None:
    reader = known_forms.FormReader(Counted)
    tensors = internal.serialize(message)[1]
    for _ in range(2):
        assert same(read(reader, pickled(message), tensors), message)
    assert reader.forms == {}


def test_a_message_that_our_pickler_writes_otherwise_is_not_learned() -> None:
    reader = known_forms.FormReader(Counted)
    data = pickled(push("s" * 32, b"h" * 56)).replace(b"C\x38", b"B\x38\x00\x00\x00")  # the longer opcode
    frame = len(data) - 11
    data = data[:3] + frame.to_bytes(8, "little") + data[11:]
    assert same(read(reader, data), push("s" * 32, b"h" * 56))
    assert reader.forms == {}


def test_a_peer_does_not_fill_the_memory_with_forms() -> None:
    reader = known_forms.FormReader(Counted)
    for size in range(1, 3 * known_forms.MAX_FORMS):
        read(reader, pickled((b"h" * size, TENSOR)))
    assert len(reader.forms) == known_forms.MAX_FORMS


def test_a_reader_has_what_torch_asks_of_an_unpickler() -> None:
    reader = known_forms.FormReader(Counted)
    internal._thread_local_tensor_tables.recv_tables = []  # pyright: ignore[reportPrivateUsage] # torch sets it before each message
    assert reader(io.BytesIO(pickled((1, "a")))).load() == (1, "a")
