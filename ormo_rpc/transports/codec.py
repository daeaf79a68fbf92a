"""The one codec of all transports: the numbers of a `Push` or a `Reply` as a header of fixed size; its tensors travel beside.

The layout follows from the dataclass, so a number that is added there crosses without a change here.
"""

from __future__ import annotations

import json
import operator
import struct
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Generic, TypeVar

from ormo_rpc.errors import BY_NAME
from ormo_rpc.messages import ErrorReply, Push, Reply, number_fields

M = TypeVar("M", Push, Reply)
_ABSENT = "absent"
"""The name of the first word, which has a bit for each number that is None."""


class Codec(Generic[M]):
    """Packs the numbers of one class of messages.

    A header is one word with a bit for each number that is None, and 8 bytes for each number in the order of the fields:
    a signed integer or a double, little-endian.

    Args:
        message: The class.

    Attributes:
        size: The bytes of a header.
    """

    def __init__(self, message: type[M]) -> None:
        fields = number_fields(message)
        self._layout = struct.Struct("<q" + "".join("d" if field.type is float else "q" for field in fields))
        names = tuple(field.name for field in fields)
        self._slots = (_ABSENT, *names)
        self._optional = tuple((field.name, 1 << place) for place, field in enumerate(fields) if field.optional)
        self._values: Callable[[M], tuple[Any, ...]] = operator.attrgetter(*names)
        self.size = self._layout.size

    def pack(self, message: M) -> bytes:
        """The header of a message."""
        values = self._values(message)
        absent = 0
        if None in values:
            absent = sum(1 << place for place, value in enumerate(values) if value is None)
            values = [0 if value is None else value for value in values]
        return self._layout.pack(absent, *values)

    def unpack(self, header: bytes | bytearray | memoryview, offset: int = 0) -> dict[str, Any]:
        """The numbers by name; any bytes are valid.

        Raises:
            struct.error: there are too few of them.
        """
        numbers: dict[str, Any] = dict(zip(self._slots, self._layout.unpack_from(header, offset)))  # noqa: B905 - equal, and on the hot path
        absent = numbers.pop(_ABSENT)
        if absent:
            numbers.update((name, None) for name, bit in self._optional if absent & bit)
        return numbers


PUSH = Codec(Push)
REPLY = Codec(Reply)


def pack_error(error: ErrorReply) -> bytes:
    """An error reply as JSON."""
    return json.dumps(asdict(error)).encode()


def unpack_error(data: bytes | bytearray) -> Exception:
    """The exception that an error reply stands for."""
    error = ErrorReply(**json.loads(data))
    return BY_NAME[error.error](error.text)
