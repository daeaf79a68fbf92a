"""The start of a run, in ``launch.json`` of its run directory: what was typed, and the sweep that it belongs to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ormo_rpc.storage.run_directory import write_json

_FILE = "launch.json"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The start of a run.

    Attributes:
        overrides: What was typed, such as ``train.lr=0.1``.
        sweep: The name of the sweep that the run belongs to.
        job: The name of the job whose ranks have begun it, such as torchrun's ``--rdzv-id``.
        agent: The agent of torchrun that has started rank 0, by its name among all machines.
        script: The script, or with ``-m`` the module, of an own loop.
        arguments: Those of the script.
    """

    overrides: Sequence[str] = ()
    sweep: str | None = None
    job: str | None = None
    agent: str | None = None
    script: str | None = None
    arguments: Sequence[str] = ()

    def write(self, run_dir: Path) -> None:
        """Write it into the run directory, where there is something to say."""
        if self != Launch():
            write_json(run_dir / _FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Read it from a run directory; empty where nothing was written."""
        file = run_dir / _FILE
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if "torchrun" in values:  # the name of ``job`` in run directories of earlier versions
            values["job"] = values.pop("torchrun")
        return cls(**values)
