"""This process's agent of torch.distributed.rpc, as hub or spoke.

torch's own groups do not survive the death of a process: in a static group a dead process is never replaced, and in a dynamic
one every process has to inform every other one, through a store that a death leaves locked. Here there is no group. Workers
call the server only, so a worker's agent is given one name and one address, the server's, in a store within its own process;
the server's agent is given none, because a response goes back through the connection that the call came by. So any process may
start, end or be killed at any time, and no other agent notices.

It is registered as a backend of its own, by the function that torch has for that purpose; the agent that it builds is torch's.

The agent starts in a thread that has given up files and processes (`confinement`), and so do all of its threads. It listens on
one port of one address. torch looks for that address once in the life of a process.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import random
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch.distributed.rpc as rpc
from torch.distributed import HashStore, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
from torch.distributed.rendezvous import register_rendezvous_handler
from torch.distributed.rpc import TensorPipeAgent, api, backend_registry

from ormo_rpc.control.torch_rpc import unpickling
from ormo_rpc.control.torch_rpc.confinement import run_confined
from ormo_rpc.errors import ConfigError
from ormo_rpc.rendezvous.addresses import parse_address
from ormo_rpc.rendezvous.interfaces import interface_of, specific_address

SERVER = "server"
"""The server's name for the agents of its workers."""
SCHEME = "ormo"
_ADDRESSES, _NAMES = "addrs", "names/_ALL_WORKER_INFOS"
"""The keys under which torch's agent looks for addresses, and for the list of agents that were there before it."""
_book: list[Store] = []
"""The store of the agent that is about to start."""


@contextlib.contextmanager
def rpc_agent(
    name: str,
    *,
    host: str,
    server: str | None,
    timeout_seconds: float,
    threads: int = 16,
    functions: Iterable[Callable[..., Any]] = (),
) -> Generator[str]:
    """Run an agent, whose address is the value of the context.

    Args:
        name: Of this process; `SERVER` for the server's.
        host: The address at which to listen: this process's own one on the connection to the server, or the listener's;
            in place of ``0.0.0.0`` that of the default route.
        server: The address of the server's agent; None in the server.
        timeout_seconds: For calls without a time-out of their own.
        threads: The number of threads that run handlers.
        functions: Those that other processes may call in this one.

    Raises:
        ConfigError: no agent can listen at that address.
    """
    host = specific_address(host)
    os.environ["TP_SOCKET_IFNAME"] = interface_of(host)
    _register()
    unpickling.install(functions, references=server is not None)
    book = HashStore()
    _book[:] = [book]
    # torch puts a prefix before all keys, which counts the agents that this process has had.
    view = PrefixStore(f"rpc_prefix_{rpc._init_counter}", book)  # pyright: ignore[reportPrivateUsage,reportAttributeAccessIssue] # nothing public tells it
    if server is not None:
        view.set(_NAMES, f"{SERVER}-0,")
        view.set(f"{_ADDRESSES}/{SERVER}", server)
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"{SCHEME}://",
        rpc_timeout=timeout_seconds,
        num_worker_threads=threads,
        _transports=["uv"],  # TensorPipe's TCP; its shared memory is slower, and polls in idle processes
        _channels=["basic"],
    )
    backend = backend_registry.BackendType["ORMO_RPC"]
    number = 0 if server is None else _number(os.getpid())
    run_confined(lambda: rpc.init_rpc(name, backend=backend, rank=number, world_size=1, rpc_backend_options=options))
    try:
        address = view.get(f"{_ADDRESSES}/{name}").decode()
        _check_host(address, host)
        yield address
    finally:
        rpc.shutdown(graceful=False)  # a graceful one would ask every process, and wait for dead ones


def agent_address(address: str) -> tuple[str, int]:
    """Host and port in the address of an agent."""
    return parse_address(address.removeprefix("uv://"))


@functools.cache
def _number(process: int) -> int:  # noqa: ARG001 - a forked process draws one of its own
    """The number of a process among the workers' agents.

    torch wants one for life; it is no worker's number, and two may have the same.
    """
    return random.SystemRandom().randrange(1, 1 << 15)


def _check_host(address: str, host: str) -> None:
    """Refuse an agent that listens elsewhere, as where its interface has several addresses; on loopback all are one."""
    listens = ipaddress.ip_address(agent_address(address)[0])
    wanted = ipaddress.ip_address(host)
    if listens != wanted and not (listens.is_loopback and wanted.is_loopback):
        raise ConfigError(
            f"server.address: torch's agent listens on {listens} where it was to listen on {host}; name the first address of "
            f"a network interface, or use transport=tcp, which needs no agent"
        )


def _register() -> None:
    """Register our backend with torch, and the source of its store; once in a process."""
    if backend_registry.backend_registered("ORMO_RPC"):
        return

    def rendezvous(url: str, *args: Any, **kwargs: Any) -> Generator[tuple[Store, int, int]]:  # noqa: ARG001 - torch's signature
        yield _book[0], 0, 1

    def start(store: Store, name: str, rank: int, world_size: int, rpc_backend_options: Any) -> Any:  # noqa: ARG001 - torch's signature
        # Without a size the agent takes its peers from the store as it is, and does not wait.
        agent = TensorPipeAgent(store, name, rank, None, rpc_backend_options, {}, [])
        api._init_rpc_states(agent)  # pyright: ignore[reportPrivateUsage] # as each of torch's own backends does
        return agent

    options = backend_registry.BackendType["TENSORPIPE"].value.construct_rpc_backend_options_handler
    register_rendezvous_handler(SCHEME, rendezvous)
    backend_registry.register_backend("ORMO_RPC", options, start)
