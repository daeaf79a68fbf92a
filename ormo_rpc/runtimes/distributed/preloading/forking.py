"""Forks of a preloader: each becomes the launcher's own child, with nothing of the preloader but its memory.

The preloader forks an intermediate process, which forks the child and ends. The child then belongs to the launcher, the nearest
process that adopts (`linux.adopting`), so that the launcher learns its exit status and may end it, and the end of the preloader
concerns nobody. Only then the preloader tells the child to go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import os
import random
import sys
import traceback
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy.random
import torch

from ormo_rpc.runtimes.distributed.preloading.safety import open_descriptors
from ormo_rpc.runtimes.distributed.starter import outcome, pipe
from ormo_rpc.runtimes.linux import die_with_parent, set_title
from ormo_rpc.signals import block, blocked, restore, withstand

_GO = b"g"
_SEED = torch.Generator().initial_seed()
"""That of a process in which nobody has seeded torch."""


@dataclass(frozen=True, kw_only=True)
class ForkRequest:
    """The process that a launcher wants.

    Attributes:
        launcher: Process number of the launcher.
        name: For ``ps`` and ``top``.
        title: Its command line there.
        environment: Its environment.
        path: Its module path.
        directory: Its current directory; empty for that of the preloader.
        output: Its standard output and error; None for those of the preloader.
        keeps_random: The next random numbers are those of the preloader.
    """

    launcher: int
    name: str
    title: Sequence[str]
    environment: Mapping[str, str]
    path: Sequence[str]
    directory: str
    output: int | None
    keeps_random: bool = False

    def beside(self, loading: Mapping[str, Any]) -> ForkRequest:
        """Return the request with what this process has changed about itself, except where the launcher has since.

        Args:
            loading: The launcher's environment, path and directory when this process got them.
        """
        theirs = loading["environment"]
        changed = {name: value for name, value in self.environment.items() if value != theirs.get(name)}
        kept = {name: value for name, value in os.environ.items() if name in self.environment or name not in theirs}
        return dataclasses.replace(
            self,
            environment={**kept, **changed},
            path=list(sys.path) if self.path == loading["path"] else self.path,
            directory=str(Path.cwd()) if self.directory == loading["directory"] else self.directory,
        )

    def apply(self, keep: Collection[int]) -> None:
        """Make this process, which was just forked, the one that is wanted.

        Args:
            keep: Its descriptors, besides standard ones.
        """
        os.setsid()
        if self.output is not None:
            os.dup2(self.output, 1)
            os.dup2(self.output, 2)
        for number in open_descriptors():
            if number > 2 and number not in keep:
                with contextlib.suppress(OSError):  # that of the look itself
                    os.close(number)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.path[:] = self.path
        if self.directory:
            os.chdir(self.directory)
        set_title(self.name, list(self.title))
        if not self.keeps_random:
            numpy.random.seed()  # random's own was seeded at the fork, by Python
            torch.default_generator.manual_seed(_SEED)
        gc.enable()


def fork(request: ForkRequest, keep: Collection[int]) -> int:
    """Fork a process that becomes a child of the launcher; return its number, and 0 in it, as `os.fork` does.

    Signals that come are kept from it until it follows them (`signals.follow`), as from a process that is spawned.

    Args:
        request: The process.
        keep: Descriptors of this process that it has as well.

    Raises:
        OSError: it cannot be forked.
    """
    gc.disable()
    gc.freeze()  # a collection in a fork would write to all memory that it shares, and so copy it
    drawn = random.getstate()
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as tellers:
        ours.callback(restore, block())
        number, told = pipe(ours, tellers)
        word, go = pipe(ours, ours)
        intermediate = os.fork()
        if intermediate == 0:
            with _or_end():
                _fork_again(told)
                _become(request, keep, word, go)
                if request.keeps_random:
                    random.setstate(drawn)
            for stack in (ours, tellers):
                stack.pop_all()  # its descriptors are closed, and it blocks signals
            return 0
        tellers.close()  # so that the pipe ends with them
        os.waitpid(intermediate, 0)
        answer = int(os.read(number, 32).decode() or -errno.ESRCH)  # empty where they were killed
        if answer < 0:
            raise OSError(-answer, os.strerror(-answer))
        os.write(go, _GO)
        return answer


def apart(function: Callable[[], Any]) -> Any:
    """Run a function in a process that is forked for it and thrown away; return its result, of JSON's types.

    Raises:
        OSError: it cannot be forked.
        ChildProcessError: it died.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with contextlib.ExitStack() as stack:
        result, given = pipe(stack, stack)
        with blocked():
            child = os.fork()
            if child == 0:
                _answer(function, given, parent)
        stack.pop_all()
        os.close(given)
        with os.fdopen(result, "rb") as file:
            answer = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        raise ChildProcessError(outcome(status))
    return json.loads(answer)


def _answer(function: Callable[[], Any], given: int, parent: int) -> NoReturn:
    """In a process that is thrown away: run the function, and write its result."""
    with _or_end():
        die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        withstand()
        # Replaces torch's pool of threads, which the fork has lost, before two threads of this process try to at once.
        torch.set_num_threads(torch.get_num_threads())
        answer = json.dumps(function()).encode()
        sys.stdout.flush()
        with os.fdopen(given, "wb") as file:
            file.write(answer)
    os._exit(0)


def _fork_again(told: int) -> None:
    """In the intermediate process: fork the child, which tells its number; an error's is told as a negative one.

    Returns in the child alone.
    """
    try:
        child = os.fork()
    except OSError as error:
        os.write(told, str(-(error.errno or 1)).encode())
        os._exit(0)
    if child > 0:
        os._exit(0)
    with contextlib.suppress(BrokenPipeError):  # the preloader has ended, and says no word
        os.write(told, str(os.getpid()).encode())
    os.close(told)


def _become(request: ForkRequest, keep: Collection[int], word: int, go: int) -> None:
    """In the child: wait to be the launcher's, and become what is wanted."""
    os.close(go)
    if os.read(word, 1) != _GO:
        os._exit(1)
    die_with_parent()
    if os.getppid() != request.launcher:  # it has ended meanwhile
        os._exit(1)
    request.apply(keep)


@contextlib.contextmanager
def _or_end() -> Generator[None]:
    """End this process, which was forked in the middle of the preloader's work, where it fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
        os._exit(1)
