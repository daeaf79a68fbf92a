"""This process's agent of torch.distributed.rpc, as hub or spoke (``wire.transport=uv``).

torch's own groups do not outlive a death: in a static group the dead never come back, and in a dynamic one every member has to
tell every other one, through a store that a death leaves locked. Here there is no group. Workers call the server and nobody
else, so a worker's agent is told one name and one address, that of the server, in a store within its own process; the server's
agent is told of nobody, because an answer goes back through the connection that the call came by. So anybody may come, go or be
killed at any time, and nobody else's agent notices.

It is registered as a backend of its own, by the function that torch has for that purpose; what it builds is torch's agent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch.distributed.rpc as rpc
from torch.distributed import HashStore, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
from torch.distributed.rendezvous import register_rendezvous_handler
from torch.distributed.rpc import TensorPipeAgent, api, backend_registry

from ormo_rpc.transports.torch_rpc import unpickling

SERVER = "server"
"""The server's name for the agents of its workers."""
SCHEME = "ormo"
_ADDRESSES, _NAMES = "addrs", "names/_ALL_WORKER_INFOS"
"""Where torch's agent looks for addresses, and for the list of those that are there before it."""
_book: list[Store] = []
"""The store of the agent that is about to start."""


@contextlib.contextmanager
def rpc_agent(
    name: str,
    number: int,
    *,
    server: str | None,
    timeout_seconds: float,
    threads: int = 16,
    functions: Iterable[Callable[..., Any]] = (),
) -> Generator[str]:
    """Have an agent, whose address is the value of the context.

    Args:
        name: Of this process; `SERVER` for the server's.
        number: Of this process: 0 for the server's, larger for a worker's.
        server: The address of the server's agent; None in the server.
        timeout_seconds: For calls that do not say otherwise.
        threads: How many run handlers.
        functions: What others may call in this process.
    """
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
        _transports=["uv"],  # TCP; torch's own shared memory copies each message twice
        _channels=["basic"],
    )
    backend = backend_registry.BackendType["ORMO_RPC"]
    rpc.init_rpc(name, backend=backend, rank=number, world_size=1, rpc_backend_options=options)
    try:
        yield view.get(f"{_ADDRESSES}/{name}").decode()
    finally:
        rpc.shutdown(graceful=False)  # a graceful one would ask everybody, and wait for the dead


def _register() -> None:
    """Make torch know our backend, and where its store comes from; once in a process."""
    if backend_registry.backend_registered("ORMO_RPC"):
        return

    def rendezvous(url: str, *args: Any, **kwargs: Any) -> Generator[tuple[Store, int, int]]:  # noqa: ARG001 - torch's signature
        yield _book[0], 0, 1

    def start(store: Store, name: str, rank: int, world_size: int, rpc_backend_options: Any) -> Any:  # noqa: ARG001 - likewise
        # Without a size the agent takes its peers from the store as it is, and waits for nobody.
        agent = TensorPipeAgent(store, name, rank, None, rpc_backend_options, {}, [])
        api._init_rpc_states(agent)  # pyright: ignore[reportPrivateUsage] # as each of torch's own backends does
        return agent

    options = backend_registry.BackendType["TENSORPIPE"].value.construct_rpc_backend_options_handler
    register_rendezvous_handler(SCHEME, rendezvous)
    backend_registry.register_backend("ORMO_RPC", options, start)
