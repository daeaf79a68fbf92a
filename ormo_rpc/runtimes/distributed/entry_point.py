"""The entry point of the launcher's children: ``python -m ormo_rpc.runtimes.distributed.entry_point server|worker ...``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc import console
from ormo_rpc.errors import ConfigError, Interrupted, Refused, ServerLost, WireError, WorkerBanned
from ormo_rpc.rendezvous.addresses import parse_address
from ormo_rpc.rendezvous.secret import Secret, read_secret
from ormo_rpc.runtimes.distributed import memory
from ormo_rpc.runtimes.distributed.launcher.child import EXIT_DONE, EXIT_NO_RESTART, EXIT_SERVER_LOST, Reporter, obey_supervisor
from ormo_rpc.runtimes.distributed.server_process import server_process
from ormo_rpc.runtimes.distributed.shortages import reason_of_end
from ormo_rpc.runtimes.distributed.worker_process.context import WorkerArgs
from ormo_rpc.runtimes.distributed.worker_process.worker_process import WorkerProcess
from ormo_rpc.runtimes.job import LoadedJob
from ormo_rpc.runtimes.torchrun_store import ADDRESS, SECRET_FILE, connect, tell_result, wait_for
from ormo_rpc.signals import follow

EXPECTED_ERRORS = (WorkerBanned, ServerLost, WireError, ConfigError, OSError)
"""Their messages suffice: no traceback is shown for them."""


def main(argv: Sequence[str] | None = None, loaded: LoadedJob | None = None) -> None:
    """Run the server or a worker, as the command line says; report the reason of a failure to the supervisor.

    Args:
        argv: The command line; by default this process's.
        loaded: The job that this process was forked with.
    """
    console.install()  # the log may be on a disk that is full
    arguments = _parse(argv)
    memory.raise_oom_score(arguments.oom_score)
    arguments.loaded = loaded
    os.set_inheritable(arguments.report_fd, False)
    os.set_inheritable(arguments.control_fd, False)
    reporter = Reporter(arguments.report_fd, arguments.heartbeat_seconds)
    _log_to(reporter, stderr=arguments.log)
    if loaded is None:  # else they were set before it was loaded, and its modules may have set others
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.set_default_dtype(getattr(torch, arguments.default_dtype))
    status = EXIT_DONE
    try:
        arguments.run(arguments, reporter)
    except Interrupted as error:
        status = 128 + error.number
    except BaseException as error:
        reporter.exit_reason(reason_of_end(error))
        if arguments.log or not isinstance(error, EXPECTED_ERRORS):
            traceback.print_exc()
        # Threads of torch's RPC agent may hold up an ordinary exit.
        if isinstance(error, ServerLost):
            os._exit(EXIT_SERVER_LOST)
        os._exit(EXIT_NO_RESTART if isinstance(error, (WorkerBanned, Refused, ConfigError)) else 1)
    # Finalising the interpreter can take seconds without a heartbeat, which a supervisor would take for a death.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run_server(arguments: argparse.Namespace, reporter: Reporter) -> None:
    control = _ServerControl(arguments.incarnation)
    obey_supervisor(arguments.control_fd, control.handle)
    follow(control.stop, lambda: control.handle({"checkpoint": True}))
    args = server_process.ServerArgs(
        run_dir=arguments.run_dir,
        began=arguments.began,
        listening_socket=socket.socket(fileno=arguments.listener_fd),
        secret=_secret(arguments.secret_file),
        incarnation=arguments.incarnation,
        terminal_fd=arguments.terminal_fd,
        start=arguments.start,
        loaded=arguments.loaded,
        report=reporter.report,
    )

    def on_ready(server: server_process.ServerProcess) -> None:
        control.connect(server)
        if arguments.store is not None:
            store = connect(arguments.store, arguments.start_timeout_seconds)
            store.set(SECRET_FILE, str(arguments.secret_file or ""))
            store.set(ADDRESS, arguments.address)

    summary = server_process.serve(args, on_ready)
    if summary["status"] == "interrupted":
        raise Interrupted(Signals[summary["reason"]])
    if arguments.store is not None:  # by this process, as the launcher would have to load torch for it
        tell_result(arguments.store, summary)


def _run_worker(arguments: argparse.Namespace, reporter: Reporter) -> None:
    control = _WorkerControl()
    obey_supervisor(arguments.control_fd, lambda _: control.leave())
    follow(control.leave)
    if arguments.store is None:
        address, secret_file = arguments.address, arguments.secret_file
    else:
        store = connect(arguments.store, arguments.start_timeout_seconds)
        address, secret_file = wait_for(store, (ADDRESS, SECRET_FILE), arguments.start_timeout_seconds)
    worker = WorkerProcess(
        WorkerArgs(
            address=parse_address(address),
            secret=_secret(secret_file or None),
            preferred_worker=arguments.preferred_worker,
            slot_id=arguments.slot_id,
            restart_count=arguments.restart_count,
            data_root=arguments.data_root,
            transport=arguments.transport,
            timeout_seconds=arguments.start_timeout_seconds,
            report=reporter.report,
            on_joined=reporter.joined,
            announce=not arguments.log,
            loaded=arguments.loaded,
        )
    )
    control.connect(worker)
    worker.run()
    if control.left_on is not None:
        raise Interrupted(control.left_on)


class _ServerControl:
    """Hands the supervisor's messages and the signals to the server, also those that come before it is ready.

    `_lock` guards the server and the early messages, so that each message is handled once and in order.

    Args:
        incarnation: The number of earlier processes of this server.
    """

    def __init__(self, incarnation: int) -> None:
        self._lock = threading.Lock()
        self._nothing_to_save = incarnation == 0
        """Before the server is ready; a later incarnation has the journal's pushes, which no checkpoint has."""
        self._server: server_process.ServerProcess | None = None
        self._early: list[dict[str, Any]] = []

    def stop(self, number: Signals) -> None:
        """Stop on a signal, as on the supervisor's message."""
        self.handle({"stop": {"status": "interrupted", "reason": number.name}})

    def handle(self, message: dict[str, Any]) -> None:
        """Handle a message, or keep it until there is a server; ``stop`` ends a process that has nothing to save."""
        with self._lock:
            if self._server is not None:
                self._server.handle(message)
            elif "stop" in message and self._nothing_to_save:
                os._exit(128 + Signals[message["stop"]["reason"]])
            else:
                self._early.append(message)

    def connect(self, server: server_process.ServerProcess) -> None:
        """Hand the early messages to the server, and all later ones."""
        with self._lock:
            self._server = server
            for message in self._early:
                server.handle(message)


class _WorkerControl:
    """Lets the worker leave when the supervisor or a signal asks for it, also before there is one.

    `_lock` guards the worker.

    Attributes:
        left_on: The first signal that asked for it; None where there was none.
    """

    def __init__(self) -> None:
        self.left_on: Signals | None = None
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None

    def leave(self, number: Signals | None = None) -> None:
        """Leave; a process that has no worker yet ends at once."""
        self.left_on = self.left_on or number
        with self._lock:
            if self._worker is None:
                os._exit(EXIT_DONE if number is None else 128 + number)
            # By another thread, as a server that hangs takes its time, and this one has to notice the supervisor's end.
            threading.Thread(target=self._worker.leave, name="leave", daemon=True).start()

    def connect(self, worker: WorkerProcess) -> None:
        """Ask this worker from now on."""
        with self._lock:
            self._worker = worker


def _secret(file: str | None) -> Secret:
    secret = read_secret(file)
    assert secret is not None, "the launcher has checked that there is one"
    return secret


class _ReportHandler(logging.Handler):
    """Sends warnings to the supervisor, which shows them to people."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.report(record.getMessage())


def _log_to(reporter: Reporter, *, stderr: bool) -> None:
    """Send the package's warnings to the supervisor and, where standard error is a log of ours, all messages there."""
    logger = logging.getLogger("ormo_rpc")
    logger.setLevel(logging.INFO)
    logger.addHandler(_ReportHandler(reporter))
    if stderr:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)


def _parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--control-fd", type=int, required=True, help="reading end of the control pipe")
    common.add_argument("--report-fd", type=int, required=True, help="writing end of the report pipe")
    common.add_argument("--heartbeat-seconds", type=float, default=1.0, help="interval of the heartbeats on the report pipe")
    common.add_argument("--log", action="store_true", help="log to standard error, which is this process's own file")
    common.add_argument("--default-dtype", default="float32", help="of torch, in which models are built without another one")
    common.add_argument("--address", metavar="HOST:PORT", help="of the server's listener")
    common.add_argument("--secret-file", help="by default the environment has the secret")
    common.add_argument("--store", metavar="HOST:PORT", help="torchrun's store, in which the server leaves its address")
    common.add_argument("--start-timeout-seconds", type=float, default=180.0, help="to reach the server, or the store")

    common.set_defaults(loaded=None)

    parser = argparse.ArgumentParser(description=__doc__)
    roles = parser.add_subparsers(required=True)
    server = roles.add_parser("server", parents=[common])
    server.set_defaults(run=_run_server, oom_score=memory.SERVER)
    server.add_argument("--incarnation", type=int, default=0, help="earlier processes of this server")
    server.add_argument("--run-dir", type=Path, required=True, help="with the run's config.yaml")
    server.add_argument("--began", type=float, required=True, help="start of the run on the monotonic clock")
    server.add_argument("--listener-fd", type=int, required=True, help="listening socket")
    server.add_argument("--start", default="spawn", help="the way in which processes are started, for the summary")
    server.add_argument("--terminal-fd", type=int, help="terminal for the progress bar, where there is one")

    worker = roles.add_parser("worker", parents=[common])
    worker.set_defaults(run=_run_worker, oom_score=memory.WORKER)
    worker.add_argument("--restart-count", type=int, default=0, help="earlier processes in this slot")
    worker.add_argument("--preferred-worker", type=int, help="worker number to have, if it is free")
    worker.add_argument("--slot-id", default="", help="process slot, which a replacement has as well")
    worker.add_argument("--data-root", help="folder of the data set on this machine")
    worker.add_argument("--transport", type=json.loads, help="its own transport, as JSON; by default the one of the run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
