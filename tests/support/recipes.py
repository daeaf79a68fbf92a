"""The recipes of ``docs/extending.md`` as a module that can be imported, so that the page's own code is what is tested."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest

from tests.support.pages import ROOT, commands

PAGE = ROOT / "docs" / "extending.md"
MODULE = "my_module"
"""The page's name for the reader's own module."""


def code() -> str:
    """The imports, classes and functions of the page; no class is registered, as that would last for the process."""
    starts = r"(?:import |@|class |def )"
    blocks = re.findall(rf"^```python\n({starts}.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return "from __future__ import annotations\n\n" + re.sub(r"^@register\(.*\)\n", "", "\n\n".join(blocks), flags=re.MULTILINE)


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Make the page's module importable, and the programs in ``examples/``, for the length of a test."""
    made = ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, made)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    exec(compile(code(), str(PAGE), "exec"), vars(made))  # noqa: S102 - our own page
    return made


def overrides() -> list[list[str]]:
    """The overrides of each command of the page that names a part from outside."""
    found = [command for command in commands(PAGE.read_text("utf-8")) if any("_target_=" in word for word in command)]
    return [[word for word in command if "=" in word and not word.startswith("PYTHONPATH")] for command in found]
