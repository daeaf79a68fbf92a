"""The crew: who dies is replaced, so often and after such a pause; tiny real children, and time that the test tells."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Generator

import pytest

from ormo_rpc.runtimes.distributed.launcher import process_monitor as module
from ormo_rpc.runtimes.distributed.launcher.process_monitor import Crew, Post, killed, killed_or_failed
from ormo_rpc.runtimes.distributed.launcher.supervisor import DISMISSED, DONE, Child, Supervisor
from tests.support.processes import wait_until


class Clock:
    """Stands in for the module `time` of the crew."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """The time that was set."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def crew(clock: Clock) -> Generator[Crew]:  # noqa: ARG001 - it has to be there before
    told: list[str] = []
    with Supervisor(told.append) as supervisor:
        yield Crew(supervisor, max_restarts=2, backoff_seconds=4.0, tell=told.append)


class Start:
    """Starts children that end by these statuses, one after the other; a negative one is a signal. Counts them."""

    def __init__(self, crew: Crew, *statuses: int) -> None:
        self.crew = crew
        self.statuses = statuses
        self.lives: list[int] = []

    def __call__(self, life: int) -> Child:
        """Start the next one."""
        status = self.statuses[len(self.lives)]
        self.lives.append(life)
        end = f"os._exit({status})" if status >= 0 else f"os.kill(os.getpid(), {-status})"
        return self.crew.supervisor.start("it", [sys.executable, "-c", f"import os; {end}"], env=dict(os.environ), log=None)


def tended_until_buried(crew: Crew, post: Post) -> None:
    """Let the crew look until the present child has ended and is taken notice of."""

    def buried() -> bool:
        crew.tend()
        return post.child is None

    wait_until(buried, "the end of the child")


def test_who_has_done_its_work_is_not_replaced(crew: Crew) -> None:
    start = Start(crew, DONE)
    post = crew.add("it", start)
    tended_until_buried(crew, post)
    crew.tend()
    assert (post.done, post.given_up, start.lives) == (True, False, [0])
    assert crew.supervisor.children == []


def test_restarts_are_counted_and_the_pauses_double(crew: Crew, clock: Clock) -> None:
    start = Start(crew, 1, -signal.SIGKILL, 3)
    post = crew.add("it", start)
    tended_until_buried(crew, post)
    assert post.due == 104.0  # 4 s after the first death
    clock.now = 103.9
    crew.tend()
    assert start.lives == [0]
    clock.now = 104.0
    crew.tend()
    assert start.lives == [0, 1]
    tended_until_buried(crew, post)
    assert post.due == 112.0  # 8 s after the second
    clock.now = 112.0
    crew.tend()
    tended_until_buried(crew, post)
    assert (post.given_up, post.over, start.lives) == (True, True, [0, 1, 2])
    assert re.fullmatch(r"it \(pid \d+\) exited with status 3; restarted 2 times \(runtime\.max_restarts\)", post.obituary)


def test_the_pause_has_an_upper_end(crew: Crew, clock: Clock) -> None:
    crew.max_restarts = 100
    post = crew.add("it", Start(crew, *[1] * 7))
    pauses: list[float] = []
    for _ in range(6):
        tended_until_buried(crew, post)
        pauses.append(post.due - clock.now)
        clock.now = post.due
        crew.tend()
    assert pauses == [4, 8, 16, 30, 30, 30]


def test_after_a_long_life_the_pause_is_the_first_one_again(crew: Crew, clock: Clock) -> None:
    crew.max_restarts = 100
    post = crew.add("it", Start(crew, *[1] * 7))
    for _ in range(3):
        tended_until_buried(crew, post)
        clock.now = post.due
        crew.tend()
    clock.now += module.LONG_LIFE_SECONDS
    tended_until_buried(crew, post)
    assert post.due - clock.now == 4.0


@pytest.mark.parametrize(
    ("status", "restartable", "again"),
    [(1, killed_or_failed, True), (DISMISSED, killed_or_failed, False), (1, killed, False), (-signal.SIGSEGV, killed, True)],
)
def test_some_ends_are_final(crew: Crew, status: int, restartable: object, again: bool) -> None:
    post = crew.add("it", Start(crew, status), restartable=restartable)  # pyright: ignore[reportArgumentType] # one of two
    tended_until_buried(crew, post)
    assert post.given_up == (not again)
    assert (post.due > 0) == again
