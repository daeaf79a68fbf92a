"""The live race: what is made of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import live_race
from benchmarks.measuring import conditions
from ormo_rpc.composing import compose


def run(number: int, contender: str, seconds: float | None) -> dict[str, Any]:
    return {
        "round": number,
        "contender": contender,
        "lr": 0.01,
        "seconds": seconds,
        "updates_per_second": 100.0,
        "gradients": None if seconds is None else 500,
        "test_accuracy": 0.9,
        "status": "completed",
    }


def test_ratios_are_within_rounds_in_which_both_have_reached_the_target() -> None:
    runs = [run(0, "ddp", 40.0), run(0, "ormo", 10.0), run(1, "ormo", 9.0), run(1, "ddp", None), run(2, "ddp", 30.0)]
    runs.append(run(2, "ormo", 6.0))
    assert live_race.ratios(runs, "ormo", "ddp") == [0.25, 0.2]
    content = {**conditions(), "overrides": ["model=cnn"], "target": 0.9, "every": 50, "smooth": 3, "runs": runs}
    text = live_race.as_text({**content, "load_at_end": content["load_at_start"]})
    assert "| ddp | 0.01 | 35.0 (30.0 - 40.0) | 1.000 (1.000 - 1.000) | 500 (500 - 500) | 100 (100 - 100) | 2 of 3 |" in text
    assert "| ormo | 0.01 | 9.0 (6.0 - 10.0) | 0.225 (0.200 - 0.250) | 500 (500 - 500) | 100 (100 - 100) | 3 of 3 |" in text


def test_runs_of_the_same_setting_are_kept(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        **conditions(),
        "overrides": ["model=cnn"],
        "target": 0.9,
        "every": 50,
        "smooth": 3,
        "tuning": {"ddp": {}},
    }
    content |= {"runs": [run(0, "ddp", 40.0)], "load_at_end": content["load_at_start"]}
    content["versions"]["commit"] = "abc"
    assert live_race.kept(content, tmp_path) == {}
    live_race.write(content, tmp_path)
    assert live_race.kept(content, tmp_path) == {"tuning": {"ddp": {}}, "runs": content["runs"]}
    assert live_race.kept({**content, "target": 0.8}, tmp_path) == {}
    assert live_race.kept({**content, "versions": {**content["versions"], "commit": "def"}}, tmp_path) == {}
    content["versions"]["commit"] = "abc+changes"  # the same again, but perhaps after further changes
    live_race.write(content, tmp_path)
    assert live_race.kept(content, tmp_path) == {}


def test_missing_runs_are_run_and_the_order_alternates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, float, int]] = []

    def made(self: live_race.Race, contender: live_race.Contender, lr: float, seed: int) -> dict[str, Any]:
        order.append((self.overrides[0], lr, seed))
        return run(seed, "ddp" if contender.evaluates else "ormo", 1.0)

    monkeypatch.setattr(live_race.Race, "run", made)
    race = live_race.Race(overrides=["model=cnn"], target=0.9, every=50, smooth=3)
    content: dict[str, Any] = {
        **conditions(),
        "overrides": ["model=cnn"],
        "target": 0.9,
        "every": 50,
        "smooth": 3,
        "tuning": {},
    }
    content |= {"runs": [run(0, "ddp", 40.0)]}
    content["versions"]["commit"] = "abc"
    chosen = {"ddp": (live_race.CONTENDERS["ddp"], 0.04), "ormo": (live_race.CONTENDERS["ormo"], 0.01)}
    live_race.run_rounds(race, chosen, 3, content, tmp_path)
    words = "model=cnn"
    assert order == [(words, 0.01, 0), (words, 0.01, 1), (words, 0.04, 1), (words, 0.04, 2), (words, 0.01, 2)]
    expected = [(number, name) for number in range(3) for name in ("ddp", "ormo")]
    assert [(each["round"], each["contender"]) for each in live_race.kept(content, tmp_path)["runs"]] == expected


def test_learning_rates_are_given_by_contender() -> None:
    assert live_race.rates(["ormo=0.01,0.02", "ddp=0.04"]) == {"ormo": [0.01, 0.02], "ddp": [0.04]}
    with pytest.raises(ValueError, match=r"\A--lr: got 'sgd', expected one of ddp, .*, as in ormo=0\.01,0\.02\Z"):
        live_race.rates(["sgd=1"])
    with pytest.raises(ValueError, match=r"\A--lr: got 'ddp=fast', expected numbers after ddp, as in ddp=0\.01,0\.02\Z"):
        live_race.rates(["ddp=fast"])


def test_a_wrong_learning_rate_ends_the_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["live_race", "--lr", "ddp"])
    with pytest.raises(SystemExit, match="2"):
        live_race.main()
    assert capsys.readouterr().err.endswith("error: --lr: got 'ddp', expected numbers after ddp, as in ddp=0.01,0.02\n")


@pytest.mark.parametrize("name", live_race.CONTENDERS)
def test_every_contender_can_run_live_and_simulated(name: str) -> None:
    contender = live_race.CONTENDERS[name]
    assert compose(contender.live).runtime.name == ("ddp" if contender.evaluates else "rpc")
    assert compose(["runtime=sim", *contender.simulated]).runtime.name == "sim"
