"""The live race: what is made of its runs."""

from __future__ import annotations

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


def test_learning_rates_are_given_by_contender() -> None:
    assert live_race.rates(["ormo=0.01,0.02", "ddp=0.04"]) == {"ormo": [0.01, 0.02], "ddp": [0.04]}
    with pytest.raises(ValueError, match=r"\A--lr: got 'sgd', expected one of ddp, .*, as in ormo=0\.01,0\.02\Z"):
        live_race.rates(["sgd=1"])


@pytest.mark.parametrize("name", live_race.CONTENDERS)
def test_every_contender_can_run_live_and_simulated(name: str) -> None:
    contender = live_race.CONTENDERS[name]
    assert compose(contender.live).runtime.name == ("ddp" if contender.evaluates else "rpc")
    assert compose(["runtime=sim", *contender.simulated]).runtime.name == "sim"
