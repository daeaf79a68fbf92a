"""A live run from outside: its processes, what its launcher says, and its trace as it grows."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.chaos.network import ServerArgs

ROOT = Path(__file__).parents[2]
"""The checkout."""
LOOK_SECONDS = 0.05
"""How often we look at the trace and at what is said."""
PROCESSES_SECONDS = 0.25
"""How often we look for new processes."""
SOCKETS_SECONDS = 2.0
"""How often we look for new sockets."""
PATIENCE_SECONDS = 180.0
"""How long anything may take on a busy machine."""


class Failed(RuntimeError):
    """Something did not happen that had to; the text says what, and what was seen."""


@dataclass(frozen=True)
class Seen:
    """An event of the trace.

    Attributes:
        data: The event.
        life: Of the server, counted by what we have seen.
        at: When we saw it, on our monotonic clock: up to a few tenths of a second late.
    """

    data: dict[str, Any]
    life: int
    at: float


class Trace:
    """Follows a trace that grows and, when the server begins a new life, is cut back; what was cut off stays in `seen`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seen: list[Seen] = []
        self.life = 0
        self.iteration = 0
        self._place = 0
        self._last = b""
        self._incarnation = 0
        self._offsets: dict[int, float] = {}

    def look(self) -> None:
        """Read what is new."""
        if not self.file.is_file():
            return
        with self.file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(self._place - len(self._last))
            if size < self._place or file.read(len(self._last)) != self._last:
                self._place, self._last = self._where_it_goes_on(self.file.read_bytes()), b""
            file.seek(self._place)
            new = file.read()
        now = time.monotonic()
        whole = new[: new.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.splitlines(keepends=True):
            self._last = line
            self._take(json.loads(line), now)

    def when(self, seen: Seen) -> float:
        """When an event happened, on our monotonic clock.

        The server's seconds are those of the same clock of the machine, with another origin in each of its lives; of the
        delays with which we saw its events the smallest one is next to nothing.
        """
        return seen.data["seconds"] + self._offsets[seen.life]

    def applied_after(self, moment: float) -> list[Seen]:
        """The gradients that were applied after that moment."""
        found: list[Seen] = []
        for seen in reversed(self.seen):
            if seen.at < moment:
                break
            if seen.data["event"] == "apply" and self.when(seen) > moment:
                found.append(seen)
        return found

    def _where_it_goes_on(self, content: bytes) -> int:
        """After a cut: where the present life begins, or the end where it has not yet begun."""
        end = content.rfind(b"\n") + 1
        place = content.rfind(b'{"event": "resume"', 0, end)
        if place < 0:
            return end
        resume = json.loads(content[place : content.index(b"\n", place)])
        return place if resume["incarnation"] > self._incarnation else end

    def _take(self, event: dict[str, Any], now: float) -> None:
        if "seconds" not in event:
            return  # the header
        if event["event"] == "resume":
            self.life += 1
            self._incarnation = event["incarnation"]
            self.iteration = event["iteration"]
        if event["event"] == "apply":
            self.iteration = event["iteration"] + 1
        self._offsets[self.life] = min(self._offsets.get(self.life, float("inf")), now - event["seconds"])
        self.seen.append(Seen(event, self.life, now))


@dataclass
class Launched:
    """A launcher: of the run, or of a guest.

    Attributes:
        process: The launcher itself.
        said: Its standard error so far, each line with the time when we read it.
        family: Everything that it has started, as far as we saw it, and itself.
    """

    process: subprocess.Popen[str]
    said: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    family: set[psutil.Process] = field(default_factory=set[psutil.Process])

    @classmethod
    def start(cls, place: ServerArgs, *overrides: str) -> Launched:
        """Start ``launch.py``."""
        command = [*place.prefix, sys.executable, "launch.py", "logger=none", *place.overrides, *overrides]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        launched = cls(process)
        launched.family.add(psutil.Process(process.pid))
        threading.Thread(target=launched._listen, daemon=True).start()
        return launched

    def look(self) -> None:
        """Take note of what it has started."""
        try:
            self.family.update(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def find(self, pattern: str) -> list[re.Match[str]]:
        """What it has said that matches this."""
        return [found for _, line in list(self.said) if (found := re.search(pattern, line))]

    def end(self) -> None:
        """Kill what is left of it."""
        self.look()
        for process in self.family:
            if alive(process):
                process.kill()
        self.process.wait(PATIENCE_SECONDS)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append((time.monotonic(), line.rstrip("\n")))
        self.process.stderr.close()


class Run:
    """A live run under observation; use it as a context, whose end leaves no process of it.

    Args:
        run_dir: Its directory, which is made.
        place: Where it runs.
        overrides: Of ``launch.py``.
    """

    def __init__(self, run_dir: Path, place: ServerArgs, overrides: Sequence[str]) -> None:
        self.run_dir = run_dir
        self.place = place
        self.trace = Trace(run_dir / "trace.jsonl")
        self.launcher = Launched.start(place, f"hydra.run.dir={run_dir}", *overrides)
        self.guests: list[Launched] = []
        self.sockets: set[str] = set()
        """Sockets that listened at any time, by their number in the kernel."""
        self._looked_at: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for launched in (*self.guests, self.launcher):
            launched.end()
        if self.run_dir.is_dir():
            for name, launched in (
                ("launcher", self.launcher),
                *((f"guest_{k}", guest) for k, guest in enumerate(self.guests)),
            ):
                said = "".join(f"{at:.3f} {line}\n" for at, line in launched.said)
                (self.run_dir / f"{name}.stderr").write_text(said)

    # ---------------------------------------------------------------------------------------------------------- waiting

    def look(self) -> None:
        """Take note of everything that is new."""
        self.trace.look()
        if self._is_time("processes", PROCESSES_SECONDS):
            for launched in (self.launcher, *self.guests):
                launched.look()
        if self._is_time("sockets", SOCKETS_SECONDS):
            self.sockets |= listening(self.place.table()) & inodes(self.launcher.family)

    def _is_time(self, what: str, every: float) -> bool:
        now = time.monotonic()
        due = now - self._looked_at.get(what, 0.0) > every
        if due:
            self._looked_at[what] = now
        return due

    def wait(self, done: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS, *, ends: bool = False) -> Any:
        """The first true value of ``done()``.

        Raises:
            Failed: there was none in time, or the run has ended, where this is not what one waits for.
        """
        deadline = time.monotonic() + seconds
        while True:
            over = self.launcher.process.poll() is not None
            self.look()
            if value := done():
                return value
            last = " | ".join(line for _, line in self.launcher.said[-3:])
            if over and not ends:
                raise Failed(f"the run ended (exit status {self.launcher.process.returncode}) before {what}; it said: {last}")
            if time.monotonic() > deadline:
                raise Failed(f"{what} did not happen within {seconds:g} s; the launcher said: {last}")
            time.sleep(LOOK_SECONDS)

    def let_pass(self, seconds: float) -> None:
        """Look on for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.look()
            time.sleep(LOOK_SECONDS)

    # ------------------------------------------------------------------------------------------------------ its processes

    def processes(self) -> dict[str, Any]:
        """What ``processes.json`` has, without those that are gone."""
        try:
            found = json.loads((self.run_dir / "processes.json").read_text())
        except FileNotFoundError:
            return {"server": 0, "workers": {}, "address": ""}
        workers = {int(worker): pid for worker, pid in found["workers"].items() if is_alive(pid)}
        return {**found, "workers": workers}

    def server(self) -> int:
        """The process number of the server, once there is one at work."""
        return self.wait(lambda: (pid := self.processes()["server"]) and is_alive(pid) and pid, "a server at work")

    def worker_of(self, launched: Launched) -> tuple[int, int] | None:
        """Number and process number of the member that a launcher of a guest has started."""
        family = {process.pid for process in launched.family}
        found = [(worker, pid) for worker, pid in self.processes()["workers"].items() if pid in family]
        return found[0] if found else None

    def starting(self, worker: int) -> int | None:
        """The process that is to become this worker and is not yet let in."""
        members = self.processes()["workers"].values()
        for process in psutil.Process(self.launcher.process.pid).children():
            words = words_of(process)
            named = "--worker" in words and words[words.index("--worker") + 1] == str(worker)
            if named and process.pid not in members and alive(process):
                return process.pid
        return None

    def guest(self, place: ServerArgs) -> Launched:
        """Start a guest."""
        address = self.processes()["address"]
        where = (f"server.address={address}", f"server.secret_file={self.run_dir / 'secret'}")
        folder = f"hydra.run.dir={self.run_dir / f'guest_{len(self.guests)}'}"
        launched = Launched.start(place, "role=worker", folder, *where, "runtime.worker_timeout_seconds=3")
        self.guests.append(launched)
        return launched

    def applied_by(self, worker: int, after: float) -> list[Seen]:
        """The gradients of a worker that were applied after that moment."""
        return [seen for seen in self.trace.applied_after(after) if seen.data["worker"] == worker]

    # ------------------------------------------------------------------------------------------------------ what is left

    def left_over(self) -> list[psutil.Process]:
        """Processes of the launchers that still run."""
        return [process for launched in (self.launcher, *self.guests) for process in launched.family if alive(process)]

    def still_listening(self) -> set[str]:
        """Sockets of the run that still listen."""
        return listening(self.place.table()) & self.sockets


def progress(run_dir: Path) -> int:
    """How many gradients the server of a run has applied, as it notes outside of the trace: the first number of a file."""
    return struct.unpack_from("<q", (run_dir / "progress").read_bytes())[0]


def alive(process: psutil.Process) -> bool:
    """Whether it runs, and is not only waiting to be noticed as dead."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_alive(pid: int) -> bool:
    """Likewise, by its number."""
    try:
        return alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def words_of(process: psutil.Process) -> list[str]:
    """Its command line; nothing where it has just ended."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def listening(table: str) -> set[str]:
    """The numbers of the sockets that listen, from a table of Linux (its fourth column is the state, its tenth the number)."""
    rows = [line.split() for line in table.splitlines()]
    return {row[9] for row in rows if len(row) > 9 and row[3] == "0A"}


def inodes(processes: Iterable[psutil.Process]) -> set[str]:
    """The numbers of the sockets that these processes hold."""
    found: set[str] = set()
    for process in processes:
        folder = Path(f"/proc/{process.pid}/fd")
        try:
            for descriptor in folder.iterdir():
                target = str(descriptor.readlink())
                if target.startswith("socket:["):
                    found.add(target[len("socket:[") : -1])
        except OSError:
            continue
    return found
