"""Preloaders that cannot be started, or are killed; none of them is real."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
from typing_extensions import override

from ormo_rpc.config.runtimes import RpcRuntime, StartKind
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.runtimes.distributed import starter
from ormo_rpc.runtimes.distributed.oom_kills import OomKills
from ormo_rpc.runtimes.distributed.preloading import client, messages, preloading
from ormo_rpc.runtimes.distributed.preloading.client import ForkedProcess, Preloader, PreloaderLost, Programs
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading
from ormo_rpc.runtimes.distributed.shortages import MEMORY
from ormo_rpc.runtimes.distributed.starter import Command, Process
from ormo_rpc.runtimes.linux import LINUX


class Ended(ForkedProcess):
    """A process that has ended with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(0)
        self.returncode = status


class Large(ForkedProcess):
    """A process that the kernel takes long to end."""

    killed = 0

    @override
    def poll(self) -> int | None:
        return None

    @override
    def kill(self) -> None:
        self.killed += 1


COMMAND = Command(name="worker 0", arguments=[], environment={}, output=None, descriptors={})


@pytest.mark.parametrize(
    ("status", "cause", "text"),
    [
        (-signal.SIGKILL, "by the kernel for lack of memory", f"it was killed by the kernel for lack of memory; {MEMORY}"),
        (-signal.SIGKILL, "", "it was killed by SIGKILL"),
        (1, "by the kernel for lack of memory", "it exited with status 1"),
    ],
)
@pytest.mark.parametrize("closed", ["before", "meanwhile"])
def test_a_preloader_that_was_killed_for_memory_is_named(
    closed: str, status: int, cause: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(_: OomKills, killed: int) -> str:
        assert killed == 1
        return cause

    monkeypatch.setattr(OomKills, "cause", told)
    ours, theirs = socket.socketpair()
    with ours:
        preloader = Preloader(Ended(status), ours, {})
        preloader.refusal = "" if closed == "before" else None  # a request, or the first answer, finds it gone
        theirs.close()
        with pytest.raises(PreloaderLost) as lost:
            preloader.fork(COMMAND)
    assert str(lost.value) == text


@pytest.mark.skipif(not LINUX, reason="processes are adopted on Linux alone")
def test_orphans_of_others_do_not_become_children_of_a_program_that_trains() -> None:
    with Preloading():
        orphan = subprocess.run(["sh", "-c", "sleep 60 >/dev/null & echo $!"], stdout=subprocess.PIPE, check=True)  # noqa: S607 - any shell
        process = psutil.Process(int(orphan.stdout))
        try:
            assert process.ppid() != os.getpid()
        finally:
            process.kill()


def test_a_fork_stays_where_it_is_if_the_current_directory_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        preloader = Preloader(Ended(0), ours, {})
        preloader.refusal = ""
        messages.send(theirs, {"pid": 1234})
        assert preloader.fork(COMMAND).pid == 1234
        assert messages.receive(theirs)[0]["directory"] == ""


def test_a_run_whose_preloader_cannot_be_started_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(_: Command) -> Process:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(client, "spawn", spawn)
    before = set(Path("/proc/self/fd").iterdir())
    with Preloading() as starts, pytest.raises(RunFailed) as failed:
        starts.load(Config(), starts_server=True)
    assert str(failed.value) == (
        "the process that loads data and model could not be started: Resource temporarily unavailable (no further process or "
        "thread is allowed: raise ulimit -u, or pids.max of the control group)"
    )
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize(("number", "spawned"), [(errno.ENOMEM, True), (errno.EAGAIN, False)])
def test_a_preloader_too_large_to_be_forked_leaves_the_start_to_a_smaller_process(
    number: int, spawned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork may need as much memory as the preloader has; a limit on processes is reached in every way."""
    child = Ended(0)
    monkeypatch.setattr(preloading, "spawn", lambda _: child)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        preloader = Preloader(Ended(0), ours, {})
        preloader.refusal = ""
        client.messages.send(theirs, {"errno": number})
        with Preloading() as starts:
            starts._imports = preloader  # pyright: ignore[reportPrivateUsage] # without a process
            if spawned:
                assert starts(COMMAND) is child
            else:
                with pytest.raises(BlockingIOError):
                    starts(COMMAND)


def test_a_large_preloader_that_takes_long_to_end_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "KILLED_SECONDS", 0.01)
    ours, theirs = socket.socketpair()
    process = Large(0)
    with ours, theirs, Preloading() as starts:
        starts._imports = Preloader(process, ours, {})  # pyright: ignore[reportPrivateUsage] # without a process
    assert process.killed


def refusing(environment: dict[str, str], programs: Programs) -> Preloader:
    """A preloader that is ready, and must not be forked."""
    ours, theirs = socket.socketpair()
    theirs.close()
    preloader = Preloader(Ended(0), ours, environment, programs)
    preloader.refusal = "threads were started before ours"
    return preloader


def test_where_no_fork_is_safe_processes_are_spawned_unless_the_run_asks_for_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    spawned = list[Command]()

    def spawn(command: Command) -> Process:
        spawned.append(command)
        return Ended(0)

    monkeypatch.setattr(Preloader, "spawned", refusing)
    monkeypatch.setattr(preloading, "spawn", spawn)
    with Preloading() as starting:
        starting.use_imports(Config())
        assert starting.way == "spawn: threads were started before ours"
        starting(COMMAND)
        assert [command.name for command in spawned] == ["worker 0"]
        forked = Config(runtime=RpcRuntime(start=StartKind.fork))
        with pytest.raises(
            ConfigError, match=r"^runtime\.start: got fork, expected auto or spawn: threads were started before ours$"
        ):
            starting.use_imports(forked)
