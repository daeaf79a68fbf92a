"""The entry point of every child process: ``python -m ormo_rpc.runtimes.distributed.entry_point``, started by the launcher only."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public

from ormo_rpc.errors import ConfigError, Refused, ServerLost, WireError, WorkerBanned
from ormo_rpc.rendezvous.addresses import parse
from ormo_rpc.rendezvous.secret import Secret, read_secret
from ormo_rpc.runtimes.distributed.launcher.supervisor import DONE, EXIT_NO_RESTART, Report, listen_to_supervisor
from ormo_rpc.runtimes.distributed.server_process import server_process
from ormo_rpc.runtimes.distributed.worker_process.loop import WorkerArgs
from ormo_rpc.runtimes.distributed.worker_process.worker_process import WorkerProcess

EXPECTED = (WorkerBanned, ServerLost, WireError, ConfigError, OSError)
"""Errors whose message says everything."""


def main() -> None:
    """Be the server or a worker, as the arguments say; where it fails, the supervisor is told why."""
    arguments = _parse()
    os.set_inheritable(arguments.report, False)
    os.set_inheritable(arguments.control, False)
    report = Report(arguments.report, arguments.heartbeat)
    _log_to(report, also_here=arguments.log)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        if arguments.role == "server":
            _serve(arguments, report.say)
        else:
            _work(arguments, report.say)
    except BaseException as error:
        report.last_words(f"{type(error).__name__}: {' '.join(str(error).split())}")
        if arguments.log or not isinstance(error, EXPECTED):
            with contextlib.suppress(OSError):  # the log may lie on the full disk that this is about
                traceback.print_exc()
        final = isinstance(error, (WorkerBanned, Refused))  # another try would end as this one did
        os._exit(EXIT_NO_RESTART if final else 1)  # threads of the RPC agent may hold up an ordinary exit
    # Taking the interpreter apart can take seconds, without a sign of life: a supervisor would see a death in it.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(DONE)


def _serve(arguments: argparse.Namespace, tell: Callable[[str], None]) -> None:
    hosts: list[server_process.ServerProcess] = []
    early: list[dict[str, Any]] = []
    turn = threading.Lock()
    """Guards both, so that no message falls between being early and being heard."""

    def on_message(message: dict[str, Any]) -> None:
        with turn:
            if hosts:
                hosts[0].hear(message)
            elif "stop" in message:
                os._exit(1)  # nothing has begun, so there is nothing to keep
            else:
                early.append(message)

    listen_to_supervisor(arguments.control, on_message)
    listener = socket.socket(fileno=arguments.listener)
    secret = _secret(arguments.secret_file)
    place = server_process.ServerArgs(
        run_dir=arguments.run_dir,
        listener=listener,
        secret=secret,
        life=arguments.life,
        terminal=arguments.terminal,
        tell=tell,
    )

    def on_ready(host: server_process.ServerProcess) -> None:
        with turn:
            hosts.append(host)
            for message in early:
                host.hear(message)
        if arguments.store is not None:
            store = _store(arguments)
            store.set("secret_file", str(arguments.secret_file or ""))
            store.set("door", arguments.door)

    server_process.serve(place, on_ready)


def _work(arguments: argparse.Namespace, tell: Callable[[str], None]) -> None:
    if arguments.store is None:
        address, secret = arguments.door, _secret(arguments.secret_file)
    else:
        store = _store(arguments)
        address = store.get("door").decode()
        secret = _secret(store.get("secret_file").decode() or None)
    door = parse(address)
    worker = WorkerProcess(
        WorkerArgs(
            door=lambda: door,
            secret=secret,
            wanted=arguments.worker,
            slot=arguments.slot,
            life=arguments.life,
            data_root=arguments.data_root,
            timeout_seconds=arguments.start_timeout,
            tell=tell,
        )
    )
    listen_to_supervisor(arguments.control, lambda _: worker.leave())
    _on_sigterm(worker.leave)
    worker.run()


def _on_sigterm(leave: Callable[[], None]) -> None:
    """Leave on SIGTERM, also while the main thread waits within torch, where no handler of Python's would run."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        with reading, writing:
            while signal.SIGTERM not in reading.recv(64):
                pass
            leave()
            threading.Event().wait()  # keep the descriptors, which the handler writes to

    threading.Thread(target=listen, name="SIGTERM", daemon=True).start()


def _secret(file: str | None) -> Secret:
    secret = read_secret(file)
    assert secret is not None, "the launcher sees to it that there is one"
    return secret


def _store(arguments: argparse.Namespace) -> PrefixStore:
    """The store of torchrun's agent, where the server leaves its address for the workers."""
    host, _, port = arguments.store.rpartition(":")
    timeout = timedelta(seconds=arguments.start_timeout)
    store = TCPStore(host, int(port), is_master=False, timeout=timeout, wait_for_workers=False)
    return PrefixStore(arguments.prefix, store)


class _Tell(logging.Handler):
    """Hands warnings to the supervisor, which shows them to people."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Hand one on."""
        self.report.say(record.getMessage())


def _log_to(report: Report, *, also_here: bool) -> None:
    """Send our own messages to the supervisor, and to our log where we have one."""
    ours = logging.getLogger("ormo_rpc")
    ours.setLevel(logging.INFO)
    ours.addHandler(_Tell(report))
    if also_here:
        here = logging.StreamHandler()
        here.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        ours.addHandler(here)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("server", "worker"))
    parser.add_argument("--life", type=int, default=0, help="how often it was started before")
    parser.add_argument("--door", metavar="HOST:PORT", help="where workers are let in")
    parser.add_argument("--listener", type=int, help="of the server: the door's socket")
    parser.add_argument("--secret-file", help="by default, the environment has the secret")
    parser.add_argument("--store", metavar="HOST:PORT", help="where the server leaves the door's address, under torchrun")
    parser.add_argument("--prefix", default="ormo_rpc", help="what our keys in that store begin with")
    parser.add_argument("--start-timeout", type=float, default=180.0, metavar="SECONDS")
    parser.add_argument("--heartbeat", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--run-dir", type=Path, help="of the server")
    parser.add_argument("--terminal", type=int, help="of the server: descriptor for the progress bar")
    parser.add_argument("--worker", type=int, help="of a worker: the number to have, if it is free")
    parser.add_argument("--slot", default="", help="of a worker: who keeps it running")
    parser.add_argument("--data-root", help="of a worker: where the data set lies on this machine")
    parser.add_argument("--log", action="store_true", help="output goes to a log of its own")
    parser.add_argument("--control", type=int, required=True, help="reading end of the supervisor's pipe")
    parser.add_argument("--report", type=int, required=True, help="writing end of the pipe to the supervisor")
    return parser.parse_args()


if __name__ == "__main__":
    main()
