"""The processes that a launcher starts: all of them on this machine, this rank's one (torchrun, srun), or an elastic worker."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

from ormo_rpc import console
from ormo_rpc.config.saving import to_tree
from ormo_rpc.config.schema import Config
from ormo_rpc.data import DataSource
from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous.addresses import address_of, listen_at, parse_address
from ormo_rpc.rendezvous.interfaces import interface_of, is_loopback, specific_address
from ormo_rpc.rendezvous.secret import new_secret, read_secret, require_secret, write_secret
from ormo_rpc.runtimes import server_address
from ormo_rpc.runtimes.attempts import FormerRun, former_run, remember
from ormo_rpc.runtimes.distributed.launcher.process_monitor import ProcessMonitor, ProcessSlot, if_killed, unless_server_lost
from ormo_rpc.runtimes.distributed.launcher.rank_messages import Rank, server_over, with_interface
from ormo_rpc.runtimes.distributed.launcher.supervisor import ChildProcess, Supervisor
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading, child_environment, default_dtype
from ormo_rpc.runtimes.ranks import Ranks
from ormo_rpc.storage.counters import RunCounters
from ormo_rpc.transports.auto import Auto
from ormo_rpc.worker.options import WorkerOptions

FIRST_HEARTBEAT_SECONDS = 120.0
"""A child without a heartbeat by then counts as hung; on a busy machine the import of torch takes a while."""
CLOSING_SECONDS = 5.0
"""A killed server has closed its listener by then."""
SECRET_FILE = "secret"  # noqa: S105 - the name of a file
"""The file in the run directory, for workers of this machine that join later."""


class Launcher:
    """Starts the entry point with the arguments of each role.

    Args:
        supervisor: Starts and watches the processes.
        config: Of the run.
        preloading: Starts them.
        logs: The folder for their output; None for the launcher's own output.
    """

    def __init__(self, supervisor: Supervisor, config: Config, preloading: Preloading, *, logs: Path | None) -> None:
        self.supervisor = supervisor
        self.config = config
        self.preloading = preloading
        self.logs = logs
        self.environment = child_environment(config.runtime.threads)

    def server(
        self, run_dir: Path, began: float, listener: socket.socket, secret_file: Path | None, *more: str
    ) -> Callable[[int], ChildProcess]:
        """Return the function that starts the server (`ProcessSlot.start`).

        Args:
            run_dir: The run directory, with its ``config.yaml``.
            began: Time at which the run began, on the monotonic clock, which all processes of a machine share.
            listener: The listening socket, which outlives each incarnation of the server.
            secret_file: The file with the secret; None where the environment has it.
            more: Further arguments of its command line.
        """
        before = RunCounters.incarnations_of(run_dir)  # of an earlier start of torchrun's ranks

        def start(restart_count: int) -> ChildProcess:
            with _terminal() as terminal:
                return self._start(
                    "server",
                    [
                        *("server", "--incarnation", str(before + restart_count), "--run-dir", str(run_dir)),
                        *("--began", repr(began), "--start", self.preloading.way),
                        *_option("--secret-file", secret_file),
                        *more,
                    ],
                    {"--listener-fd": listener.fileno(), **({} if terminal is None else {"--terminal-fd": terminal})},
                )

        return start

    def worker(self, preferred_worker: int | None, *more: str, before: int = 0) -> Callable[[int], ChildProcess]:
        """Return the function that starts a worker (`ProcessSlot.start`).

        Args:
            preferred_worker: The worker number to have, if it is free; None for an elastic worker.
            more: Further arguments of its command line.
            before: Processes of it that an earlier launcher has started.
        """
        name = "worker" if preferred_worker is None else f"worker {preferred_worker}"
        slot_id = secrets.token_hex(8)

        def start(restart_count: int) -> ChildProcess:
            number = _option("--preferred-worker", preferred_worker)
            command = ["worker", "--restart-count", str(before + restart_count), "--slot-id", slot_id, *number, *more]
            return self._start(name, command, {})

        return start

    def rank(self, rank: int, run_dir: Path, began: float, *more: str) -> Callable[[int], ChildProcess]:
        """Return the function that starts a rank of ``runtime=ddp`` (`ProcessSlot.start`).

        Args:
            rank: Its number.
            run_dir: The run directory, of rank 0.
            began: Time at which the run began, on the monotonic clock.
            more: Further arguments of its command line.
        """
        options = self.config.ddp

        def start(_: int) -> ChildProcess:
            with _terminal() if rank == 0 else contextlib.nullcontext() as terminal:
                return self._start(
                    f"rank {rank}",
                    [
                        *("rank", "--rank", str(rank), "--size", str(self.config.num_workers), "--run-dir", str(run_dir)),
                        *("--began", repr(began), "--start", self.preloading.way, *_option("--interface", options.interface)),
                        *("--round-timeout-seconds", str(options.round_timeout_seconds), *more),
                    ],
                    {} if terminal is None else {"--terminal-fd": terminal},
                )

        return start

    def _start(self, name: str, command: list[str], descriptors: Mapping[str, int]) -> ChildProcess:
        options = self.config.live
        log = None if self.logs is None else self.logs / f"{name.replace(' ', '_')}.log"
        return self.supervisor.start(
            name,
            [
                *command,
                *("--start-timeout-seconds", str(options.start_timeout_seconds)),
                *("--heartbeat-seconds", str(options.heartbeat_seconds)),
                *("--default-dtype", default_dtype()),
                *([] if log is None else ["--log"]),
            ],
            env=self.environment,
            log=log,
            descriptors=descriptors,
            timeout_seconds=options.worker_timeout_seconds,
            start_timeout_seconds=FIRST_HEARTBEAT_SECONDS,
            starter=self.preloading,
        )


@contextlib.contextmanager
def local_processes(
    monitor: ProcessMonitor, config: Config, preloading: Preloading, run_dir: Path, began: float
) -> Generator[ProcessSlot]:
    """Start server and workers on this machine; the value is the server's slot."""
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    secret_file = _run_secret(config, run_dir)
    with listen_at(config.server.address or "127.0.0.1:0", public=config.server.public) as listener:
        if config.may_have_agents:
            interface_of(specific_address(listener.getsockname()[0]))  # refuses an address where no agent can listen
        launcher = Launcher(monitor.supervisor, config, preloading, logs=logs)
        start_server = launcher.server(run_dir, began, listener, secret_file)
        server = monitor.add("server", start_server, should_restart=if_killed, essential=True)
        server_args = ("--address", address_of(listener), *_option("--secret-file", secret_file))
        for worker in range(config.num_processes):
            monitor.add(f"worker {worker}", launcher.worker(worker, *server_args), worker=worker)
        yield server


@contextlib.contextmanager
def rank_process(
    monitor: ProcessMonitor,
    config: Config,
    preloading: Preloading,
    run_dir: Path,
    ranks: Ranks,
    began: float,
    report: Callable[[str], None],
) -> Generator[ProcessSlot]:
    """Start the one process of this rank; the value is its slot.

    The server leaves its address in the store of torchrun's agent, and keeps it when torchrun starts the ranks again: workers
    of nodes whose ranks go on look for it there. Without such a store the server listens where all ranks were told.
    """
    store = ("--store", ranks.master) if ranks.agent_store else ()
    launcher = Launcher(monitor.supervisor, config, preloading, logs=None)
    if ranks.rank > 0:
        address = server_address.without_store(config, ranks)
        server_args = store or ("--address", address, *_option("--secret-file", config.server.secret_file))
        start_worker = launcher.worker(ranks.rank - 1, *server_args, before=ranks.attempt)
        name = f"worker {ranks.rank - 1}"
        yield monitor.add(name, start_worker, should_restart=unless_server_lost, essential=True)
        return
    with rank_0_listener(config, run_dir, ranks, report) as (listener, address, secret_file):
        start_server = launcher.server(run_dir, began, listener, secret_file, "--address", address, *store)
        yield monitor.add("server", start_server, should_restart=if_killed, essential=True)


@contextlib.contextmanager
def rank_0_listener(
    config: Config, run_dir: Path, ranks: Ranks, report: Callable[[str], None]
) -> Generator[tuple[socket.socket, str, Path | None]]:
    """Listen where the other ranks look for the server, or will be told; the value is the socket, its address, the secret file.

    Args:
        config: The configuration.
        run_dir: The run directory.
        ranks: The ranks, of which this is the first.
        report: Called with messages for people.

    Raises:
        ConfigError: this machine cannot listen there.
    """
    secret_file = _run_secret(config, run_dir) if ranks.one_machine and ranks.agent_store else _shared_secret(config)
    former = former_run(ranks, run_dir) if ranks.agent_store else None
    wanted = server_address.of_rank_0(config, ranks)
    with _listen_again(former and former.address, wanted, ranks, public=config.server.public) as listener:
        address, host = address_of(listener), str(listener.getsockname()[0])
        server_address.check_reachable(host, ranks)
        remember(ranks, FormerRun(run_dir, address))
        Rank(ranks, report).say(f"the server at {address} on {with_interface(host)}, run directory {run_dir}")
        yield listener, address, secret_file


def _listen_again(former: str | None, address: str, ranks: Ranks, *, public: bool) -> socket.socket:
    """Listen at the former address, once the former server has closed it; where it stays in use, at the other one."""
    deadline = time.monotonic() + CLOSING_SECONDS
    while former is not None and time.monotonic() < deadline:
        with contextlib.suppress(ConfigError):
            return listen_at(former, public=public)
        time.sleep(0.1)
    try:
        return listen_at(address, public=public)
    except ConfigError as error:
        other = "" if ranks.agent_store else "; server.address or MASTER_PORT names another port"
        raise ConfigError(f"{error}; rank 0 is on {socket.gethostname()}{other}") from None


@contextlib.contextmanager
def elastic_worker_process(
    monitor: ProcessMonitor, config: Config, preloading: Preloading, report: Callable[[str], None]
) -> Generator[ProcessSlot]:
    """Start a worker for a run that another launcher has started, maybe on another machine; the value is its slot."""
    assert config.server.address is not None
    secret_file = _shared_secret(config)
    launcher = Launcher(monitor.supervisor, config, preloading, logs=None)
    root = None if config.dataset.root == DataSource.root else config.dataset.root
    own = None if isinstance(config.transport, Auto) else json.dumps(to_tree(config)["transport"])
    server_args = ("--address", config.server.address, *_option("--secret-file", secret_file))
    device = None if config.worker.device == WorkerOptions.device else config.worker.device
    own_args = (*_option("--data-root", root), *_option("--transport", own), *_option("--device", device))
    elsewhere = not is_loopback(parse_address(config.server.address)[0])
    if elsewhere:
        report(f"a worker on {socket.gethostname()}, for {server_over(config.server.address)}")
    slot = monitor.add("worker", launcher.worker(None, *server_args, *own_args), should_restart=if_killed, essential=True)
    yield slot
    if slot.done and slot.left_on is None and not monitor.supervisor.signals:
        report(f"the run at {config.server.address} has ended")


def _run_secret(config: Config, run_dir: Path) -> Path | None:
    """The file with the secret: the configured one, else one made for this run; None where the environment has the secret."""
    if read_secret(config.server.secret_file) is not None:
        return None if config.server.secret_file is None else Path(config.server.secret_file)
    file = run_dir / SECRET_FILE
    if not file.exists():  # else of an earlier start of torchrun's ranks, which elastic workers know
        write_secret(file, new_secret())
    return file


def _shared_secret(config: Config) -> Path | None:
    """The configured file with a secret that other machines have as well; None where the environment has the secret."""
    require_secret(config.server.secret_file)
    return None if config.server.secret_file is None else Path(config.server.secret_file)


def _option(flag: str, value: object) -> tuple[str, ...]:
    return () if value is None else (flag, str(value))


@contextlib.contextmanager
def _terminal() -> Generator[int | None]:
    """A descriptor of the terminal for the child, whose standard error is its log; None where there is no terminal."""
    if not console.on_terminal():
        yield None
        return
    terminal = os.dup(sys.stderr.fileno())
    try:
        yield terminal
    finally:
        os.close(terminal)
