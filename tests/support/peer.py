"""Agents of torch.distributed.rpc, and a stranger who attacks them: ``python -m tests.support.peer serve|attack ...``.

``serve KIND...`` starts a process for each kind of `KINDS`, and prints their addresses as JSON; ``attack ADDRESSES FOLDER`` is
the stranger, who knows the addresses only and has torch's own agent, and who prints an outcome for each attempt. Each process
keeps a store of its own, in which the stranger writes the addresses; nobody joins anything.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, cast

import torch
import torch.distributed.rpc as rpc
from torch._C import _distributed_rpc
from torch.distributed import HashStore, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
from torch.distributed.rendezvous import register_rendezvous_handler
from torch.distributed.rpc import api, backend_registry, internal

from ormo_rpc.control.torch_rpc import agent, confinement
from ormo_rpc.errors import PushRefused

KINDS = ("server", "worker", "override", "open", "victim")
"""A server and a worker of ours, a server on a system without seccomp, torch's own agent, and a server that will be ended."""
SYSTEM = vars(os)["system"]
"""A function that an attacker would call; its own name is softly deprecated."""
CLIENT = "client.so"
"""The stranger's client in C++, in the folder of the attack; see ``operators.cpp``."""


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


def serve(kinds: list[str]) -> None:
    """Start the processes, print their addresses, and serve until they are killed."""
    addresses: dict[str, str] = {}
    for kind in kinds:
        reading, writing = os.pipe()
        if os.fork() == 0:
            _serve(kind, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            addresses[kind] = pipe.readline().strip()
    print(json.dumps(addresses), flush=True)
    while True:
        process, status = os.wait()
        print(process, os.waitstatus_to_exitcode(status), flush=True)


def _serve(kind: str, writing: int) -> None:
    """Serve in a new process, whose address goes into a pipe."""
    for stream in (sys.stdout, sys.stderr):  # torch has a page to say on every refusal, and operators that print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if kind == "open":
        address = start("open", 0, {}).get("addrs/open").decode()
    else:
        if kind == "override":
            confinement.ARCHITECTURES.clear()
        functions = () if kind == "worker" else (Api.push, Api.fails)
        server = "uv://127.0.0.1:9" if kind == "worker" else None
        running = agent.rpc_agent(kind, host="127.0.0.1", server=server, timeout_seconds=20, functions=functions)
        address = running.__enter__()
        Path(__file__).read_bytes()  # only the agent's threads are confined
    with os.fdopen(writing, "w") as pipe:
        pipe.write(f"{address}\n")
    while True:
        signal.pause()


def start(name: str, rank: int, others: Mapping[str, str]) -> Store:
    """Start torch's own agent, which is told the names and addresses of others."""
    store = HashStore()

    def rendezvous(url: str, *args: Any, **kwargs: Any) -> Generator[tuple[Store, int, int]]:  # noqa: ARG001 - torch's signature
        yield store, rank, 1

    def made(store: Any, name: str, rank: int, world_size: int, rpc_backend_options: Any) -> Any:  # noqa: ARG001 - torch's signature
        made = _distributed_rpc.TensorPipeAgent(store, name, rank, None, rpc_backend_options, {}, [])
        api._init_rpc_states(made)  # pyright: ignore[reportPrivateUsage] # as torch does
        return made

    register_rendezvous_handler("hub", rendezvous)
    handler = cast("Any", backend_registry.BackendType).TENSORPIPE.value.construct_rpc_backend_options_handler
    backend = backend_registry.register_backend("HUB", handler, made)
    names = PrefixStore("rpc_prefix_0", store)
    if others:
        names.set("names/_ALL_WORKER_INFOS", "".join(f"{other}-{number}," for number, other in enumerate(others)))
    for other, address in others.items():
        names.set(f"addrs/{other}", address)
    os.environ["TP_SOCKET_IFNAME"] = "lo"
    options = rpc.TensorPipeRpcBackendOptions(init_method="hub://", rpc_timeout=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rpc.init_rpc(name, backend=backend, rank=rank, world_size=1, rpc_backend_options=options)
    return names


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


def calls(peer: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """Calls of Python's functions, by name."""
    ones = torch.ones(2)

    def ask(function: Any, *args: Any) -> Any:
        return rpc.rpc_sync(peer, function, args=args)

    return {
        "permitted": lambda: ask(Api.push, ones).tolist(),
        "permitted, raises": lambda: ask(Api.fails),
        "os.system": lambda: ask(SYSTEM, f"touch {folder}/marker-system"),
        "eval": lambda: ask(eval, "1 + 1"),
        "Popen": lambda: ask(subprocess.Popen, ["touch", f"{folder}/marker-popen"]),
        "pickle.loads": lambda: ask(pickle.loads, pickle.dumps(Touch(folder / "marker-loads"))),
        "dotted": lambda: ask(dotted, "os"),
        "hidden in an argument": lambda: ask(Api.push, Touch(folder / "marker-argument")),
        "an RRef": lambda: ask(Api.push, rpc.RRef(ones)),
        "asynchronous": lambda: rpc.rpc_async(peer, SYSTEM, args=(f"touch {folder}/marker-asynchronous",)).wait(),
    }


def operators(peer: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """Calls of torch's operators that read or write files, by name; the last one asks whether the peer still answers."""
    private, kind = f"{folder.parent}/private", {"dtype": torch.uint8}

    def written(name: str) -> str:
        return f"{folder}/{name}"

    def builtin(*args: Any, **kwargs: Any) -> Any:
        return _distributed_rpc._invoke_rpc_builtin(rpc.get_worker_info(peer), "aten::from_file", 20.0, *args, **kwargs).wait()  # pyright: ignore[reportPrivateUsage] # an attacker would

    out = torch.empty(0, dtype=torch.uint8)
    return {
        "read": lambda: bytes(rpc.rpc_sync(peer, torch.from_file, (private, False, 7), kind).tolist()),
        "read, remote": lambda: bytes(rpc.remote(peer, torch.from_file, (private, False, 7), kind).to_here().tolist()),
        "write": lambda: rpc.rpc_sync(peer, torch.from_file, (written("write"), True, 2), kind).tolist(),
        "write, remote": lambda: rpc.remote(peer, torch.from_file, (written("remote"), True, 2), kind).to_here().tolist(),
        "write, by its name": lambda: builtin(written("name"), True, 2, **kind).tolist(),
        "write, out": lambda: builtin(written("out"), True, 2, out=out).tolist(),
        "add": lambda: rpc.rpc_sync(peer, torch.add, (torch.ones(2), 1)).tolist(),
    }


def schemas() -> dict[tuple[str, str], Any]:
    """All operators of torch with a text among their arguments, by name and overload."""
    every = cast("Any", torch)._C._jit_get_all_schemas()
    return {
        (schema.name, schema.overload_name): schema
        for schema in every
        if any("str" in str(argument.type) for argument in schema.arguments)
    }


def by_schema(peer: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """Calls of all of `schemas` by a client in C++: each text is a file name of its own in the folder."""
    call = ctypes.CDLL(str(folder.parent / CLIENT)).call
    call.restype = ctypes.c_char_p

    def attempt(name: str, overload: str) -> str:
        file = folder / f"{name}.{overload}".replace("::", "-")
        return call(peer.encode(), name.encode(), overload.encode(), str(file).encode()).decode()

    return {
        f"schema {name}.{overload}": lambda name=name, overload=overload: attempt(name, overload)
        for name, overload in schemas()
    }


def attack(addresses: Mapping[str, str], folder: Path) -> None:
    """Try everything on every kind, and print what came of it: kind, attempt and outcome in a line."""
    internal._pickler = Forger  # pyright: ignore[reportPrivateUsage] # an attacker would
    start("stranger", 99, addresses)
    for kind in addresses:
        (own := folder / kind).mkdir()
        attempts = calls(kind, own) | (by_schema(kind, own) if (folder / CLIENT).exists() else {}) | operators(kind, own)
        for name, attempt in attempts.items():
            try:
                outcome = str(attempt())
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            print(kind, name, outcome.partition("\n")[0].partition(" is not on the allow-list")[0], sep="\t", flush=True)
    os._exit(0)  # the agents' own shutdown would ask the others


def main(role: str, *arguments: str) -> None:
    """As the docstring of the module has it."""
    if role == "serve":
        serve(list(arguments))
    else:
        attack(json.loads(arguments[0]), Path(arguments[1]))


if __name__ == "__main__":
    from tests.support import peer

    peer.main(*sys.argv[1:])  # so that names are those of the module, not of a script
