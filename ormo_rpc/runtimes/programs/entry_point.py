"""The entry point of the launcher's children: ``python -m ormo_rpc.runtimes.programs.entry_point ROLE ...``."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn, TypeVar

import torch
from typing_extensions import override

from ormo_rpc import console
from ormo_rpc.errors import ConfigError, Interrupted, Refused, ServerLost, WireError, WorkerBanned
from ormo_rpc.rendezvous.addresses import parse_address
from ormo_rpc.rendezvous.secret import Secret, read_secret
from ormo_rpc.runtimes.ddp.rank_process import RankArgs, RankProcess
from ormo_rpc.runtimes.distributed import memory
from ormo_rpc.runtimes.distributed.asking import ServerControl, WorkerControl, Working
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
W = TypeVar("W", bound=Working)


class Child:
    """This process as a child of a launcher, from its arguments to its exit status.

    It sends heartbeats from now on, obeys the launcher, and ends with it.

    Args:
        argv: The command line; by default this process's.

    Attributes:
        serves: The process is the server.
        is_rank: The process is a rank of ``runtime=ddp``.
        joined_at: File and line of the call of `join` in a script whose loop has not begun; else empty.
        has_worked: The server has taken a gradient of this process's own loop, so that what ends it may not come again.
    """

    def __init__(self, argv: Sequence[str] | None = None) -> None:
        console.install()  # the log may be on a disk that is full
        arguments = self._arguments = _parse(argv)
        memory.raise_oom_score(arguments.oom_score)
        os.set_inheritable(arguments.report_fd, False)
        os.set_inheritable(arguments.control_fd, False)
        self.serves = arguments.role == "server"
        self.is_rank = arguments.role == "rank"
        self.joined_at = ""
        self.has_worked = False
        self.reporter = Reporter(arguments.report_fd, arguments.heartbeat_seconds)
        _log_to(self.reporter, stderr=arguments.log)
        self._worker_control = WorkerControl() if arguments.role == "worker" else None
        self._server_control = None if self._worker_control is not None else ServerControl(arguments.incarnation)
        if self._server_control is not None:
            control = self._server_control
            obey_supervisor(arguments.control_fd, control.handle)
            follow(control.stop, lambda: control.handle({"checkpoint": True}))
        elif self._worker_control is not None:
            leave = self._worker_control.leave
            obey_supervisor(arguments.control_fd, lambda _: leave())
            follow(leave)

    def set_up_torch(self) -> None:
        """Set torch's number of threads and default dtype to those of the run."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.set_default_dtype(getattr(torch, self._arguments.default_dtype))

    def serve(self, serve: Serve, loaded: LoadedJob | None = None) -> dict[str, Any]:
        """Serve to the end of the run; return the summary.

        Args:
            serve: Runs the server, such as `server_process.serve`.
            loaded: The job that this process was forked with.

        Raises:
            Interrupted: by a signal.
        """
        arguments, control = self._arguments, self._server_control
        assert control is not None, "this process is the server"
        args = server_process.ServerArgs(
            run_dir=arguments.run_dir,
            began=arguments.began,
            listening_socket=socket.socket(fileno=arguments.listener_fd),
            secret=_secret(arguments.secret_file),
            incarnation=arguments.incarnation,
            terminal_fd=arguments.terminal_fd,
            start=arguments.start,
            loaded=loaded,
            report=self.reporter.report,
        )

        def on_ready(server: server_process.ServerProcess) -> None:
            control.connect(server)
            if arguments.store is not None:
                store = connect(arguments.store, arguments.start_timeout_seconds)
                store.set(SECRET_FILE, str(arguments.secret_file or ""))
                store.set(ADDRESS, arguments.address)

        summary = serve(args, on_ready)
        if summary["status"] == "interrupted":
            raise Interrupted(Signals[summary["reason"]])
        if arguments.store is not None:  # by this process, as the launcher would have to load torch for it
            tell_result(arguments.store, summary)
        return summary

    def take_part(self, loaded: LoadedJob | None = None) -> None:
        """Train to the end of a run of ``runtime=ddp``.

        Args:
            loaded: The job that this process was forked with.

        Raises:
            Interrupted: by a signal.
        """
        arguments, control = self._arguments, self._server_control
        assert control is not None, "it is asked to stop as a server is"
        process = RankProcess(
            RankArgs(
                rank=arguments.rank,
                size=arguments.size,
                run_dir=arguments.run_dir,
                began=arguments.began,
                store_file=arguments.store_file,
                store=arguments.store,
                interface=arguments.interface,
                one_machine=arguments.one_machine,
                timeout_seconds=arguments.start_timeout_seconds,
                round_timeout_seconds=arguments.round_timeout_seconds,
                start=arguments.start,
                terminal_fd=arguments.terminal_fd,
                loaded=loaded,
            )
        )
        control.connect(process)
        process.run()

    @contextlib.contextmanager
    def working(self, make: Callable[[WorkerArgs], W], loaded: LoadedJob | None = None) -> Generator[W]:
        """Lend a worker, which leaves when this process is asked to.

        Args:
            make: Makes it.
            loaded: The job that this process was forked with.

        Raises:
            Interrupted: at the end, where it has left on a signal.
        """
        arguments, control = self._arguments, self._worker_control
        assert control is not None, "this process works"
        if arguments.store is None:
            address, secret_file = arguments.address, arguments.secret_file
        else:
            store = connect(arguments.store, arguments.start_timeout_seconds)
            address, secret_file = wait_for(store, (ADDRESS, SECRET_FILE), arguments.start_timeout_seconds)
        worker = make(
            WorkerArgs(
                address=parse_address(address),
                secret=_secret(secret_file or None),
                preferred_worker=arguments.preferred_worker,
                slot_id=arguments.slot_id,
                restart_count=arguments.restart_count,
                data_root=arguments.data_root,
                transport=arguments.transport,
                device=arguments.device,
                timeout_seconds=arguments.start_timeout_seconds,
                report=self.reporter.report,
                on_joined=self.reporter.joined,
                announce=not arguments.log,
                loaded=loaded,
            )
        )
        control.connect(worker)
        yield worker
        if control.left_on is not None:
            raise Interrupted(control.left_on)

    def end(self, error: BaseException | None = None, *, place: str = "", final: bool = False) -> NoReturn:
        """End this process; report the reason of a failure to the supervisor.

        Args:
            error: What has ended its work; None where that is done.
            place: File and line of the user's code that it comes from, where that is known.
            final: A replacement would meet it as well.
        """
        if error is not None and not isinstance(error, Interrupted):
            self.reporter.exit_reason(f"{place}: {reason_of_end(error)}" if place else reason_of_end(error))
            if self._arguments.log or not isinstance(error, EXPECTED_ERRORS):
                traceback.print_exception(error)
            # Threads of torch's RPC agent may hold up an ordinary exit.
            if isinstance(error, ServerLost):
                os._exit(EXIT_SERVER_LOST)
            os._exit(EXIT_NO_RESTART if final or isinstance(error, (WorkerBanned, Refused, ConfigError)) else 1)
        # Finalising the interpreter can take seconds without a heartbeat, which a supervisor would take for a death.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_DONE if error is None else 128 + error.number)


Serve = Callable[[server_process.ServerArgs, Callable[[server_process.ServerProcess], None]], dict[str, Any]]
"""Runs a server to the end of its run, and returns the summary; calls the function as soon as it can be asked to stop."""


def main(argv: Sequence[str] | None = None, loaded: LoadedJob | None = None) -> NoReturn:
    """Run the server, a worker or a rank, as the command line says; report the reason of a failure to the supervisor.

    Args:
        argv: The command line; by default this process's.
        loaded: The job that this process was forked with.
    """
    child = Child(argv)
    if loaded is None:  # else they were set before it was loaded, and its modules may have set others
        child.set_up_torch()
    try:
        if child.serves:
            child.serve(server_process.serve, loaded)
        elif child.is_rank:
            child.take_part(loaded)
        else:
            with child.working(WorkerProcess, loaded) as worker:
                worker.run()
    except BaseException as error:
        child.end(error)
    child.end()


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

    parser = argparse.ArgumentParser(description=__doc__)
    roles = parser.add_subparsers(required=True, dest="role")
    server = roles.add_parser("server", parents=[common])
    server.set_defaults(oom_score=memory.SERVER)
    server.add_argument("--incarnation", type=int, default=0, help="earlier processes of this server")
    server.add_argument("--run-dir", type=Path, required=True, help="with the run's config.yaml")
    server.add_argument("--began", type=float, required=True, help="start of the run on the monotonic clock")
    server.add_argument("--listener-fd", type=int, required=True, help="listening socket")
    server.add_argument("--start", default="spawn", help="the way in which processes are started, for the summary")
    server.add_argument("--terminal-fd", type=int, help="terminal for the progress bar, where there is one")

    worker = roles.add_parser("worker", parents=[common])
    worker.set_defaults(oom_score=memory.WORKER)
    worker.add_argument("--restart-count", type=int, default=0, help="earlier processes in this slot")
    worker.add_argument("--preferred-worker", type=int, help="worker number to have, if it is free")
    worker.add_argument("--slot-id", default="", help="process slot, which a replacement has as well")
    worker.add_argument("--data-root", help="folder of the data set on this machine")
    worker.add_argument("--transport", type=json.loads, help="its own transport, as JSON; by default the one of the run")
    worker.add_argument("--device", help="its own worker.device; by default that of the run")

    rank = roles.add_parser("rank", parents=[common])
    rank.set_defaults(oom_score=memory.WORKER, incarnation=0)
    rank.add_argument("--rank", type=int, required=True, help="number of this rank")
    rank.add_argument("--size", type=int, required=True, help="number of ranks")
    rank.add_argument("--run-dir", type=Path, required=True, help="of rank 0, with the run's config.yaml")
    rank.add_argument("--began", type=float, required=True, help="start of the run on the monotonic clock")
    rank.add_argument("--store-file", type=Path, help="of the ranks' store, where it is not torchrun's")
    rank.add_argument("--interface", help="network interface between the nodes")
    rank.add_argument("--one-machine", action="store_true", help="all ranks are on this machine")
    rank.add_argument("--round-timeout-seconds", type=float, required=True, help="for each operation of the process group")
    rank.add_argument("--start", default="spawn", help="the way in which processes are started, for the summary")
    rank.add_argument("--terminal-fd", type=int, help="terminal for the progress bar, where there is one")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
