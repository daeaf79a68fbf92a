"""A server over RPC, and a peer that attacks it: ``python -m tests.support.peer open|guarded|calls|operators ...``.

Each process keeps a store of its own, in which the peer writes the server's address; it never joins.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, cast

import torch
import torch.distributed.rpc as rpc
from torch._C._distributed_rpc import TensorPipeAgent
from torch.distributed import HashStore, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
from torch.distributed.rendezvous import register_rendezvous_handler
from torch.distributed.rpc import api, backend_registry, internal

from ormo_rpc.control.torch_rpc import unpickling
from ormo_rpc.errors import PushRefused

SERVER = "server"
SYSTEM = vars(os)["system"]
"""A function that an attacker would call; its own name is softly deprecated."""


class Api:
    """The service."""

    calls: ClassVar[list[Any]] = []

    @staticmethod
    def push(*args: Any) -> Any:
        """Permitted."""
        Api.calls.append(args)
        return args[0] + 1

    @staticmethod
    def fails() -> None:
        """Permitted."""
        raise PushRefused("why")

    @staticmethod
    def hidden() -> str:
        """Not permitted."""
        return "hidden"


def start(name: str, rank: int, server: str | None = None) -> Store:
    """Start the agent of this process, which has its own address and, where it is given, the server's."""
    store = HashStore()

    def rendezvous(url: str, *args: Any, **kwargs: Any) -> Generator[tuple[Store, int, int]]:  # noqa: ARG001 - torch's signature
        yield store, rank, 1

    def agent(store: Any, name: str, rank: int, world_size: int, rpc_backend_options: Any) -> Any:  # noqa: ARG001 - torch's signature
        made = TensorPipeAgent(store, name, rank, None, rpc_backend_options, {}, [])
        api._init_rpc_states(made)  # pyright: ignore[reportPrivateUsage] # as torch does
        return made

    register_rendezvous_handler("hub", rendezvous)
    handler = cast("Any", backend_registry.BackendType).TENSORPIPE.value.construct_rpc_backend_options_handler
    backend = backend_registry.register_backend("HUB", handler, agent)
    names = PrefixStore("rpc_prefix_0", store)
    if server is not None:
        names.set("names/_ALL_WORKER_INFOS", f"{SERVER}-0,")
        names.set(f"addrs/{SERVER}", server)
    options = rpc.TensorPipeRpcBackendOptions(init_method="hub://", rpc_timeout=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rpc.init_rpc(name, backend=backend, rank=rank, world_size=1, rpc_backend_options=options)
    return names


def serve(*, guarded: bool) -> None:
    """Serve until the process is killed."""
    if guarded:
        unpickling.install([Api.push, Api.fails])
    print(start(SERVER, 0).get(f"addrs/{SERVER}").decode(), flush=True)
    while True:
        signal.pause()


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return SYSTEM, (f"touch {self.file}",)


def dotted() -> None:
    """Stands for a chain of attributes; see `Forger`."""


class Forger(cast("Any", pickle)._Pickler):
    """Writes a name that no honest pickler would write."""

    def save_function(self, function: Any) -> None:
        """As pickle does it, but for `dotted`."""
        if function is not dotted:
            super().save_global(function)
            return
        self.save("tests.support.peer")
        self.save("Api.push.__globals__.get")
        self.write(pickle.STACK_GLOBAL)
        self.memoize(function)

    dispatch: ClassVar[dict[type, Any]] = {**cast("Any", pickle)._Pickler.dispatch, FunctionType: save_function}


def attempts(kind: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """The attempts of the peer, by name."""
    ones = torch.ones(2)

    def ask(function: Any, *args: Any, **kwargs: Any) -> Any:
        return rpc.rpc_sync(SERVER, function, args=args, kwargs=kwargs)

    if kind == "operators":
        return {
            "add": lambda: ask(torch.add, ones, 1).tolist(),
            "read": lambda: bytes(ask(torch.from_file, f"{folder}/private", False, 7, dtype=torch.uint8).tolist()),
            "write": lambda: ask(torch.from_file, f"{folder}/written", True, 2, dtype=torch.uint8).tolist(),
        }
    return {
        "permitted before": lambda: ask(Api.push, ones).tolist(),
        "permitted, raises": lambda: ask(Api.fails),
        "os.system": lambda: ask(SYSTEM, f"touch {folder}/marker-system"),
        "eval": lambda: ask(eval, "1 + 1"),
        "Popen": lambda: ask(subprocess.Popen, ["touch", f"{folder}/marker-popen"]),
        "pickle.loads": lambda: ask(pickle.loads, pickle.dumps(Touch(folder / "marker-loads"))),
        "dotted": lambda: ask(dotted, "os"),
        "hidden in an argument": lambda: ask(Api.push, Touch(folder / "marker-argument")),
        "an RRef": lambda: ask(Api.push, rpc.RRef(ones)),
        "asynchronous": lambda: rpc.rpc_async(SERVER, SYSTEM, args=(f"touch {folder}/marker-asynchronous",)).wait(),
        "permitted after": lambda: ask(Api.push, ones).tolist(),
    }


def attack(kind: str, address: str, folder: Path) -> None:
    """Try everything, and print what came of it, one line each."""
    internal._pickler = Forger  # pyright: ignore[reportPrivateUsage] # an attacker would
    start("peer", 1, address)
    for name, attempt in attempts(kind, folder).items():
        try:
            outcome = str(attempt())
        except Exception as error:
            outcome = f"{type(error).__name__}: {str(error).splitlines()[0].split(' is not on the allow-list')[0]}"
        print(name, outcome, sep="\t", flush=True)
    rpc.shutdown(graceful=False)


def main(kind: str, address: str = "", folder: str = "") -> None:
    """As the docstring of the module has it."""
    if kind in ("open", "guarded"):
        serve(guarded=kind == "guarded")
    else:
        attack(kind, address, Path(folder))


if __name__ == "__main__":
    from tests.support import peer

    peer.main(*sys.argv[1:])  # so that names are those of the module, not of a script
