"""The choice of a learning rate in the experiments: by validation or training loss, never by the test split."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from experiments import adamw, common, paper_methods

GRID = (0.003, 0.01, 0.03, 0.1, 0.3)


def test_the_lowest_score_that_counts_is_chosen() -> None:
    assert common.best({0.1: None, 0.2: 3.0, 0.3: math.inf, 0.4: 2.0, 0.5: math.nan}) == 0.4
    assert common.best({0.1: 0.0, 0.2: -1.0}) == 0.2


@pytest.mark.parametrize("score", [None, math.inf])
def test_nothing_is_chosen_where_no_run_counts(score: float | None) -> None:
    with pytest.raises(SystemExit, match=r"^no learning rate of 0\.1, 0\.2 can be chosen: no run of any of them counts$"):
        common.best({0.1: score, 0.2: score})


@pytest.mark.parametrize(
    ("optimum", "tried"),
    [
        (0.03, GRID),
        (1.0, (*GRID, 1, 3)),  # 3 is worse, so that 1 is at no edge any more
        (math.inf, (*GRID, 1, 3, 10)),
        (0.0, (0.0001, 0.0003, 0.001, *GRID)),
    ],
)
def test_a_grid_goes_on_while_the_best_is_at_its_edge(optimum: float, tried: tuple[float, ...]) -> None:
    scores = common.tuned(lambda lr: abs(lr - optimum) if math.isfinite(optimum) else -lr, GRID)
    assert [*scores] == [*tried]
    assert common.best(scores) == min(tried, key=lambda lr: abs(lr - optimum) if math.isfinite(optimum) else -lr)


def test_a_grid_does_not_go_on_where_runs_diverge() -> None:
    assert common.tuned(lambda lr: -lr if lr < 1 else None, GRID) == {**{lr: -lr for lr in GRID}, 1: None}
    with pytest.raises(SystemExit, match=r"^got the learning rates \[0.1, 0.2\], expected at least 3 above 0"):
        common.tuned(lambda lr: lr, (0.1, 0.2, 0.1))
    with pytest.raises(SystemExit, match=r"expected at least 3 above 0"):
        common.tuned(lambda lr: lr, (0.0, 0.1, 0.2))


@pytest.mark.parametrize(("module", "options"), [(paper_methods, ("--methods", "asgd")), (adamw, ("--methods", "adamw"))])
def test_an_experiment_runs_its_table_with_a_rate_beyond_its_grid(
    module: ModuleType, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Training and validation loss are lowest at 1, which neither grid has; the test split is best at 0.01."""

    def run(*arguments: Any) -> dict[str, Any]:
        lr, seed = arguments[-3:-1] if module is adamw else arguments[2:4]
        loss, off = abs(lr - 1.0), abs(lr - 0.01)
        losses = {"last_loss": loss, "val_loss": loss, "test_loss": off, "test_accuracy": 1 - off}
        return {**dict.fromkeys(module.KEYS, 2), **losses, "status": "completed", "seed": seed}

    monkeypatch.setattr(module, "run", run)
    name = module.__name__.removeprefix("experiments.")
    into = tmp_path / "new" / "folder"
    monkeypatch.setattr(sys, "argv", [name, *options, "--into", str(into)])
    module.main()
    rows = json.loads((into / f"{name}.json").read_text())["rows"]
    assert rows
    assert all(row["lr"] == 1.0 and {"0.3", "1.0", "3.0"} <= {*row["tuning"]} for row in rows)
    assert "and, while the best is at an edge, up to 3 beyond it" in (into / f"{name}.md").read_text()
