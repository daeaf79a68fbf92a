"""The crew: every process that this launcher has to keep at work, and a replacement for each one that dies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ormo_rpc.runtimes.distributed.launcher.supervisor import DISMISSED, DONE, Child, Supervisor

LONGEST_BACKOFF_SECONDS = 30.0
"""The pause before a restart doubles each time, up to this."""
LONG_LIFE_SECONDS = 300.0
"""After a life of at least this, the pause is the first one again."""


@dataclass
class Post:
    """A place in the crew: the server's, or a worker's.

    Attributes:
        name: For messages.
        worker: The worker number; None for the server's, and a guest's.
        start: ``start(life)`` starts the child that fills it; lives count from 0.
        restartable: Whether a child that ended in this way is replaced.
        essential: The run does not go on without it, so giving it up is not told here but by whoever ends the run.
        child: Who fills it; None between two lives.
        lives: How many children it has had.
        failures: How many of them in a row have ended soon.
        began: When the present one was started, on the monotonic clock.
        due: When the next one starts, on the monotonic clock.
        obituary: How the last child ended, where it was not by having done its work.
        done: Its work is done.
        given_up: Nobody will fill it any more.
    """

    name: str
    worker: int | None
    start: Callable[[int], Child]
    restartable: Callable[[Child], bool]
    essential: bool
    child: Child | None = None
    lives: int = 0
    failures: int = 0
    began: float = 0.0
    due: float = 0.0
    obituary: str = ""
    done: bool = False
    given_up: bool = False

    @property
    def over(self) -> bool:
        """Nobody fills it, and nobody will."""
        return self.done or self.given_up


def killed_or_failed(child: Child) -> bool:
    """Restart a worker whatever it died of, unless it was dismissed or refused."""
    return child.exit_code != DISMISSED


def killed(child: Child) -> bool:
    """Restart the server where something else ended it; an error of its own would come again."""
    return child.exit_code is not None and child.exit_code < 0


class Crew:
    """Keeps its posts filled.

    Args:
        supervisor: Starts and watches the children.
        max_restarts: How often each post is filled again.
        backoff_seconds: The pause before the first restart of a post; each further one is twice as long, until a life lasts.
        tell: Called with what people should know.
    """

    def __init__(
        self, supervisor: Supervisor, *, max_restarts: int, backoff_seconds: float, tell: Callable[[str], None]
    ) -> None:
        self.supervisor = supervisor
        self.max_restarts = max_restarts
        self.backoff_seconds = backoff_seconds
        self.tell = tell
        self.posts: list[Post] = []

    def add(
        self,
        name: str,
        start: Callable[[int], Child],
        *,
        worker: int | None = None,
        restartable: Callable[[Child], bool] = killed_or_failed,
        essential: bool = False,
    ) -> Post:
        """Add a post and fill it."""
        post = Post(name, worker, start, restartable, essential)
        self.posts.append(post)
        self._fill(post)
        return post

    def tend(self) -> None:
        """Look after every post once: bury the dead, and start whoever is due."""
        for post in self.posts:
            if post.child is not None and not post.child.running:
                self._bury(post, post.child)
            if post.child is None and not post.over and time.monotonic() >= post.due:
                self._fill(post)

    def _fill(self, post: Post) -> None:
        post.began = time.monotonic()
        post.child = post.start(post.lives)
        post.lives += 1

    def _bury(self, post: Post, child: Child) -> None:
        post.child = None
        self.supervisor.bury(child)
        if child.exit_code == DONE:
            post.done = True
            return
        post.obituary = child.obituary()
        restarts = post.lives - 1
        exhausted = restarts >= self.max_restarts
        if exhausted or not post.restartable(child):
            post.given_up = True
            post.obituary += f"; restarted {restarts} times (runtime.max_restarts)" if exhausted and restarts else ""
            if not post.essential:
                self.tell(f"{post.obituary}; the run goes on without it")
        else:
            post.failures = 0 if time.monotonic() - post.began >= LONG_LIFE_SECONDS else post.failures + 1
            pause = min(LONGEST_BACKOFF_SECONDS, self.backoff_seconds * 2 ** max(0, post.failures - 1))
            post.due = time.monotonic() + pause
            self.tell(f"{post.obituary}; starting it again in {pause:g} s ({restarts + 1} of {self.max_restarts} restarts)")
