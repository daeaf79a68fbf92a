"""Starting the processes of a run: all of them on this machine, the one of this rank under torchrun, or a guest."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable, Generator
from pathlib import Path

from ormo_rpc.config.schema import Config
from ormo_rpc.data import DataSource
from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous.addresses import bound, interface_address, name_of, parse
from ormo_rpc.rendezvous.secret import new_secret, read_secret, write_secret
from ormo_rpc.runtimes.distributed.launcher.process_monitor import ProcessMonitor, ProcessSlot, killed
from ormo_rpc.runtimes.distributed.launcher.supervisor import Child, Supervisor
from ormo_rpc.runtimes.torchrun import Torchrun

FIRST_BEAT_SECONDS = 120.0
"""How long a child may import torch, on a busy machine, before it is taken for hung."""
SECRET_FILE = "secret"  # noqa: S105 - the name of a file
"""In the run directory, for workers of this machine that come later."""


class Launcher:
    """Starts children, each with what its role needs.

    Args:
        supervisor: Starts and watches them.
        config: What to run.
        loopback: Whether all processes are on this machine.
        logs: The folder for their output; None for ours.
    """

    def __init__(self, supervisor: Supervisor, config: Config, *, loopback: bool, logs: Path | None) -> None:
        self.supervisor = supervisor
        self.config = config
        self.logs = logs
        self.environment = _environment(config, loopback=loopback)

    def server(self, run_dir: Path, listener: socket.socket, secret_file: Path | None, *more: str) -> Callable[[int], Child]:
        """How to start a life of the server."""

        def start(life: int) -> Child:
            with _terminal() as terminal:
                return self._start(
                    "server",
                    [
                        *("server", "--life", str(life), "--run-dir", str(run_dir), "--listener", str(listener.fileno())),
                        *_given("--secret-file", secret_file),
                        *_given("--terminal", terminal),
                        *more,
                    ],
                    [listener.fileno(), *([] if terminal is None else [terminal])],
                )

        return start

    def worker(self, wanted: int | None, *more: str) -> Callable[[int], Child]:
        """How to start a life of a worker."""
        name = "worker" if wanted is None else f"worker {wanted}"
        slot = secrets.token_hex(8)

        def start(life: int) -> Child:
            command = ["worker", "--life", str(life), "--slot", slot, *_given("--worker", wanted), *more]
            return self._start(name, command, [])

        return start

    def _start(self, name: str, command: list[str], inherited: list[int]) -> Child:
        options = self.config.rpc
        log = None if self.logs is None else self.logs / f"{name.replace(' ', '_')}.log"
        return self.supervisor.start(
            name,
            [
                *(sys.executable, "-m", "ormo_rpc.runtimes.distributed.entry_point", *command),
                *("--start-timeout", str(options.start_timeout_seconds), "--heartbeat", str(options.heartbeat_seconds)),
                *([] if log is None else ["--log"]),
            ],
            env=self.environment,
            log=log,
            pass_fds=inherited,
            patience_seconds=options.worker_timeout_seconds,
            start_patience_seconds=FIRST_BEAT_SECONDS,
        )


@contextlib.contextmanager
def local_processes(monitor: ProcessMonitor, config: Config, run_dir: Path) -> Generator[ProcessSlot]:
    """Server and workers on this machine; the value is the server's slot."""
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    secret_file = _make_secret(config, run_dir)
    with bound(config.server.address or "127.0.0.1:0", public=config.server.public) as listener:
        door = name_of(listener)
        starter = Launcher(monitor.supervisor, config, loopback=_is_loopback(listener), logs=logs)
        server = monitor.add("server", starter.server(run_dir, listener, secret_file), restartable=killed, essential=True)
        for worker in range(config.num_processes):
            command = ("--door", door, *_given("--secret-file", secret_file))
            monitor.add(f"worker {worker}", starter.worker(worker, *command), worker=worker)
        yield server


@contextlib.contextmanager
def rank_process(monitor: ProcessMonitor, config: Config, run_dir: Path, torchrun: Torchrun) -> Generator[ProcessSlot]:
    """The one child of a rank under torchrun; the value is its slot.

    The server leaves its address in the store of torchrun's agent. Where there is none, the port that torchrun has chosen for
    such a store is free, and the server is found there.
    """
    store = ("--store", torchrun.store, "--prefix", f"ormo_rpc/{torchrun.attempt}") if torchrun.agent_store else ()
    starter = Launcher(monitor.supervisor, config, loopback=torchrun.one_machine, logs=None)
    if torchrun.rank > 0:
        where = store or ("--door", torchrun.store, *_given("--secret-file", config.server.secret_file))
        yield monitor.add(f"worker {torchrun.rank - 1}", starter.worker(torchrun.rank - 1, *where))
        return
    secret_file = _make_secret(config, run_dir) if torchrun.one_machine else _known_secret(config)
    host = "127.0.0.1" if torchrun.one_machine else interface_address(config.rpc.interface)
    port = 0 if torchrun.agent_store else int(torchrun.store.rpartition(":")[2])
    with bound(f"{host}:{port}", public=config.server.public) as listener:
        server = starter.server(run_dir, listener, secret_file, "--door", name_of(listener), *store)
        yield monitor.add("server", server, restartable=killed, essential=True)


@contextlib.contextmanager
def elastic_worker_process(monitor: ProcessMonitor, config: Config) -> Generator[ProcessSlot]:
    """A worker for a server that runs already, started from another shell or machine; the value is its slot."""
    assert config.server.address is not None
    secret_file = _known_secret(config)
    host, _ = parse(config.server.address)
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    starter = Launcher(monitor.supervisor, config, loopback=loopback, logs=None)
    root = None if config.dataset.root == DataSource.root else config.dataset.root
    command = ("--door", config.server.address, *_given("--secret-file", secret_file), *_given("--data-root", root))
    yield monitor.add("worker", starter.worker(None, *command), restartable=killed, essential=True)


def _make_secret(config: Config, run_dir: Path) -> Path | None:
    """The file with the secret: the configured one, else one made for this run; None where the environment has it."""
    if read_secret(config.server.secret_file) is not None:
        return None if config.server.secret_file is None else Path(config.server.secret_file)
    file = run_dir / SECRET_FILE
    write_secret(file, new_secret())
    return file


def _known_secret(config: Config) -> Path | None:
    """The file with a secret that other machines know too; None where the environment has it."""
    if read_secret(config.server.secret_file) is None:
        raise ConfigError(
            "server.secret_file: got None, expected a file with the secret of the run, or the variable ORMO_RPC_SECRET, the "
            "same on every machine; the file of a run on this machine is RUN_DIRECTORY/secret"
        )
    return None if config.server.secret_file is None else Path(config.server.secret_file)


def _given(flag: str, value: object) -> tuple[str, ...]:
    return () if value is None else (flag, str(value))


def _is_loopback(listener: socket.socket) -> bool:
    return str(listener.getsockname()[0]).startswith(("127.", "::1"))


@contextlib.contextmanager
def _terminal() -> Generator[int | None]:
    """Our terminal under a number of its own, since the child's standard error is its log; None where we have none."""
    if sys.stderr is None or not sys.stderr.isatty():  # pyright: ignore[reportUnnecessaryComparison] # None where it was closed
        yield None
        return
    terminal = os.dup(sys.stderr.fileno())
    try:
        yield terminal
    finally:
        os.close(terminal)


def _environment(config: Config, *, loopback: bool) -> dict[str, str]:
    """The children's environment: which interface they talk over, threads that do not fight, and the modules that we see."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(config.runtime.threads),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path) or os.environ.get("PYTHONPATH", ""),
        "PYTHONUNBUFFERED": "1",
        # Fresh large tensors on huge pages take a fraction of the time; torch.distributed.rpc receives each message into one.
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),
        # Every ordinary goodbye makes the agents warn of closed pipes.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    interface = _loopback_interface() if loopback else config.rpc.interface
    return env if interface is None else {**env, "TP_SOCKET_IFNAME": interface}


def _loopback_interface() -> str | None:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)
