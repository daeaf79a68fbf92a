"""The committed results are those of the rules, defaults and schedules of today: none would be made otherwise now."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import common, look_ahead_nets, reproduce
from experiments.race.earlier import earlier_rows
from experiments.race.setup import LONG, RACE, TUNED_MOMENTUM, Race
from tests.support.pages import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("race", [RACE, LONG, TUNED_MOMENTUM], ids=lambda race: race.name)
def test_the_rows_of_a_race_count(race: Race) -> None:
    file = ROOT / "results" / f"{race.name}.json"
    results = common.read_results(file, ("rows",))
    assert results is not None
    assert len(earlier_rows(file, results, race.setup)) == len(results["rows"]) > 0


def test_the_rows_of_nets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows, _ = look_ahead_nets.earlier(look_ahead_nets.arguments([]))
    assert {net for net, found in rows.items() if found} == {*look_ahead_nets.NETS}


@pytest.mark.parametrize("words", [[], ["--full", "--device", "cuda"]], ids=["cpu", "cuda"])
def test_the_runs_of_the_paper_s_settings_count(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    found = reproduce.entries(reproduce.arguments([*words, "--work", str(tmp_path)]))
    assert any(entry["finished"] or entry["epochs_done"] for entry in found.values())
