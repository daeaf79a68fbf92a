"""Keys and values that were renamed: refused on the command line with the new name, translated in recorded configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ormo_rpc.errors import ConfigError

RENAMED_KEYS: Mapping[str, str] = {"worker.stand_in": "worker.dummy", "wire.transport": "transport"}
"""From the former full key to the present one."""
RENAMED_VALUES: Mapping[tuple[str, str], str] = {("transport", "uv"): "rpc", ("transport", "torch_rpc"): "rpc"}
"""From (key, former value) to the present value; the key is the present one."""
_NO_WANDB = ("logger.mode", "disabled")
"""The key and value that meant what ``logger=none`` means now."""

CALLABLE = ("model", "dataset")
"""Groups whose ``_target_`` may be any callable; its keywords were once in ``kwargs``."""


def refuse_renamed(overrides: Sequence[str]) -> None:
    """Refuse command-line overrides under a former name.

    Raises:
        ConfigError: there is one; the message has the new name.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        group, _, keyword = key.partition(".kwargs")
        if group in CALLABLE and keyword[:1] in ("", ".") and key != group:
            replacement = f"+{group}{keyword}={value}" if keyword else f"+{group}.KEY=VALUE for each keyword"
            raise ConfigError(f"{key}: keywords stand beside _target_; use {replacement}")
        if key in RENAMED_KEYS:
            present = RENAMED_KEYS[key]
            raise ConfigError(f"{key}: was renamed; use {present}={RENAMED_VALUES.get((present, value), value)}")
        if (key, value) == _NO_WANDB:
            raise ConfigError(f"{key}: {value} was renamed; use logger=none")
        if (key, value) in RENAMED_VALUES:
            raise ConfigError(f"{key}: {value} was renamed; use {key}={RENAMED_VALUES[key, value]}")


def translate_renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested configuration that an earlier version has saved, under the present names."""
    translated = _copy(values)
    for former, present in RENAMED_KEYS.items():
        *path, name = former.split(".")
        section = _section(translated, path)
        if section is not None and name in section:
            *path, new_name = present.split(".")
            target = _section(translated, path, create=True)
            assert target is not None
            target[new_name] = section.pop(name)
    for group in CALLABLE:
        section = translated.get(group)
        if isinstance(section, dict) and section.get("_target_") is not None and isinstance(section.get("kwargs"), dict):
            translated[group] = {"_target_": section["_target_"], **section["kwargs"]}
    for (key, former), present in RENAMED_VALUES.items():
        *path, name = key.split(".")
        section = _section(translated, path)
        value = None if section is None else section.get(name)
        if section is not None and value == former:
            section[name] = present
        elif isinstance(value, dict) and value.get("name") == former:  # a part with its options
            value["name"] = present
    logger = _section(translated, ["logger"])
    if logger is not None and logger.get("mode") == _NO_WANDB[1]:
        translated["logger"] = {"name": "none"} | {key: logger[key] for key in ("progress", "log_seconds") if key in logger}
    return translated


def _section(tree: dict[str, Any], path: Sequence[str], *, create: bool = False) -> dict[str, Any] | None:
    for name in path:
        child = tree.setdefault(name, {}) if create else tree.get(name)
        if not isinstance(child, dict):
            return None
        tree = child
    return tree


def _copy(values: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}
