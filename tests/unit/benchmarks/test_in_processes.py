"""Calls in processes of their own, several at once."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from experiments.common import in_processes


def made(number: int, folder: Path) -> str:
    (folder / str(number)).touch()
    if number == 2:
        raise ValueError("of the third")
    return f"call {number}"


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_item_comes_with_what_became_of_its_call(jobs: int, tmp_path: Path) -> None:
    ended = {
        item: done.exception() or done.result()
        for item, done in in_processes(functools.partial(made, folder=tmp_path), range(5), jobs)
    }
    assert {item: str(told) for item, told in ended.items()} == {
        **{number: f"call {number}" for number in (0, 1, 3, 4)},
        2: "of the third",
    }


def test_no_further_call_is_begun_after_the_loop_over_them_has_ended(tmp_path: Path) -> None:
    calls = in_processes(functools.partial(made, folder=tmp_path), range(8), 1)
    next(calls)
    calls.close()
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
