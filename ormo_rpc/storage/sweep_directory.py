"""The outcome of each job of a sweep: one file for each, since jobs may run in other processes or on other machines."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ormo_rpc.storage.run_directory import write_json

_FOLDER = ".jobs"
_PLAN, _STOPPED = "plan.json", "stopped"
RUNNING, FAILED, INTERRUPTED = "running", "failed", "interrupted"
"""Values of a job's status beside those of a summary."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """The outcome of a job.

    Attributes:
        number: Of the job, from 0.
        settings: What is particular to it, as on the command line.
        directory: Its run directory.
        status: That of its summary; ``running`` until its end, ``failed`` also where it was refused.
        reason: Why it failed.
        metric: The entry of its summary that is optimised.
        value: Its value, where it is a finite number.
        higher_is_better: Whether a larger one is better; None where there is no telling.
    """

    number: int
    settings: str
    directory: str
    status: str = RUNNING
    reason: str | None = None
    metric: str | None = None
    value: float | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The jobs that a sweep is going to have.

    Attributes:
        jobs: Their number; None where it is not known before.
        keys: The keys in which they differ.
    """

    jobs: int | None = None
    keys: Sequence[str] = ()


class SweepDirectory:
    """The records in the directory of a sweep.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = path / _FOLDER

    @classmethod
    def below(cls, path: Path) -> list[Self]:
        """List the sweeps at a path and below it."""
        return [cls(folder.parent) for folder in sorted(path.rglob(_FOLDER))]

    def begin(self, plan: Plan) -> None:
        """Write the plan, and forget an earlier sweep of the same directory."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        write_json(self._folder / _PLAN, dataclasses.asdict(plan))

    def plan(self) -> Plan:
        """Read the plan."""
        file = self._folder / _PLAN
        return Plan(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else Plan()

    def stop(self) -> None:
        """Have jobs that have not begun yet, such as those in the queue of a cluster, end at once."""
        (self._folder / _STOPPED).touch()

    @property
    def stopped(self) -> bool:
        """True once `stop` was called, also in another process."""
        return (self._folder / _STOPPED).exists()

    def write(self, record: JobRecord) -> None:
        """Replace a job's record."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / f"{record.number}.json", dataclasses.asdict(record))

    def records(self) -> list[JobRecord]:
        """Read the records of all jobs that have begun, in their order."""
        files = (file for file in self._folder.glob("*.json") if file.stem.isdigit())
        contents: list[dict[str, Any]] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return sorted((JobRecord(**content) for content in contents), key=lambda record: record.number)
