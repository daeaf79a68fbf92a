"""Sweeps in the process of a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

SHORT = ("runtime=sim", "logger=none", "workers=2", "train.epochs=1", "checkpoint.every_seconds=0")
SILENT = ("hydra/hydra_logging=none", "hydra/job_logging=none")

Launch = Callable[..., int]


def statuses(sweep: Path) -> dict[str, str]:
    """The status of each run by the name of its folder."""
    return {file.parent.name: json.loads(file.read_text())["status"] for file in sorted(sweep.glob("*/summary.json"))}
