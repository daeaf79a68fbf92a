"""The examples of the pages on extending and on tasks are trained as they stand there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ormo_rpc import train
from ormo_rpc.options.part import PACKAGES
from tests.support import recipes

COMMANDS = recipes.overrides()


@pytest.mark.parametrize("overrides", COMMANDS, ids=lambda overrides: [word for word in overrides if "_target_" in word][-1])
def test_a_part_from_outside_of_the_package_trains(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes.install(monkeypatch)
    quiet = [] if any(word.startswith("logger.") for word in overrides) else ["logger=none"]
    summary = train(
        [*overrides, *quiet, "runtime=sim", "train.max_iterations=20", "train.lr=0.005", "logger.progress=false"],
        run_dir=tmp_path,
    )
    assert summary["status"] == "completed"
    assert summary["iterations"] == 20


def test_the_page_shows_a_part_of_each_group_but_those_that_have_no_recipe() -> None:
    shown = {word.partition("._target_")[0].lstrip("+") for overrides in COMMANDS for word in overrides if "_target_" in word}
    assert set(PACKAGES) - shown == {"compression", "runtime"}
