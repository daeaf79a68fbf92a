"""Conversion of outside values, from YAML or a command line, to the types that options are annotated with."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ormo_rpc.options.section import Section
from ormo_rpc.options.target import TARGET, Target

S = TypeVar("S", bound=Section)
_ACCEPTED: Mapping[type, tuple[type, ...]] = {
    bool: (),
    int: (int, str),
    float: (int, float, str),
    str: (str, int, float, PurePath),
}
"""The types that are converted to each type; a boolean is made of the words below only."""
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def build(section: type[S], values: Mapping[str, Any], convert_section: Callable[[str, Any, Any, Any], Any] | None = None) -> S:
    """Make a section of values given by name.

    Args:
        section: The class.
        values: The values that differ from the defaults.
        convert_section: From (key, annotation, value, default) to the value of a field that is a section itself.

    Raises:
        ValueError: a name is unknown, or a value has the wrong type or is out of range: one line with the full key.
    """
    fields = section.declared()
    for name in values:
        if name not in fields:
            raise ValueError(refuse_key(section.PATH, str(name), fields, getattr(section, "name", "")))
    kinds = annotations_of(section)
    made: dict[str, Any] = {}
    for name, field in fields.items():
        key = section.key(name)
        if name in values and convert_section is not None and is_section(kinds[name]):
            made[name] = convert_section(key, kinds[name], values[name], field.default_factory)
        elif name in values:
            made[name] = _converted(key, field, kinds[name], values[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{key}: got nothing, expected {in_words(kinds[name])}")
    return section(**made)


def is_section(kind: Any) -> bool:
    """Tell whether an annotation is a class of sections."""
    return isinstance(kind, type) and issubclass(kind, Section)


def annotations_of(section: type[Section]) -> dict[str, Any]:
    """Return the annotation of each option, base classes first.

    Raises:
        ValueError: one cannot be evaluated, which can happen to a class from outside of the package.
    """
    options, found = section.declared(), dict[str, Any]()
    try:
        for cls in reversed(section.__mro__):
            # Those of other attributes are left alone: PyTorch, which they may name, is slow to load.
            texts = {name: text for name, text in vars(cls).get("__annotations__", {}).items() if name in options}
            found |= get_type_hints(types.SimpleNamespace(__annotations__=texts), vars(sys.modules[cls.__module__]))
        return found
    except Exception as error:  # an annotation may be any expression
        raise ValueError(
            f"{section.PATH}: the annotations of {section.__module__}.{section.__qualname__} cannot be evaluated: {error}"
        ) from None


def _converted(key: str, field: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    try:
        return convert(value, kind)
    except (TypeError, ValueError):
        expected = field.metadata.get("expected") or in_words(kind)
        if Enum in getattr(_without_none(kind), "__mro__", ()):
            expected = in_words(kind)
        raise ValueError(f"{key}: got {value!r}, expected {expected}") from None


def convert(value: Any, kind: Any) -> Any:
    """Convert a value to an annotation: a text to a number or a member of an enumeration, the entries of a list, and so on.

    Raises:
        TypeError, ValueError: it is no such value.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _first_that_fits(value, inner)
    if origin in (list, tuple, Sequence):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise TypeError
        items = [convert(item, inner[0]) for item in value]
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError
        return {convert(key, inner[0]): convert(item, inner[1]) for key, item in value.items()}
    return _scalar(value, kind) if isinstance(kind, type) else value


def in_words(kind: Any) -> str:
    """Say what an annotation allows, for an error message."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(each) for each in inner)
    if origin in (list, tuple, Sequence):
        return "a list"
    if origin in (dict, Mapping):
        return "keys with their values"
    if kind is Target:
        return f"keys with a {TARGET} among them"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(_written(member) for member in kind)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def plain(key: str, value: Any) -> Any:
    """Return the plain value (null, truth, number, text, list, keys with values) that `convert` reads back as this one.

    Raises:
        ValueError: there is none.
    """
    if isinstance(value, Enum):
        return _written(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Target):
        return plain(key, value.values())
    if isinstance(value, Mapping):
        return {each if isinstance(each, int) else str(each): plain(key, item) for each, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(key, item) for item in value]
    raise ValueError(f"{key}: got {value!r}, expected a plain value, one that config.yaml can hold")


def refuse_key(path: str, name: str, known: Iterable[str], owner: str = "") -> str:
    """Say that a key is unknown, and which one may be meant.

    Args:
        path: The section where it came.
        name: The key in that section.
        known: The keys that there are.
        owner: The name of the part that they belong to, if it is one.
    """
    names = [each for each in known if each != "name" and not each.startswith("_")]
    prefix = f"{path}." if path else ""
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"{prefix}{name}: got an unknown key; did you mean {prefix}{close[0]}?"
    if not names:
        return f"{prefix}{name}: got an unknown key, {owner or path} has no options"
    return f"{prefix}{name}: got an unknown key, expected one of {', '.join(names)}{f' (of {owner})' if owner else ''}"


def _scalar(value: Any, kind: type) -> Any:
    if issubclass(kind, Enum):
        return _member(kind, value)
    if issubclass(kind, PurePath):
        return kind(value)
    if kind is Target:
        return Target.of(value)
    if kind is bool and str(value).lower() in _BOOLEANS:
        return _BOOLEANS[str(value).lower()]
    if kind not in _ACCEPTED:
        return value
    if not isinstance(value, _ACCEPTED[kind]) or (isinstance(value, bool) and kind is not str):
        raise TypeError
    return kind(value)


def _first_that_fits(value: Any, kinds: Sequence[Any]) -> Any:
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is not type(None):
            try:
                return convert(value, kind)
            except (TypeError, ValueError):
                pass
    raise TypeError


def _without_none(kind: Any) -> Any:
    rest = [each for each in get_args(kind) if each is not type(None)]
    return rest[0] if get_origin(kind) in (Union, types.UnionType) and len(rest) == 1 else kind


def _member(kind: type[Enum], value: Any) -> Enum:
    for member in kind:
        if value is member or value in (member.value, member.name):
            return member
    raise ValueError


def _written(member: Enum) -> str:
    return member.value if isinstance(member.value, str) else member.name
