"""Runs that survive the death of the command that makes them: each has a folder with its attempts, ``0``, ``1``, and so on.

An attempt is a run directory. One that was interrupted, or killed, is continued by the next one from its newest checkpoint; a
simulation then goes on exactly as it would have.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common import write_results
from ormo_rpc import train
from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.environment import environment
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import TRACE, rows_so_far
from ormo_rpc.storage.summary import TERMINAL_STATUSES, read_summary

SETTINGS = "overrides.json"
"""The overrides of a run, in its folder."""
_RESUME = "checkpoint.resume="


@dataclass(frozen=True)
class ResumableRun:
    """A run, finished or not.

    Attributes:
        folder: Its folder.
        overrides: Those that determine its result.
        version: A digest of what else determines it; empty for nothing.
    """

    folder: Path
    overrides: Sequence[str]
    version: str = ""

    @property
    def attempts(self) -> list[Path]:
        """The run directories of its attempts, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))

    @property
    def summary(self) -> dict[str, Any] | None:
        """The content of ``summary.json``; None while the run has not ended by itself."""
        for attempt in self.attempts[-1:]:
            found = read_summary(attempt)
            if found is not None and found["status"] in TERMINAL_STATUSES:
                return found
        return None

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Versions and processors of the attempts that its result is from, by their traces; of this process if there is none.

        Those that differ in the commit alone are one, the newest; the last is that of the newest attempt.
        """
        own, parts = environment(), list[tuple[int, dict[str, Any]]]()
        for attempt in self.attempts:
            with contextlib.suppress(OSError, ValueError, KeyError), (attempt / TRACE).open(encoding="utf-8") as trace:
                header = json.loads(trace.readline())
                begin = _begin(attempt)
                parts = [(former, each) for former, each in parts if former < begin]  # of others nothing is left
                parts.append((begin, {key: header[key] for key in own}))
        found = dict[str, dict[str, Any]]()
        for _, each in parts:
            name = json.dumps({key: value for key, value in each.items() if key != "commit"})
            found.pop(name, None)
            found[name] = each
        return [*found.values()] or [own]

    @property
    def words(self) -> Sequence[str]:
        """The overrides that its newest attempt was started with, those that do not matter for its result among them."""
        for attempt in reversed(self.attempts):
            with contextlib.suppress(ConfigError):
                return Launch.read(attempt).overrides
        return ()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl over all attempts; what an attempt computed again replaces what was lost.

        An attempt that was killed may have none, and half a line at the end.
        """
        rows: list[dict[str, Any]] = []
        for attempt in self.attempts:
            try:
                own = rows_so_far(attempt)
            except FileNotFoundError:
                continue
            begin = _begin(attempt)
            rows = [row for row in rows if row["iteration"] <= begin] + own
        return rows

    def go_on(self, *more: str) -> dict[str, Any]:
        """Begin the run, or go on where its last attempt was, and return the summary.

        Args:
            more: Overrides that do not matter for the result, such as the folder of the data.

        Raises:
            ConfigError: its folder has a run with other overrides, or these are wrong.
            RunFailed: it was interrupted.
        """
        attempts = self.attempts
        self._claim()
        source = next((found for path in reversed(attempts) if (found := checkpoint.newest(path)) is not None), None)
        resume = () if source is None else (f"{_RESUME}{source.absolute()}",)
        number = int(attempts[-1].name) + 1 if attempts else 0
        return train([*self.overrides, *more, *resume], run_dir=self.folder / str(number))

    def _claim(self) -> None:
        """Write what determines its result, or compare with what the folder was made with.

        Raises:
            ConfigError: that was something else.
        """
        file = self.folder / SETTINGS
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_results(file, json.dumps(self._settings, indent=1) + "\n")
        self.check()

    def check(self) -> None:
        """Compare with what its folder was made with, if there is one.

        Raises:
            ConfigError: that was something else.
        """
        file = self.folder / SETTINGS
        former: list[str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else self._settings
        differing = sorted({*former} ^ {*self._settings})
        if differing:
            raise ConfigError(
                f"{self.folder}: got a run that differs in {', '.join(differing)}, expected one with the same settings; "
                "remove the folder, or work in another one"
            )

    @property
    def _settings(self) -> list[str]:
        return [*self.overrides, *([f"version={self.version}"] if self.version else [])]


@contextlib.contextmanager
def alone(work: Path) -> Generator[int]:
    """Refuse to work in a folder in which another command works; the lock ends with the process.

    Gives the file descriptor of the lock: with processes that inherit it, the lock ends with the last of them.

    Raises:
        ConfigError: one does.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{work}: got a folder in which another command works; wait for its end, or end it") from None
        yield lock.fileno()


def _begin(attempt: Path) -> int:
    """The iteration of the checkpoint from which an attempt went on; 0 for one that began anew."""
    source = next((word for word in Launch.read(attempt).overrides if word.startswith(_RESUME)), None)
    return 0 if source is None else checkpoint.iteration_of(Path(source.removeprefix(_RESUME)))


def main() -> int:
    """Go on with one run, as `experiments.at_once` asks for it: folder, overrides and further ones, as JSON."""
    asked = json.loads(sys.argv[1])
    try:
        ResumableRun(Path(asked["folder"]), asked["overrides"], asked["version"]).go_on(*asked["more"])
    except (ConfigError, RunFailed) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
