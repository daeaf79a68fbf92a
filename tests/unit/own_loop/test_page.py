"""The page on own loops shows the changes that its example is made by."""

from __future__ import annotations

import difflib

from tests.support.pages import ROOT


def code_of(name: str) -> list[str]:
    """The lines of an example behind its docstring."""
    return (ROOT / "examples" / name).read_text().split('"""', 2)[2].splitlines()


def test_the_diff_in_the_page_is_that_of_the_examples() -> None:
    before, after = code_of("own_loop_before.py"), code_of("own_loop.py")
    diff = [line.rstrip() for line in list(difflib.unified_diff(before, after, lineterm="", n=1))[2:]]
    shown = (ROOT / "docs" / "own_loop.md").read_text("utf-8").partition("```diff\n")[2].partition("\n```")[0]
    assert shown.splitlines() == "\n".join(diff).rstrip().splitlines()


def test_both_scripts_are_short() -> None:
    for name in ("own_loop.py", "own_loop_before.py"):
        text = (ROOT / "examples" / name).read_text()
        assert len(text.splitlines()) < 100
        assert "95%" in text.partition('"""')[2].partition('"""')[0]
