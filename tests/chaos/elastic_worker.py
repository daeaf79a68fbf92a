"""Elastic workers without a launcher, which may be stopped or killed at a stage of their work.

``python -m tests.chaos.elastic_worker --address HOST:PORT --secret-file FILE --stage STAGE --signal NUMBER``. A worker sends
itself the signal at that stage; when it is continued, or without a stage, it works until the run ends or SIGTERM comes. It logs
to standard error. ``--in-turn 20`` and ``--at-once 32`` make processes for as many workers from one that has imported torch,
which is why there is hardly a wait between two of them; ``--stage`` may be given several times, and is then taken in turn.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from ormo_rpc.rendezvous.addresses import parse_address
from ormo_rpc.rendezvous.secret import read_secret
from ormo_rpc.runtimes.distributed.worker_process.context import WorkerArgs
from ormo_rpc.runtimes.distributed.worker_process.worker_loop import WorkerLoop
from ormo_rpc.runtimes.distributed.worker_process.worker_process import WorkerProcess
from ormo_rpc.signals import follow
from ormo_rpc.transports.base import Endpoint
from ormo_rpc.worker.faults import FaultInjector

STAGES = ("joined", "opening", "connected", "sending")
"""Has joined; the server has heard that it opens a data path, and serves its half; the path is open; a push is on the way."""
PUSH = 5
"""The first push at which the last stage may be reached."""
MAX_SECONDS = 0.002
"""Longest time from the beginning of a push to the signal: a small push and its reply take a millisecond or two."""
_log = logging.getLogger("ormo_rpc.chaos")


def main() -> None:
    """Run the command line."""
    given = _parse()
    logging.basicConfig(level=logging.INFO, format="%(process)d %(message)s")
    stages = itertools.cycle(given.stage or [None])
    if given.in_turn:
        for stage in itertools.islice(stages, given.in_turn):
            os.waitpid(_fork(given, stage), 0)
    elif given.at_once:
        pids = [_fork(given, stage) for stage in itertools.islice(stages, given.at_once)]
        signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in pids])
        sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
    else:
        _work(given, next(stages))


def _fork(given: argparse.Namespace, stage: str | None) -> int:
    """Start a process with a worker; this one must have no other threads."""
    pid = os.fork()
    if pid == 0:
        try:
            _work(given, stage)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return pid


def _work(given: argparse.Namespace, stage: str | None) -> NoReturn:
    """Work until the run ends, or SIGTERM comes, and end this process."""
    secret = read_secret(str(given.secret_file))
    assert secret is not None
    worker = WorkerProcess(
        WorkerArgs(
            address=parse_address(given.address),
            secret=secret,
            preferred_worker=None,
            slot_id=f"chaos {os.getpid()}",
            restart_count=0,
            data_root=None,
            timeout_seconds=60.0,
            on_joined=lambda: None,
            report=_log.warning,
        )
    )
    torch.set_num_threads(1)
    if stage is not None:
        _Stage(stage, signal.Signals(given.signal)).install()
    follow(lambda _: worker.leave())
    worker.run()
    os._exit(0)  # threads of torch's may hold up an ordinary exit


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--secret-file", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--signal", type=int, default=int(signal.SIGKILL))
    parser.add_argument("--in-turn", type=int, metavar="WORKERS")
    parser.add_argument("--at-once", type=int, metavar="WORKERS")
    return parser.parse_args()


class _Stage:
    """The stage at which this process sends itself a signal, once.

    Args:
        name: One of `STAGES`.
        number: The signal.
    """

    def __init__(self, name: str, number: signal.Signals) -> None:
        self.name = name
        self.number = number
        self._pushes = 0
        self._sending = False
        self._reached = False

    def install(self) -> None:
        """Put the stage into the functions of the worker."""
        if self.name == "joined":
            _wrap(WorkerLoop, "_prepare", after=self.reach)
        elif self.name == "opening":
            for way in ("ask", "open_connection"):
                _wrap(Endpoint, way, after=self.reach)
        elif self.name == "connected":
            _wrap(WorkerLoop, "_work", before=self.reach)
        else:
            _wrap(FaultInjector, "before_push", after=self._push_begins)
            _wrap(FaultInjector, "drops_reply", before=self._push_ends)

    def reach(self) -> None:
        """Send the signal, unless it was sent before."""
        if not self._reached:
            self._reached = True
            _log.warning("stage %s", self.name)
            os.kill(os.getpid(), self.number)

    def _push_begins(self) -> None:
        self._pushes += 1
        self._sending = True
        if self._pushes == PUSH:
            _log.warning("stage %s", self.name)
        if self._pushes >= PUSH:
            threading.Timer(random.uniform(0, MAX_SECONDS), self._reach_if_sending).start()

    def _push_ends(self) -> None:
        self._sending = False

    def _reach_if_sending(self) -> None:
        """Send the signal where the push is still under way; else a later one is tried.

        A stop while it computes would count as computing, and be multiplied by the worker's slowness.
        """
        if self._sending and not self._reached:
            self._reached = True
            os.kill(os.getpid(), self.number)


def _wrap(
    owner: type, name: str, *, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        result = original(*args, **kwargs)
        after()
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    main()
