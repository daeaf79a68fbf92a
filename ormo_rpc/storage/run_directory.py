"""The run directory: every file of a run, and the only code that writes them (checkpoints apart)."""

from __future__ import annotations

import json
import math
import mmap
import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from ormo_rpc.errors import ConfigError
from ormo_rpc.server.events import Event

TRACE_VERSION = 1
"""The format of ``trace.jsonl``, in its header."""
_JSON = json.JSONEncoder(allow_nan=False, check_circular=False)  # json.dumps would make one for every line


class RunDirectory:
    """The files of one run; the trace and the metrics are kept open and flushed by `flush`.

    Args:
        path: The directory, made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._trace = self._open("trace.jsonl")
        self._metrics = self._open("metrics.jsonl")

    @staticmethod
    def claim(path: Path) -> None:
        """Make a run directory, for this run alone.

        Raises:
            ConfigError: it holds a run, or another one has just claimed it.
        """
        path.mkdir(parents=True, exist_ok=True)
        try:
            (path / "trace.jsonl").open("x").close()
        except FileExistsError:
            raise ConfigError(
                f"{path}: got the directory of an earlier run, expected a new one; go on with checkpoint.resume={path}"
            ) from None

    def write_header(self, **more: Any) -> None:
        """Write the first line of the trace: the format, and what the bits of the run depend on."""
        self._write(self._trace, {"event": "header", "version": TRACE_VERSION, **environment(), **more})

    def write_evictions(self, losses: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to ``evictions.jsonl``: the workers that were lost."""
        with (self.path / "evictions.jsonl").open("a", encoding="utf-8") as file:
            for loss in losses:
                self._write(file, loss)

    def read_evictions(self) -> list[dict[str, Any]]:
        """All workers that were lost so far, in any life of the server."""
        file = self.path / "evictions.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []

    def write_event(self, event: Event) -> None:
        """Add a line to ``trace.jsonl``."""
        self._write(self._trace, event.line())

    def write_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``."""
        self._write(self._metrics, row)

    def write_processes(self, server: int, workers: Mapping[int, int], address: str) -> None:
        """Write ``processes.json``: the process numbers of the server and of each worker, and where workers are let in."""
        content = {
            "server": server,
            "workers": {str(worker): pid for worker, pid in sorted(workers.items())},
            "address": address,
        }
        _replace(self.path / "processes.json", content)

    def cut(self, trace_bytes: int, metrics_bytes: int) -> None:
        """Cut trace and metrics back to where they were; what is cut off the trace goes into ``trace.rolled_back.jsonl``."""
        self.flush()
        with (self.path / "trace.jsonl").open("rb") as trace, (self.path / "trace.rolled_back.jsonl").open("ab") as cut_off:
            trace.seek(trace_bytes)
            shutil.copyfileobj(trace, cut_off)
        os.truncate(self.path / "trace.jsonl", trace_bytes)
        os.truncate(self.path / "metrics.jsonl", metrics_bytes)
        for file in (self._trace, self._metrics):
            file.seek(0, os.SEEK_END)  # else `force` tells the former length until something is written

    def header_bytes(self) -> int:
        """The length of the trace's first line; 0 where it is not whole."""
        with (self.path / "trace.jsonl").open("rb") as trace:
            line = trace.readline()
        return len(line) if line.endswith(b"\n") else 0

    def force(self) -> tuple[int, int]:
        """Force trace and metrics to disk, and return their lengths."""
        self.flush()
        for file in (self._trace, self._metrics):
            os.fsync(file.fileno())
        return self._trace.tell(), self._metrics.tell()

    def flush(self) -> None:
        """Hand everything written to the operating system, so that a killed process loses nothing of it."""
        self._trace.flush()
        self._metrics.flush()

    def close(self) -> None:
        """Close the open files."""
        self._trace.close()
        self._metrics.close()

    def _open(self, name: str) -> TextIO:
        return (self.path / name).open("a", encoding="utf-8")

    @staticmethod
    def _write(file: TextIO, line: Mapping[str, Any]) -> None:
        try:
            text = _JSON.encode(line)
        except ValueError:  # rare, so that the common line is gone over once
            text = _JSON.encode(_finite(line))
        file.write(text + "\n")


class Progress:
    """Counts in a file that a SIGKILL of this process leaves as they were at that moment.

    The trace lags behind by up to the time between two looks at the queue of events; this does not, and costs the update path
    no more than a store to memory.

    Args:
        run_dir: The run directory.

    Attributes:
        iterations: Gradients applied.
        lives: Lives that the server has had.
        rolled_back: Updates that were undone by its deaths.
    """

    _COUNTS = struct.Struct("<3q")

    def __init__(self, run_dir: Path) -> None:
        with (run_dir / "progress").open("a+b") as file:
            file.truncate(self._COUNTS.size)
            self._memory = mmap.mmap(file.fileno(), self._COUNTS.size)
        self.iterations, self.lives, self.rolled_back = self._COUNTS.unpack(self._memory)

    def begin(self, iterations: int) -> None:
        """A life of the server begins, with so many gradients applied."""
        self.lives += 1
        self.rolled_back += max(0, self.iterations - iterations)
        self.write(iterations)

    def write(self, iterations: int) -> None:
        """Set how many gradients are applied."""
        self.iterations = iterations
        self._COUNTS.pack_into(self._memory, 0, self.iterations, self.lives, self.rolled_back)


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` of a run directory, whole or not at all."""
    _replace(path / "summary.json", summary)


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a run directory; None where there is none yet."""
    file = path / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _replace(file: Path, content: Mapping[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(file)


def _finite(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with null for NaN and infinity, which JSON does not know."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in content.items()}


def read_trace(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the events of a run directory's trace."""
    header, *events = [json.loads(line) for line in (path / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
    return header, events


def environment() -> dict[str, Any]:
    """What the bits of a run depend on: commit, versions, processor, threads."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, with ``+changes`` where files differ; None outside of one."""
    package = Path(__file__).parents[1]
    try:
        head = _git(package, "rev-parse", "HEAD")
        return head + ("+changes" if _git(package, "status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True)  # noqa: S607 - whichever git the user has
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
