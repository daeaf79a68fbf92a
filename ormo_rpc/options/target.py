"""A function or class of the user's as the value of an option: a dotted path with the keywords that stand beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ormo_rpc.options.imports import is_dotted_path

TARGET = "_target_"
"""The key of the dotted path."""


@dataclass(frozen=True)
class Target:
    """A callable by its dotted path, with the keywords of its call; it is not imported here.

    Attributes:
        path: The dotted path.
        keywords: Plain values; a mapping with a ``_target_`` of its own is instantiated first.
    """

    path: str
    keywords: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, value: Any) -> Target:
        """Read keys with their values, or a dotted path alone.

        Raises:
            TypeError: it is neither.
        """
        if isinstance(value, cls):
            return value
        keys = {TARGET: value} if isinstance(value, str) else value
        if not isinstance(keys, Mapping) or not is_dotted_path(keys.get(TARGET)):
            raise TypeError
        return cls(keys[TARGET], {str(key): each for key, each in keys.items() if key != TARGET})

    def values(self) -> dict[str, Any]:
        """Return the keys that `of` reads."""
        return {TARGET: self.path, **self.keywords}
