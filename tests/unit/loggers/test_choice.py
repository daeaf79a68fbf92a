"""The choice of a logger: one from outside of the package by ``logger._target_``, and the former ``logger.mode=disabled``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from ormo_rpc import train
from ormo_rpc.config.renamed import refuse_renamed, translate_renamed
from ormo_rpc.errors import ConfigError
from ormo_rpc.loggers import Logger, RunInfo, RunLog
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.options import option


@dataclass(frozen=True, kw_only=True)
class CsvLogger(Logger):
    """Log the training loss to a file of comma-separated values."""

    file: str = option("loss.csv", "file in the run directory")

    @override
    def start(self, run: RunInfo) -> RunLog:
        return CsvLog(run.directory / self.file, run)


class CsvLog(RunLog):
    """A file of iterations and losses."""

    def __init__(self, path: Path, run: RunInfo) -> None:
        self.path = path
        self.lines = [f"{run.name},{run.config['seed']},{run.total_iterations}"]

    @override
    def log(self, row: Mapping[str, Any], statistics: Statistics) -> None:
        self.lines.append(f"{row['iteration']},{row['train_loss']}")

    @override
    def finish(self, summary: Mapping[str, Any]) -> None:
        self.path.write_text("\n".join([*self.lines, summary["status"]]))


def test_a_logger_of_ones_own_gets_the_run_its_rows_and_its_summary(tmp_path: Path) -> None:
    options = ("runtime=sim", "runtime.gradient=quadratic", "runtime.dimension=4", "workers=2", "seed=3")
    target = f"{__name__}.CsvLogger"
    summary = train(
        [*options, "train.max_iterations=40", f"logger._target_={target}", "+logger.file=mine.csv", "logger.log_seconds=1"],
        run_dir=tmp_path,
    )
    first, *rows, status = (tmp_path / "mine.csv").read_text().splitlines()
    assert (first, status) == ("ormo-async-2w-seed3,3,40", "completed")
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.split(",") for row in rows] == [[str(row["iteration"]), str(row["train_loss"])] for row in written]
    assert len(rows) >= 2
    assert rows[-1] == f"40,{summary['train_loss']}"


def test_the_former_way_to_disable_wandb_is_refused_and_read_in_recorded_runs() -> None:
    with pytest.raises(ConfigError, match=r"^logger\.mode: disabled was renamed; use logger=none$"):
        refuse_renamed(["seed=1", "logger.mode=disabled"])
    recorded = {"seed": 1, "logger": {"mode": "disabled", "project": "p", "progress": False, "log_seconds": 2.0}}
    assert translate_renamed(recorded)["logger"] == {"name": "none", "progress": False, "log_seconds": 2.0}
    assert translate_renamed({"logger": {"mode": "offline"}})["logger"] == {"mode": "offline"}
