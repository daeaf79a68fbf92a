"""The choice of a learning rate in the experiments: by validation or training loss, never by the test split."""

from __future__ import annotations

import math
from typing import Any

import pytest

from experiments import common, when_it_pays


def test_the_lowest_score_that_counts_is_chosen() -> None:
    assert common.best({0.1: None, 0.2: 3.0, 0.3: math.inf, 0.4: 2.0, 0.5: math.nan}) == 0.4
    assert common.best({0.1: 0.0, 0.2: -1.0}) == 0.2


@pytest.mark.parametrize("score", [None, math.inf])
def test_nothing_is_chosen_where_no_run_counts(score: float | None) -> None:
    with pytest.raises(SystemExit, match=r"^no learning rate of 0\.1, 0\.2 can be chosen: no run of any of them counts$"):
        common.best({0.1: score, 0.2: score})


def test_when_it_pays_is_tuned_on_the_validation_split_and_reports_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate that is best on the test split is not the one that is best on the validation split."""
    times = {rate: (float(number), float(len(when_it_pays.RATES) - number)) for number, rate in enumerate(when_it_pays.RATES)}

    def run(setting: str, scheduler: str, lr: float, seed: int) -> dict[str, Any]:  # noqa: ARG001 - those of the experiment
        return dict(zip((when_it_pays.TIME, when_it_pays.TUNING_TIME), times[lr], strict=True))

    class Bar:
        def update(self) -> None:
            pass

    monkeypatch.setattr(when_it_pays, "run", run)
    row = when_it_pays.case("none", "sync", Bar())  # pyright: ignore[reportArgumentType] # the part of a bar that is used
    assert row["lr"] == when_it_pays.RATES[-1]
    assert when_it_pays.mean_time(row["runs"]) == len(when_it_pays.RATES) - 1


def test_a_run_of_when_it_pays_holds_out_samples_and_has_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(when_it_pays, "EPOCHS", 2)
    monkeypatch.setattr(when_it_pays, "TARGET", 0.5)
    found = when_it_pays.run("none", "async", 0.03, 0)
    assert found["val_accuracy"] is not None
    assert found["test_accuracy"] != found["val_accuracy"]
    # 36 gradients an epoch (of 1150 samples in batches of 32), 8 each 0.1 s: epochs end with the 5th and the 9th round.
    assert {found[when_it_pays.TIME], found[when_it_pays.TUNING_TIME]} <= {0.5, 0.9}
