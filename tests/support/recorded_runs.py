"""Directories of short runs as they would have been recorded, and the report's groups of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ormo_rpc.config.parsing import parse_config, save_config
from ormo_rpc.report.runs import Group, Run, group_by_setting
from ormo_rpc.report.table import rows
from ormo_rpc.storage.summary import Summary, identity, write_summary


def record(folder: Path, values: dict[str, Any] | None = None, seed: int = 0, **more: Any) -> Path:
    """Write the directory of a short run: configuration, summary, and one gradient in its trace."""
    folder.mkdir(parents=True)
    config = parse_config({"workers": 4, **(values or {}), "seed": seed})
    save_config(config, folder / "config.yaml")
    header = {"event": "header", "version": 1, "commit": "c0ffee", "torch": "2", "cpu": "one", **more.pop("header", {})}
    event = {"event": "apply", "seconds": 0.5, "loss": 1.0, "iteration": 0, "worker": 0, "ticket": 0, "stamp": 0, "delay": 0}
    (folder / "trace.jsonl").write_text(f"{json.dumps(header)}\n{json.dumps(event)}\n")
    (folder / "metrics.jsonl").write_text("")
    figures = {"status": "completed", "iterations": 1, "epochs": 0.5, "test_accuracy": 0.5, "training_seconds": 1.0}
    write_summary(folder, Summary.from_dict({**identity(config), **figures, **more}))
    return folder


def grouped(*folders: Path) -> list[Group]:
    return group_by_setting(Run.load(folder) for folder in folders)


def cells(groups: list[Group]) -> list[dict[str, str]]:
    header, *body = rows(groups)
    return [dict(zip(header, row, strict=True)) for row in body]
