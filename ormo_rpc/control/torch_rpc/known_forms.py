"""Read messages of a form that was seen before by comparing bytes; the first of a form goes to the allow-list's reader.

Every push has the same pickle but for a session and a header, and so has every reply. A message that the allow-list's reader
has accepted is pickled again here, twice, with other values in its texts and bytes: what is the same in both is the form. A
later message of that length whose bytes are equal everywhere else is what our own pickler makes of the values in between,
which are taken from their places. Anything that differs is read as if this module did not exist.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.rpc import internal

from ormo_rpc.control.torch_rpc.thread_states import keep_thread_state

MAX_FORMS = 32
"""The number of forms that are kept, so that a peer cannot fill the memory."""
_tables = internal._thread_local_tensor_tables  # pyright: ignore[reportPrivateUsage] # torch has no public place for the tensors of a message


class FormReader:
    """Stands where torch expects a class of unpicklers; the readers that it makes read one message each.

    Args:
        unpickler: The class that reads messages of other forms.
    """

    def __init__(self, unpickler: Callable[..., Any]) -> None:
        self.unpickler = unpickler
        self.forms: dict[int, Form] = {}
        """By the length of a message."""

    def __call__(self, file: io.BytesIO) -> MessageReader:
        """A reader of the message in this file."""
        return MessageReader(self, file)

    def read(self, file: io.BytesIO) -> Any:
        """Read a message.

        Raises:
            pickle.UnpicklingError: the other reader refuses it.
        """
        keep_thread_state()
        data, tensors = file.getvalue(), _tables.recv_tables
        form = self.forms.get(len(data))
        values = None if form is None or not tensors else form.values(data, tensors[0])
        if form is not None and values is not None:
            return values if form.function is None else internal.PythonUDF(form.function, values, {})
        message = self.unpickler(file).load()
        if form is None and len(self.forms) < MAX_FORMS:
            learned = form_of(message, data)
            if learned is not None:
                self.forms[len(data)] = learned
        return message


class MessageReader:
    """Has the one method of an unpickler that torch calls.

    Args:
        reader: Of this process.
        file: The message.
    """

    __slots__ = ("file", "reader")

    def __init__(self, reader: FormReader, file: io.BytesIO) -> None:
        self.reader = reader
        self.file = file

    def load(self) -> Any:
        """Read the message."""
        return self.reader.read(self.file)


class Form:
    """The bytes that messages of one form have in common.

    Args:
        function: The function that is called; None for a tuple of values, such as a reply.
        values: Those of one message: texts, bytes, and one tensor, the first of the message.
        places: Where the texts and bytes lie, in their order.
        data: Such a message.
    """

    def __init__(self, function: Any, values: Sequence[Any], places: Sequence[slice], data: bytes) -> None:
        self.function = function
        ends = [0, *(end for place in places for end in (place.start, place.stop)), len(data)]
        self._fixed = tuple((slice(a, b), data[a:b]) for a, b in zip(ends[::2], ends[1::2], strict=True))
        left = iter(places)
        self._places = tuple((type(value) is str, None if isinstance(value, torch.Tensor) else next(left)) for value in values)

    def values(self, data: bytes, tensor: torch.Tensor) -> tuple[Any, ...] | None:
        """The values of a message of the same length; None where it has another form."""
        for place, fixed in self._fixed:
            if data[place] != fixed:
                return None
        try:
            return tuple(
                tensor if place is None else data[place].decode("ascii") if is_text else data[place]
                for is_text, place in self._places
            )
        except UnicodeDecodeError:  # letters of other lengths
            return None


def form_of(message: Any, data: bytes) -> Form | None:
    """The form of a message that was accepted; None unless it is of texts, bytes and one tensor, as our pickler writes it."""
    function, values = None, message
    if isinstance(message, internal.PythonUDF):
        function, values = message.func, message.args
        if message.kwargs != {}:
            return None
    if type(values) is not tuple or [type(value) for value in values].count(torch.Tensor) != 1:
        return None
    varying = [value for value in values if type(value) is not torch.Tensor]
    if not all(type(value) in (str, bytes) and value for value in varying):
        return None
    try:
        one, other = (_pickled(function, values, letter) for letter in "ab")
    except (pickle.PicklingError, AttributeError):
        return None
    places = _differences(one, other)
    given = [value.encode("ascii", "replace") if type(value) is str else value for value in varying]
    if len(one) != len(data) or [place.stop - place.start for place in places] != [len(part) for part in given]:
        return None
    filled = bytearray(one)
    for place, part in zip(places, given, strict=True):
        filled[place] = part
    return Form(function, values, places, data) if bytes(filled) == data else None


def _pickled(function: Any, values: tuple[Any, ...], letter: str) -> bytes:
    """A message with one letter for all that varies."""
    blank = tuple(
        value
        if isinstance(value, torch.Tensor)
        else letter * len(value)
        if type(value) is str
        else letter.encode() * len(value)
        for value in values
    )
    return internal.serialize(blank if function is None else internal.PythonUDF(function, blank, {}))[0]


def _differences(one: bytes, other: bytes) -> list[slice]:
    """The runs of places in which two messages of the same length differ."""
    differs = [a != b for a, b in zip(one, other, strict=True)]
    found, start = list[slice](), 0
    for different, run in itertools.groupby(differs):
        stop = start + len(list(run))
        if different:
            found.append(slice(start, stop))
        start = stop
    return found
