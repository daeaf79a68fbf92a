"""Overrides as a user types them, in the form that hydra can read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ormo_rpc.config.paths import expanded
from ormo_rpc.config.renamed import refuse_renamed
from ormo_rpc.config.write_conf import conf_dir
from ormo_rpc.errors import ConfigError

_HYDRA_PATHS = ("hydra.run.dir", "hydra.sweep.dir")
_IPV6_ADDRESS = r"\[[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%\w+)?\]:\d+"
"""One with a port, such as ``[::1]:29400``, which would be read as a list."""
_OPEN = ("train.lr_schedule.",)
"""Keys below which any key may stand: the keywords of a ``_target_``, in the place of a name."""
_NO_NAMES = ("", "null", "true", "false")
"""Values that hydra does not take for the name of a file of a group."""


def prepared(overrides: Sequence[str]) -> list[str]:
    """Bring overrides into the form that hydra wants.

    A dictionary in the place of another one (``runtime.joins={4: 1.5}``) would be refused for its new keys, as would keywords
    in the place of a name (``train.lr_schedule.step_size=3``); ``++`` allows them.

    Raises:
        ConfigError: one uses a former name, chooses none of a group or a part by its name alone, or has a plus before a group.
    """
    refuse_renamed(overrides)
    for word in overrides:
        key, _, value = word.lstrip("+").partition("=")
        group, _, option = key.partition(".")
        if (
            option == "name"
            and (chosen := [each.strip(" '\"") for each in value.split(",")])
            and _names(group).issuperset(chosen)
        ):
            raise ConfigError(f"{key}: got {value}, expected {group}={','.join(chosen)}, which has the options too")
        if not key.isidentifier() or not (conf_dir() / key).is_dir():
            continue
        if value in _NO_NAMES:
            raise ConfigError(f"{key}: got {value or 'nothing'}, expected one of {', '.join(sorted(_names(key)))}")
        if word.startswith("+") and not value.startswith("{"):
            raise ConfigError(f"{word}: got a plus before a group; write {key}={value}")
    return [f"++{word.lstrip('+')}" if _is_new(word) else word for word in map(_readable, overrides)]


def _names(group: str) -> set[str]:
    """The names of the files of a group; empty where there is no such group."""
    return {file.stem for file in (conf_dir() / group).glob("*.yaml")} if group.isidentifier() else set()


def keys_of(overrides: Sequence[str]) -> set[str]:
    """The full keys to which overrides give values; those in a dictionary count for themselves.

    Raises:
        HydraException: an override cannot be parsed.
    """
    keys: set[str] = set()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        value = override.value()
        inner = value if isinstance(value, dict) else ()
        keys |= {override.key_or_group, *(f"{override.key_or_group}.{name}" for name in inner)}
    return keys


def _is_new(word: str) -> bool:
    """Tell whether an override may name keys that are not there yet."""
    return (word[:1].isalpha() and word.partition("=")[2].startswith("{")) or word.lstrip("+").startswith(_OPEN)


def _readable(word: str) -> str:
    """Quote a value that hydra's grammar would refuse, such as a path with an equals sign, a tilde or an umlaut.

    Of values with commas between them, which a sweep may have, each is quoted for itself.
    """
    key, _, value = word.partition("=")
    if key in _HYDRA_PATHS:
        value = expanded(key, value)
    if re.fullmatch(_IPV6_ADDRESS, value):
        return f"{key}={_quoted(value)}"
    if not value or value[0] in "'\"[{" or "${" in value or re.fullmatch(r"\w+\(.*\)", value) or _is_read(f"{key}={value}"):
        return f"{key}={value}" if value else word
    values = [value] if "(" in value else value.split(",")
    quoted = f"{key}={','.join(each if _is_read(f'{key}={each}') else _quoted(each) for each in values)}"
    return quoted if _is_read(quoted) else word


def _quoted(value: str) -> str:
    text = value.replace("'", "\\'")
    return f"'{text}\\'" if text.endswith("\\") else f"'{text}'"


def _is_read(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True
