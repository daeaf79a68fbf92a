"""The files of ``conf/`` that say what can be set, written from the schema: ``python -m ormo_rpc.config.write_conf``."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ormo_rpc
from ormo_rpc import console
from ormo_rpc.config.schema import GROUPS, Config
from ormo_rpc.options import CallsTarget, Part, Section, parts
from ormo_rpc.options.instantiate import base_of
from ormo_rpc.options.values import plain

SETTINGS = "settings.yaml"
"""The file of all keys outside of the groups."""


def conf_dir() -> Path:
    """The folder ``conf``: inside the package where it was installed as a wheel, beside it in a checkout."""
    package = Path(ormo_rpc.__file__).parent
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())


def summary_of(section: type[Section]) -> str:
    """The first line of a class's docstring."""
    return (section.__doc__ or section.__name__).splitlines()[0].removesuffix(".")


def options_of(section: type[Section]) -> Iterator[tuple[str, Any, str]]:
    """The name, the default as a plain value, and the meaning of each option."""
    if issubclass(section, CallsTarget):
        return
    for field in section.declared().values():
        if field.metadata and field.name != "name":
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            yield field.name, plain(section.key(field.name), default), field.metadata.get("doc", "")


def sections() -> Iterator[tuple[str, str, type[Section]]]:
    """Every section: its place in the tree ("" for the root), the name of the part if it is one, and its class."""
    yield "", "", Config
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            for name, part in parts(field.name).items():
                yield field.name, name, part
        elif not field.metadata:
            section: Any = field.default_factory
            yield field.name, "", section


def rendered() -> Mapping[str, str]:
    """The text of each file by its path below ``conf/``."""
    files = {SETTINGS: "\n".join(_settings()) + "\n"}
    for group in GROUPS:
        for name, part in parts(group).items():
            files[f"{group}/{name}.yaml"] = "\n".join(_part(part)) + "\n"
    return files


def write() -> list[str]:
    """Write the files that differ, remove those of parts that no longer exist, and return their paths below ``conf/``."""
    folder, files = conf_dir(), rendered()
    stale = [path for group in GROUPS for path in (folder / group).glob("*.yaml") if f"{group}/{path.name}" not in files]
    changed = [name for name, text in files.items() if not (folder / name).is_file() or (folder / name).read_text() != text]
    for path in stale:
        path.unlink()
    for name in changed:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(files[name])
    return [*changed, *(str(path.relative_to(folder)) for path in stale)]


def _part(part: type[Part]) -> Iterator[str]:
    yield f"# {summary_of(part)}."
    yield f"name: {part.name}"
    if part.PATH != "runtime":  # which is a module of this package, too
        yield _line("_target_", None, _outside(part))
    for option in options_of(part):
        yield _line(*option)


def _outside(part: type[Part]) -> str:
    if any(issubclass(each, CallsTarget) for each in parts(part.PATH).values()):
        return "your own instead: the dotted path of a function or class, with its keywords beside it"
    base = base_of(part)
    package = base.__module__.rpartition(".")[0]
    module = package if getattr(sys.modules[package], base.__name__, None) is base else base.__module__
    return f"your own instead: the dotted path of a subclass of {module}.{base.__name__}"


def _settings() -> Iterator[str]:
    yield "# The keys outside of the groups."
    for path, part, section in sections():
        if part:
            continue
        if path:
            yield ""
            yield f"{path}:  # {summary_of(section)}."
        for option in options_of(section):
            yield f"{'  ' if path else ''}{_line(*option)}"


def _line(key: str, value: Any, doc: str) -> str:
    return f"{key}: {_scalar(value)}  # {doc}"


def _scalar(value: Any) -> str:
    """A value as YAML on one line; quoted only where it has to be."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_./][\w./-]*", value) and value not in ("null", "true", "false"):
        return value
    return json.dumps(value)


def main() -> None:
    """Bring ``conf/`` up to date."""
    console.install()
    for name in write():
        sys.stdout.write(f"conf/{name}\n")


if __name__ == "__main__":
    main()
