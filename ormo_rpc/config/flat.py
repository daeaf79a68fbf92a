"""Recorded configurations as one value for each full key, without a check against the schema, and the keys' defaults.

A part of the user's own class may not be importable where runs are compared, and a key of an earlier version may be gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ormo_rpc.config.parsing import read_values
from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.config.write_conf import options_of, sections
from ormo_rpc.errors import ConfigError


def read_flat(file: Path) -> dict[str, Any]:
    """Read a ``config.yaml``: values by full key; the key of a part's name, or of its ``_target_``, is that of its group.

    Raises:
        ConfigError: the file is missing or cannot be read.
    """
    try:
        return flat(read_values(file.read_text(encoding="utf-8")))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested values in the same way. A mapping of no keys, or of other keys than texts without a dot, is one value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in GROUPS and isinstance(value, Mapping):
            options = dict(value)
            target, name = options.pop("_target_", None), options.get("name")
            if target is None:
                options.pop("name", None)
            found[key] = name if target is None else target
            for option, inner in options.items():
                found |= _leaves(f"{key}.{option}", inner)
        else:
            found |= _leaves(key, value)
    return found


def defaults_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the keys of a flat configuration, as far as this version knows them."""
    standard = Config()
    found: dict[str, Any] = {group: getattr(standard, group).name for group in GROUPS}
    for path, part, section in sections():
        if not part or options.get(path) == part:
            found |= {f"{path}.{name}" if path else name: value for name, value, _ in options_of(section)}
    return found


def _leaves(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value or not all(isinstance(each, str) and "." not in each for each in value):
        return {key: dict(value) if isinstance(value, Mapping) else value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _leaves(f"{key}.{name}", inner)
    return found
