"""Every key that a user can set, for tests of the configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

from ormo_rpc.config.write_conf import sections
from ormo_rpc.options import CallsTarget, Section

Key = tuple[str, str, type[Section], dataclasses.Field[Any]]
"""The section's place, the name of the part if it is one, the class, and the field."""

KEYS: list[Key] = [
    (path, part, section, field)
    for path, part, section in sections()
    if not issubclass(section, CallsTarget)
    for field in section.declared().values()
    if field.metadata and field.name != "name"
]


def tree(path: str, part: str, name: str, value: Any) -> dict[str, Any]:
    """The values that a user gives to set one key."""
    if not path:
        return {name: value}
    return {path: {**({"name": part} if part else {}), name: value}}


def label(key: Key) -> str:
    """The full key, and the part that has it."""
    path, part, section, field = key
    assert path == section.PATH
    return section.key(field.name) + (f" of {part}" if part else "")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
