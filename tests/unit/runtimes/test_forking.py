"""Forks of a preloader: whose child each is, and what it has of its own. The processes are real."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import gc
import json
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Generator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import pytest
import torch

from ormo_rpc.runtimes.distributed.preloading import messages
from ormo_rpc.runtimes.distributed.preloading.client import ForkedProcess, Preloader, PreloaderLost
from ormo_rpc.runtimes.distributed.preloading.forking import ForkRequest, apart
from ormo_rpc.runtimes.distributed.preloading.forking import fork as fork_once
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading
from ormo_rpc.runtimes.distributed.preloading.safety import Baseline
from ormo_rpc.runtimes.linux import LINUX, adopting
from tests.support.processes import PATIENCE_SECONDS

pytestmark = pytest.mark.skipif(not LINUX, reason="processes are forked on Linux alone")
PR_GET_PDEATHSIG = 2


@pytest.fixture(autouse=True)
def adopted() -> Generator[None]:
    """The forks of a test are children of pytest's process."""
    with adopting():
        yield
    gc.unfreeze()  # which a preloader never does
    gc.enable()


def request(**changes: Any) -> ForkRequest:
    """A request of this process."""
    values: dict[str, Any] = {
        "launcher": os.getpid(),
        "name": "ormo test",
        "title": ["python", "-m", "something", "--flag"],
        "environment": {"ONLY": "this"},
        "path": ["/of/the/launcher"],
        "directory": "/",
        "output": None,
    }
    return ForkRequest(**{**values, **changes})


def fork(wanted: ForkRequest, keep: Collection[int], run: Callable[[], NoReturn]) -> int:
    """Fork a process that runs a function."""
    number = fork_once(wanted, keep)
    if number == 0:
        try:
            run()
        finally:
            os._exit(1)
    return number


def told(what: Callable[[], Any], **changes: Any) -> tuple[Any, ForkedProcess]:
    """Fork, and return what the fork finds out about itself."""
    reader, writer = os.pipe()

    def run() -> NoReturn:
        os.write(writer, json.dumps(what()).encode())
        os._exit(7)

    process = ForkedProcess(fork(request(**changes), [writer], run))
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    assert process.wait(PATIENCE_SECONDS) == 7
    return json.loads(text), process


def test_a_fork_is_a_child_of_the_launcher_with_a_session_and_descriptors_of_its_own() -> None:
    listener = socket.socket()

    def look() -> dict[str, Any]:
        death = ctypes.c_int()
        ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(death))
        return {
            "parent": os.getppid(),
            "leads its session": os.getsid(0) == os.getpid(),
            "descriptors": sorted(int(each.name) for each in Path("/proc/self/fd").iterdir())[:-1],
            "death of the parent": death.value,
            "environment": dict(os.environ),
            "path": sys.path,
            "directory": str(Path.cwd()),
            "name": Path("/proc/self/comm").read_text().strip(),
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "threads": len(list(Path("/proc/self/task").iterdir())),
        }

    with listener:
        found, _ = told(look)
    descriptors = found.pop("descriptors")
    assert descriptors[:3] == [0, 1, 2]
    assert len(descriptors) == 4  # and the one to tell by
    assert {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1} <= set(found.pop("blocked"))  # until it follows them
    assert found == {
        "parent": os.getpid(),
        "leads its session": True,
        "death of the parent": signal.SIGKILL,
        "environment": {"ONLY": "this"},
        "path": ["/of/the/launcher"],
        "directory": "/",
        "name": "ormo test",
        "threads": 1,
    }


def test_a_fork_draws_numbers_of_its_own_and_those_of_torch_as_a_new_process_does() -> None:
    def draw() -> list[Any]:
        return [random.random(), float(np.random.random()), torch.rand(3).tolist(), torch.initial_seed()]

    torch.rand(5)
    (one, _), (other, _) = told(draw), told(draw)
    here = draw()
    fresh = torch.Generator()  # seeded as torch seeds a new process
    assert one[2:] == other[2:] == [torch.rand(3, generator=fresh).tolist(), fresh.initial_seed()]
    assert len({one[0], other[0], here[0]}) == len({one[1], other[1], here[1]}) == 3


def test_a_fork_that_keeps_the_random_states_draws_what_its_preloader_would_draw_next() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    one, other = told(draw, keeps_random=True)[0], told(draw, keeps_random=True)[0]
    assert one == other == draw()


def test_what_loading_a_job_changes_about_its_process_is_there_in_a_fork(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a process that loads the job by itself: a data set may set the variable that its model reads."""
    monkeypatch.setenv("SCALE", "1")
    monkeypatch.setenv("REMOVED", "1")
    wanted = request(environment=dict(os.environ), path=list(sys.path), directory=str(Path.cwd()))
    loading = {"environment": wanted.environment, "path": wanted.path, "directory": wanted.directory}
    monkeypatch.setenv("SCALE", "2")
    monkeypatch.setenv("ADDED", "3")
    monkeypatch.delenv("REMOVED")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path)
    kept = wanted.beside(loading)
    assert kept == dataclasses.replace(
        wanted, environment=dict(os.environ), path=[str(tmp_path / "modules"), *wanted.path], directory=str(tmp_path)
    )
    assert kept.environment.items() >= {"SCALE": "2", "ADDED": "3"}.items()
    assert "REMOVED" not in kept.environment


def test_what_a_launcher_has_changed_since_the_loading_is_done_in_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALE", "2")
    monkeypatch.setenv("GONE", "1")
    loading = {"environment": {**os.environ, "SCALE": "1"}, "path": sys.path, "directory": str(Path.cwd())}
    later = request(environment={name: value for name, value in os.environ.items() if name != "GONE"} | {"SCALE": "3"})
    assert later.beside(loading) == later


def test_the_output_of_a_fork_goes_to_its_log(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        told(lambda: os.write(1, b"out ") + os.write(2, b"err"), output=log.fileno())
    assert (tmp_path / "log").read_text() == "out err"


@pytest.mark.parametrize("forks_before", [0, 1])
def test_a_death_between_the_two_forks_is_an_error_at_once_or_has_no_effect(
    forks_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    preloader, forks, fork_one = os.getpid(), iter(range(2)), os.fork

    def fork_and_die() -> int:
        if next(forks) == 0:
            return fork_one()
        if forks_before == 0 or fork_one() > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    monkeypatch.setattr(os, "fork", fork_and_die)
    if forks_before:
        assert told(os.getppid)[0] == preloader
    else:
        with pytest.raises(ProcessLookupError):
            fork(request(), [], lambda: os._exit(7))


def test_exit_statuses_are_learned_where_those_of_children_were_ignored() -> None:
    former = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Preloading():
            assert told(os.getppid)[0] == os.getpid()
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, former)


def test_a_fork_whose_launcher_has_ended_does_not_begin(tmp_path: Path) -> None:
    def run() -> NoReturn:
        (tmp_path / "begun").touch()
        os._exit(7)

    process = ForkedProcess(fork(request(launcher=1), [], run))
    assert process.wait(PATIENCE_SECONDS) == 1
    assert not (tmp_path / "begun").exists()


@pytest.mark.parametrize("failing", [1, 2], ids=["the first fork", "the second"])
def test_a_fork_that_fails_is_an_error_of_the_launcher_s(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fork, list[int]()

    def limited() -> int:
        calls.append(1)
        if len(calls) == failing:
            raise OSError(errno.EAGAIN, "no more processes")
        return real()

    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number says which
        fork(request(), [], lambda: os._exit(0))
    assert caught.value.errno == errno.EAGAIN


def test_a_process_apart_gives_its_result_and_changes_nothing_here() -> None:
    changed = list[int]()

    def function() -> list[int]:
        changed.append(1)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return changed

    assert apart(function) == [1]
    assert changed == []


@pytest.mark.parametrize(
    ("end", "how"),
    [(lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"), (lambda: 1 / 0, "exited with status 1")],
)
def test_the_death_of_a_process_apart_is_told(end: Callable[[], Any], how: str) -> None:
    with pytest.raises(ChildProcessError, match=how):
        apart(end)


def test_a_preloader_whose_launcher_is_gone_ends_without_a_word() -> None:
    from ormo_rpc.runtimes.programs.preloader import Jobs, PreloaderProcess  # its import disables the collector

    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        assert PreloaderProcess(ours, Baseline.now(), "", Jobs()).serve() is None


def test_a_message_brings_descriptors(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    (tmp_path / "file").write_text("content")
    with ours, theirs, (tmp_path / "file").open() as file:
        message = {"long": "x" * 100_000}
        sender = threading.Thread(target=messages.send, args=(ours, message, [file.fileno()]))
        sender.start()
        got, descriptors = messages.receive(theirs)
        sender.join()
        assert got == message
        assert [os.get_inheritable(each) for each in descriptors] == [False]
        with os.fdopen(descriptors[0]) as same:
            assert same.read() == "content"
        ours.close()
        with pytest.raises(EOFError):
            messages.receive(theirs)


def test_a_forked_process_is_waited_for_and_killed_as_popen_does() -> None:
    process = ForkedProcess(fork(request(), [], lambda: signal.pause() or os._exit(0)))
    assert process.poll() is None
    assert psutil.Process(process.pid).ppid() == os.getpid()
    with pytest.raises(TimeoutError):
        process.wait(0.01)
    process.kill()
    assert process.wait(PATIENCE_SECONDS) == process.returncode == -signal.SIGKILL
    process.kill()  # nothing happens where it has ended


class Answering:
    """A preloader's process that gives answers which are set: a thread of this one."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        ours, self.theirs = socket.socketpair()
        self.process = ForkedProcess(fork(request(), [], lambda: signal.pause() or os._exit(0)))
        self.preloader = Preloader(self.process, ours, {})
        self.requests = list[dict[str, Any]]()
        self._answers = answers
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with self.theirs:
            messages.send(self.theirs, {"refusal": ""})
            for answer in self._answers:
                got, descriptors = messages.receive(self.theirs)
                messages.close_all(descriptors)
                self.requests.append(got)
                messages.send(self.theirs, answer)

    def __enter__(self) -> Preloader:
        return self.preloader

    def __exit__(self, *_: object) -> None:
        self.preloader.close()
        self._thread.join(PATIENCE_SECONDS)


def test_a_preloader_that_has_ended_is_lost() -> None:
    with Answering() as preloader:
        assert preloader.ready()
        with pytest.raises(PreloaderLost):
            preloader.ask({"config": ""})


def test_a_preloader_that_cannot_fork_says_why() -> None:
    with Answering({"errno": errno.EAGAIN}) as preloader, pytest.raises(OSError) as caught:  # noqa: PT011 - the number says which
        preloader.fork_preloader()
    assert caught.value.errno == errno.EAGAIN
