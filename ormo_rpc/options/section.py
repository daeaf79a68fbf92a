"""Options that state their type, default, meaning and range in one line each.

A *section* is a frozen keyword-only dataclass whose fields are made by `option`. Hydra's typed schema, the range checks, the
text of ``launch.py --help`` and the keywords of the Python interface are all read from it, so nothing is written twice.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")


def positive(value: float) -> bool:
    """Tell whether a number is finite and > 0."""
    return 0 < value < math.inf


def not_negative(value: float) -> bool:
    """Tell whether a number is finite and >= 0."""
    return 0 <= value < math.inf


def at_least_one(value: float) -> bool:
    """Tell whether a number is finite and >= 1."""
    return 1 <= value < math.inf


def option(default: T, doc: str, *, valid: Callable[[Any], bool] | None = None, expected: str = "", path: bool = False) -> T:
    """Declare one field of a `Section`.

    Args:
        default: The value where nothing is given; a mutable default is copied for every instance.
        doc: One line for ``--help``, with the unit where there is one.
        valid: Tells whether a value is in range; a value of None passes where None is the default.
        expected: The range in words, for the error message; required beside `valid`.
        path: The value is the path of a file or folder: relative to where the command was started, ``~`` is the home directory.
    """
    metadata = {"doc": doc, "valid": valid, "expected": expected, "path": path}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """A group of options with a place in the configuration tree; every subclass is a keyword-only dataclass.

    Raises:
        ValueError: on construction, when a value is out of range; the message has the full key.
    """

    PATH: ClassVar[str] = ""
    """The section's place in the configuration, such as ``train``."""

    def __post_init__(self) -> None:
        for field in self.declared().values():
            valid: Callable[[Any], bool] | None = field.metadata.get("valid")
            value = getattr(self, field.name)
            if valid is None or (value is None and field.default is None):
                continue
            if not valid(value):
                raise ValueError(f"{self.key(field.name)}: got {value!r}, expected {field.metadata['expected']}")

    @classmethod
    def declared(cls) -> dict[str, dataclasses.Field[Any]]:
        """Return the options by name."""
        return {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType] # every subclass is a dataclass

    @classmethod
    def key(cls, name: str) -> str:
        """Return the full key of a field, as it is typed on the command line."""
        return f"{cls.PATH}.{name}" if cls.PATH else name
