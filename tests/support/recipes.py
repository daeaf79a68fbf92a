"""The code of the pages on extending and on tasks as modules that can be imported: what is tested is what stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.pages import ROOT, commands

PAGES: Mapping[str, Path] = {"my_module": ROOT / "docs" / "extending.md", "my_task": ROOT / "docs" / "tasks.md"}
"""Each page by its name for the reader's own module."""


def code(page: Path) -> str:
    """The imports, classes and functions of a page; no class is registered, as that would last for the process."""
    starts = r"(?:import |from |@|class |def )"
    blocks = re.findall(rf"^```python\n({starts}.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return "from __future__ import annotations\n\n" + re.sub(r"^@register\(.*\)\n", "", "\n\n".join(blocks), flags=re.MULTILINE)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pages' modules importable, and the programs in ``examples/``, for the length of a test."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    for name, page in PAGES.items():
        made = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made)
        exec(compile(code(page), str(page), "exec"), vars(made))  # noqa: S102 - our own page


def overrides() -> list[list[str]]:
    """The overrides of each command of the pages that names a part from outside."""
    found = [
        command
        for page in PAGES.values()
        for command in commands(page.read_text("utf-8"))
        if any("_target_=" in word for word in command)
    ]
    return [[word for word in command if "=" in word and not word.startswith("PYTHONPATH")] for command in found]
