"""A live run seen from outside: its processes, what its launchers log, and its trace."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from tests.chaos.network import Namespace
from tests.chaos.processes import command_line, is_running, listening, pid_is_running, socket_inodes
from tests.chaos.trace import TraceEvent, TraceFollower

ROOT = Path(__file__).parents[2]
"""The checkout."""
POLL_SECONDS = 0.05
"""Between two polls of the trace and the log."""
PROCESSES_SECONDS = 0.25
"""Between two searches for new processes."""
SOCKETS_SECONDS = 2.0
"""Between two searches for new sockets."""
PATIENCE_SECONDS = 180.0
"""Longest time that anything may take on a busy machine."""


class ChaosError(RuntimeError):
    """An expected effect did not happen; the message has it, and what was seen instead."""


@dataclass
class Launched:
    """A running ``launch.py``, of the run itself or of an elastic worker, or an elastic worker without a launcher.

    Attributes:
        process: The process that was started.
        log: Its standard error so far, each line with the time it was read.
        family: The process and every process it was seen to have started.
        killed: A fault has killed, or is about to kill, the process.
    """

    process: subprocess.Popen[str]
    log: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    family: set[psutil.Process] = field(default_factory=set[psutil.Process])
    killed: bool = False

    @classmethod
    def launch(cls, namespace: Namespace, *overrides: str) -> Launched:
        """Start ``launch.py``."""
        return cls.start(namespace, "launch.py", "logger=none", *overrides)

    @classmethod
    def start(cls, namespace: Namespace, *arguments: str) -> Launched:
        """Start Python with these arguments."""
        command = [*namespace.prefix, sys.executable, *arguments]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        launched = cls(process)
        launched.family.add(psutil.Process(process.pid))
        threading.Thread(target=launched._read_log, daemon=True).start()
        return launched

    def find_processes(self) -> None:
        """Add processes started since the last call to `family`."""
        try:
            self.family.update(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def search_log(self, pattern: str) -> list[re.Match[str]]:
        """One match for each line of the log that has one."""
        return [found for _, line in list(self.log) if (found := re.search(pattern, line))]

    def kill(self) -> None:
        """Kill every process of it that still runs."""
        self.find_processes()
        for process in self.family:
            if is_running(process):
                process.kill()
        self.process.wait(PATIENCE_SECONDS)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append((time.monotonic(), line.rstrip("\n")))
        self.process.stderr.close()


class ObservedRun:
    """A live run under observation; a context manager that leaves no process of it.

    Args:
        run_dir: Its run directory, which is created.
        namespace: The network namespace it runs in.
        overrides: Of ``launch.py``.

    Attributes:
        trace: Its trace.
        launcher: Its launcher.
        elastic: The launchers of elastic workers, and those without a launcher.
        sockets: Inodes of every socket of it that was seen listening.
    """

    def __init__(self, run_dir: Path, namespace: Namespace, overrides: Sequence[str]) -> None:
        self.run_dir = run_dir
        self.namespace = namespace
        self.trace = TraceFollower(run_dir / "trace.jsonl")
        self.launcher = Launched.launch(namespace, f"hydra.run.dir={run_dir}", *overrides)
        self.elastic: list[Launched] = []
        self.sockets: set[str] = set()
        self._polled_at: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for launched in (*self.elastic, self.launcher):
            launched.kill()
        if self.run_dir.is_dir():
            names = ("launcher", *(f"elastic_{number}" for number in range(len(self.elastic))))
            for name, launched in zip(names, (self.launcher, *self.elastic), strict=True):
                log = "".join(f"{at:.3f} {line}\n" for at, line in launched.log)
                (self.run_dir / f"{name}.stderr").write_text(log)

    # ---------------------------------------------------------------------------------------------------------- waiting

    def poll(self) -> None:
        """Take note of everything that is new."""
        self.trace.poll()
        if self._is_due("processes", PROCESSES_SECONDS):
            for launched in (self.launcher, *self.elastic):
                launched.find_processes()
        if self._is_due("sockets", SOCKETS_SECONDS):
            self.sockets |= listening(self.namespace.tcp_table()) & socket_inodes(self.launcher.family)

    def _is_due(self, what: str, every: float) -> bool:
        now = time.monotonic()
        due = now - self._polled_at.get(what, 0.0) > every
        if due:
            self._polled_at[what] = now
        return due

    def wait(self, done: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS, *, may_end: bool = False) -> Any:
        """Poll until ``done()`` is true, and return its value.

        Args:
            done: The condition.
            what: Its description, for errors.
            seconds: Time limit.
            may_end: Keep waiting after the run has ended.

        Raises:
            ChaosError: time is up, or the run has ended.
        """
        deadline = time.monotonic() + seconds
        while True:
            over = self.launcher.process.poll() is not None
            self.poll()
            if value := done():
                return value
            last = " | ".join(line for _, line in self.launcher.log[-3:])
            if over and not may_end:
                status = self.launcher.process.returncode
                raise ChaosError(f"the run ended (exit status {status}) before {what}; last of its log: {last}")
            if time.monotonic() > deadline:
                raise ChaosError(f"{what} did not happen within {seconds:g} s; last of the launcher's log: {last}")
            time.sleep(POLL_SECONDS)

    def poll_for(self, seconds: float) -> None:
        """Let the time pass, polling."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.poll()
            time.sleep(POLL_SECONDS)

    # ------------------------------------------------------------------------------------------------------ its processes

    def processes(self) -> dict[str, Any]:
        """Content of ``processes.json``, less the workers that have exited."""
        try:
            found = json.loads((self.run_dir / "processes.json").read_text())
        except FileNotFoundError:
            return {"server": 0, "workers": {}, "address": ""}
        workers = {int(worker): pid for worker, pid in found["workers"].items() if pid_is_running(pid)}
        return {**found, "workers": workers}

    def server(self) -> int:
        """The process id of the server, once it runs."""
        return self.wait(lambda: (pid := self.processes()["server"]) and pid_is_running(pid) and pid, "a running server")

    def worker_of(self, launched: Launched) -> tuple[int, int] | None:
        """Worker number and process id of the worker that an elastic launcher has started; None before it has joined."""
        family = {process.pid for process in launched.family}
        found = [(worker, pid) for worker, pid in self.processes()["workers"].items() if pid in family]
        return found[0] if found else None

    def starting(self, worker: int) -> int | None:
        """The process started to be this worker, as long as it has not joined."""
        joined = self.processes()["workers"].values()
        for process in psutil.Process(self.launcher.process.pid).children():
            arguments = command_line(process)
            named = "--preferred-worker" in arguments and arguments[arguments.index("--preferred-worker") + 1] == str(worker)
            if named and process.pid not in joined and is_running(process):
                return process.pid
        return None

    def add_elastic_worker(self, namespace: Namespace, worker_timeout_seconds: float) -> Launched:
        """Launch an elastic worker for the run."""
        address = self.processes()["address"]
        where = (f"server.address={address}", f"server.secret_file={self.run_dir / 'secret'}")
        folder = f"hydra.run.dir={self.run_dir / f'elastic_{len(self.elastic)}'}"
        timeout = f"runtime.worker_timeout_seconds={worker_timeout_seconds:g}"
        launched = Launched.launch(namespace, "role=worker", folder, *where, timeout)
        self.elastic.append(launched)
        return launched

    def add_elastic_worker_with(self, namespace: Namespace, stage: str, number: signal.Signals) -> Launched:
        """Start an elastic worker, without a launcher, that sends itself a signal at a stage (`elastic_worker.STAGES`)."""
        where = ("--address", self.processes()["address"], "--secret-file", str(self.run_dir / "secret"))
        fault = ("--stage", stage, "--signal", str(int(number)))
        launched = Launched.start(namespace, "-m", "tests.chaos.elastic_worker", *where, *fault)
        self.elastic.append(launched)
        return launched

    def applied_by(self, worker: int, after: float) -> list[TraceEvent]:
        """The gradients of a worker applied after that moment."""
        return [event for event in self.trace.applied_after(after) if event.data["worker"] == worker]

    # ------------------------------------------------------------------------------------------------------ what is left

    def running(self) -> list[psutil.Process]:
        """Processes of all launchers that still run, the launchers included."""
        return [process for launched in (self.launcher, *self.elastic) for process in launched.family if is_running(process)]

    def still_listening(self) -> set[str]:
        """Inodes of sockets of the run that still listen."""
        return listening(self.namespace.tcp_table()) & self.sockets


def applied_gradients(run_dir: Path) -> int:
    """Gradients that the server of a run has applied, from the file ``progress``, which outlives a killed server."""
    return struct.unpack_from("<q", (run_dir / "progress").read_bytes())[0]
