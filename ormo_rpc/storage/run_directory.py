"""The run directory: trace, metrics, evictions and process numbers of one run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO, cast

from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.server.events import Event
from ormo_rpc.storage.environment import environment

TRACE_VERSION = 1
"""The format of ``trace.jsonl``, in its header."""
TRACE = "trace.jsonl"
"""The events of a run under a header; it is there from the beginning of the run."""
_METRICS = "metrics.jsonl"
_EVICTIONS = "evictions.jsonl"
_FINGERPRINT = "fingerprint.json"
_PROCESSES = "processes.json"
_FORMER_EVICTIONS = "losses.jsonl"
"""The name of ``evictions.jsonl`` in run directories of earlier versions."""
_JSON = json.JSONEncoder(allow_nan=False, check_circular=False)  # json.dumps would make one for every line


def new_path() -> Path:
    """A path for a run directory that nobody has named, as hydra makes it for ``launch.py``."""
    return Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")


class RunDirectory:
    """The files of one run; trace and metrics are kept open, and reach the operating system by `flush`.

    Args:
        path: The directory, made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._trace = self._open(TRACE)
        self._metrics = self._open(_METRICS)

    @staticmethod
    def claim(path: Path) -> None:
        """Make a run directory for one run alone.

        Raises:
            ConfigError: it holds a run, or another process has just claimed it.
        """
        path.mkdir(parents=True, exist_ok=True)
        try:
            (path / TRACE).open("x").close()
        except FileExistsError:
            raise _taken(path) from None

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """Refuse early what `claim` would refuse.

        Raises:
            ConfigError: it holds a run.
        """
        if (path / TRACE).exists():
            raise _taken(path)

    @staticmethod
    def release(path: Path) -> None:
        """Undo `claim` for a run that was refused before it began, so that the same command can be typed again."""
        with contextlib.suppress(OSError):
            if (path / TRACE).stat().st_size == 0:
                (path / TRACE).unlink()

    def write_header(self, **more: Any) -> None:
        """Write the first line of the trace: its version, and the environment that the bits of the run depend on."""
        self._write(self._trace, {"event": "header", "version": TRACE_VERSION, **environment(), **more})

    def write_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Write ``fingerprint.json``: names, shapes and hashes of the model, and the size of the data set."""
        write_json(self.path / _FINGERPRINT, fingerprint.to_dict())

    def write_event(self, event: Event) -> None:
        """Append a line to ``trace.jsonl``."""
        self._write(self._trace, event.line())

    def write_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        self._write(self._metrics, row)

    def write_evictions(self, evictions: Sequence[Mapping[str, Any]]) -> None:
        """Append a line to ``evictions.jsonl`` for each evicted worker."""
        with (self.path / _EVICTIONS).open("a", encoding="utf-8") as file:
            for eviction in evictions:
                self._write(file, eviction)

    def read_evictions(self) -> list[dict[str, Any]]:
        """Read the evictions of all server processes so far, also those under the file's former name."""
        files = [file for name in (_FORMER_EVICTIONS, _EVICTIONS) if (file := self.path / name).is_file()]
        # The last line may be torn, where a server process was killed.
        return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n")[:-1]]

    def write_processes(
        self,
        server: int,
        workers: Mapping[int, int],
        address: str,
        *,
        control: str,
        start: str,
        transports: Mapping[int, Mapping[str, str]],
    ) -> None:
        """Write ``processes.json``.

        Args:
            server: Process number of the server.
            workers: That of each worker.
            address: To join at.
            control: The carrier of the control plane.
            start: The way in which processes are started.
            transports: The transport of each worker, and the reason for it, also of workers that have left.
        """
        content = {
            "server": server,
            "workers": {str(worker): pid for worker, pid in sorted(workers.items())},
            "address": address,
            "control": control,
            "start": start,
            "transports": {str(worker): transport for worker, transport in sorted(transports.items())},
        }
        write_json(self.path / _PROCESSES, content)

    def truncate(self, trace_bytes: int, metrics_bytes: int) -> None:
        """Cut trace and metrics back to earlier lengths; the end of the trace moves to ``trace.rolled_back.jsonl``."""
        self.flush()
        with (self.path / TRACE).open("rb") as trace, (self.path / "trace.rolled_back.jsonl").open("ab") as rolled_back:
            trace.seek(trace_bytes)
            shutil.copyfileobj(trace, rolled_back)
        os.truncate(self.path / TRACE, trace_bytes)
        os.truncate(self.path / _METRICS, metrics_bytes)
        for file in (self._trace, self._metrics):
            file.seek(0, os.SEEK_END)  # else `sync` returns the former length until something is written

    def header_bytes(self) -> int:
        """Return the length of the trace's first line; 0 where it is not complete."""
        with (self.path / TRACE).open("rb") as trace:
            line = trace.readline()
        return len(line) if line.endswith(b"\n") else 0

    def sync(self) -> tuple[int, int]:
        """Force trace and metrics to disk, and return their lengths."""
        self.flush()
        for file in (self._trace, self._metrics):
            os.fsync(file.fileno())
        return self._trace.tell(), self._metrics.tell()

    def flush(self) -> None:
        """Hand everything written to the operating system, so that a SIGKILL loses none of it.

        Raises:
            RunFailed: the directory is gone, and what was written is lost.
        """
        self._trace.flush()
        self._metrics.flush()
        check_present(self.path)
        if os.fstat(self._trace.fileno()).st_nlink == 0:
            raise _gone(self.path)

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
        except ValueError:  # rare, so the common line is scanned once only
            text = _JSON.encode(_finite(line))
        file.write(text + "\n")


def check_present(path: Path) -> None:
    """Check that the directory of a run that goes on is there, with the trace that it has from its beginning.

    Raises:
        RunFailed: it is not. Whatever is written now would be the half of a run.
    """
    try:
        (path / TRACE).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise _gone(path) from None
    except OSError:  # a file system of the network may not answer for a while
        return


def _gone(path: Path) -> RunFailed:
    return RunFailed(f"the run directory {path} is gone: it was deleted, moved or replaced while the run went on")


def read_trace(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the header and the events of a run directory's trace.

    Raises:
        ConfigError: it is missing or damaged.
    """
    lines = _read_lines(path / TRACE)
    if not lines:
        raise ConfigError(f"{path / TRACE}: got an empty file, expected the trace of a run")
    return lines[0], lines[1:]


def read_address(path: Path) -> str | None:
    """Read the address of a run's server; None where no worker has joined yet, or the run directory is of no live run.

    Raises:
        ConfigError: the file is damaged.
    """
    file = path / _PROCESSES
    try:
        return str(json.loads(file.read_bytes())["address"]) if file.is_file() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


def read_fingerprint(path: Path) -> Fingerprint | None:
    """Read a run directory's fingerprint; None where an earlier version has made the directory.

    Raises:
        ConfigError: it is damaged.
    """
    file = path / _FINGERPRINT
    try:
        return Fingerprint.from_dict(json.loads(file.read_bytes())) if file.is_file() else None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a run directory's metrics.

    Raises:
        ConfigError: they are missing or damaged.
    """
    return _read_lines(path / _METRICS)


def rows_so_far(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a run that has not ended; the last line may be torn, where a server process was killed."""
    return [json.loads(line) for line in (path / _METRICS).read_text(encoding="utf-8").split("\n")[:-1]]


def _read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step: a reader sees the former content or the new one.

    Raises:
        OSError: the disk is full or read-only; the former content is untouched, and nothing else is left.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(content: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null, in mappings and lists of any depth."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, (int, str)):  # most of a row: the test for mappings is slow
        return content
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in cast("Mapping[str, Any]", content).items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in cast("Sequence[Any]", content)]
    return content


def _taken(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: got the directory of an earlier run, expected a new one; continue that run with checkpoint.resume={path}"
    )
