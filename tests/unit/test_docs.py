"""The code in the pages exists: files, names, keys, links, commands; and the README stays short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support import recipes
from tests.support.pages import ROOT, broken_links, commands, missing_paths, refusal, unknown_names, wrong_steps
from tests.unit.test_layers import LAYERS

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "experiments", "tests")),
    *sorted((ROOT / "docs").glob("*.md")),
]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@every_page
def test_paths_in_a_page_exist(page: Path) -> None:
    assert missing_paths(page.read_text("utf-8")) == set()


@every_page
def test_dotted_names_in_a_page_exist(page: Path) -> None:
    assert unknown_names(page.read_text("utf-8")) == set()


@every_page
def test_steps_through_the_files_are_those_of_the_code(page: Path) -> None:
    assert wrong_steps(page.read_text("utf-8")) == set()


@every_page
def test_links_in_a_page_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text("utf-8")) == set()


@every_page
def test_commands_in_a_page_can_be_typed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes.install(monkeypatch)
    found = {shlex.join(command): refusal(command) for command in commands(page.read_text("utf-8"))}
    assert {command: reason for command, reason in found.items() if reason is not None} == {}


def test_the_readme_can_be_read_in_a_sitting() -> None:
    words = (ROOT / "README.md").read_text("utf-8").split()
    assert sum(any(letter.isalpha() for letter in word) for word in words) <= 1650  # numbers of tables are no words


def test_the_page_on_architecture_has_the_packages_in_the_order_of_their_imports() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    first_cells = re.findall(r"^\| (`.*?) \|", page.partition("## The way of one push")[0], re.MULTILINE)
    named = [name for cell in first_cells for name in re.findall(r"`(\w+)(?:/|\.py)`", cell)]
    assert named == list(LAYERS)


def test_faults_planted_in_a_page_are_found() -> None:
    text = (
        "See `ormo_rpc/nowhere.py`, `ormo_rpc/server/`, `ParameterServer.no_such`, `ParameterServer.receive`, `train.no_such`, "
        "`train.lr`, `torch.no_such`, `torch.distributed.rpc`, `no_such_file.md`, `summary.json`, `results/scale.{md,txt}`, "
        "[a](nowhere.md), [b](guarantees.md#no-such-heading), [c](guarantees.md#times), [d](https://example.org/nowhere).\n"
        "```\npython launch.py algorithm=no_such\npython launch.py -m workers=2,3 seed=0  # fine\nmake nothing\nmake test\n"
        "python -m experiments.no_such\npython examples/no_such.py\n```\n"
        "```\nworker.py Worker.compute   the gradient\n  worker.py Worker.no_such\n  worker.py Service.push\n"
        "  server/worker.py Worker.compute\n```\n"
    )
    assert wrong_steps(text) == {"worker.py Worker.no_such", "worker.py Service.push", "server/worker.py Worker.compute"}
    assert missing_paths(text) == {"ormo_rpc/nowhere.py", "examples/no_such.py"}
    assert unknown_names(text) == {"ParameterServer.no_such", "train.no_such", "torch.no_such", "no_such_file.md"}
    assert broken_links(ROOT / "docs" / "planted.md", text) == {"nowhere.md", "guarantees.md#no-such-heading"}
    found = {shlex.join(command): refusal(command) is None for command in commands(text)}
    assert found == {
        "python launch.py algorithm=no_such": False,
        "python launch.py -m workers=2,3 seed=0": True,
        "make nothing": False,
        "make test": True,
        "python -m experiments.no_such": False,
        "python examples/no_such.py": False,
    }
