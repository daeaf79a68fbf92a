"""The tests that docs/guarantees.md and SECURITY.md name exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "guarantees.md"
SECURITY = TESTS.parent / "SECURITY.md"


def named(text: str) -> set[str]:
    """Find the names of tests in a text."""
    return set(re.findall(r"`(test_\w+)`", text))


@functools.cache
def defined() -> set[str]:
    """Find the functions of all tests."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in TESTS.rglob("test_*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if function.name.startswith("test_")}


@pytest.mark.parametrize("page", [PAGE, SECURITY], ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert named(text) - defined() == set()
    assert [file for file in re.findall(r"`(test_\w+\.py)`", text) if not list(TESTS.rglob(file))] == []


def test_every_guarantee_of_the_page_names_a_test() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert rows
    assert [number for number, row in rows if not named(row)] == []


def test_a_name_that_no_test_has_is_found() -> None:
    assert named("held by `test_a_name_that_no_test_has_is_found` and `test_nothing_of_the_kind`") - defined() == {
        "test_nothing_of_the_kind"
    }
