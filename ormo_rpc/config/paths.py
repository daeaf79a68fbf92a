"""Paths in a configuration: relative ones are meant from where the command was started, ``~`` is the home directory."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
from pathlib import Path
from typing import Any, TypeVar

from ormo_rpc.errors import ConfigError
from ormo_rpc.options import Section

S = TypeVar("S", bound=Section)


def located(section: S, start: Path) -> S:
    """Return a configuration whose paths lead to the same places from this process's directory, and from its children's.

    Args:
        section: The configuration, or a section of it.
        start: The directory where the command was started. Where it is this process's still, relative paths stay as they are.

    Raises:
        ConfigError: a path begins with the home directory of nobody, or cannot be read.
    """
    changed: dict[str, Any] = {}
    for name, field in section.declared().items():
        value = getattr(section, name)
        if isinstance(value, Section):
            inner = located(value, start)
            if inner is not value:
                changed[name] = inner
        elif field.metadata.get("path") and value is not None:
            path = _located(section.key(name), str(value), start)
            if path != value:
                changed[name] = path
    return dataclasses.replace(section, **changed) if changed else section  # pyright: ignore[reportArgumentType] # every subclass is a dataclass


def typed(path: str) -> Path:
    """Read a path on the command line of a module: a shell leaves the ``~`` of ``--out=~/runs`` as it is.

    Raises:
        ArgumentTypeError: it is the home directory of nobody.
    """
    try:
        return Path(expanded("PATH", path))
    except ConfigError as error:  # of which argparse would not show the message
        raise argparse.ArgumentTypeError(str(error)) from None


def expanded(key: str, path: str) -> str:
    """Replace a ``~`` at the beginning of a path.

    Raises:
        ConfigError: it is the home directory of nobody.
    """
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise ConfigError(f"{key}: got {path!r}, whose home directory is not known; write the whole path") from None


def _located(key: str, path: str, start: Path) -> str:
    path = expanded(key, path)
    place = path if Path(path).is_absolute() or start.resolve() == Path.cwd() else str(start / path)
    try:
        readable = os.R_OK | (os.X_OK if Path(place).is_dir() else 0)
        if Path(place).exists() and not os.access(place, readable):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:  # what is not there may have to be made, or is refused by its reader, who knows what to do
        raise ConfigError(f"{key}: {place} cannot be read: {error.strerror}") from None
    return place
