"""The entry point of every child process: ``python -m ormo_rpc.runtimes.rpc.child``, started by the launcher only."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from ormo_rpc.runtimes.rpc.connection import Address, connect_store
from ormo_rpc.runtimes.rpc.serve import Host, serve
from ormo_rpc.runtimes.rpc.work import work
from ormo_rpc.runtimes.supervisor import DONE, listen_to_supervisor


def main() -> None:
    """Be the server or a worker, as the arguments say; where it fails, the last line of output is the error."""
    arguments = _parse()
    hosts: list[Host] = []

    def on_message(message: dict[str, Any]) -> None:
        if not hosts:
            os._exit(1)  # nothing has begun, so there is nothing to keep
        hosts[0].ask_to_stop(message)

    listen_to_supervisor(arguments.control, on_message)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    host, _, port = arguments.store.rpartition(":")
    timeout: float = arguments.start_timeout
    try:
        store = connect_store(
            Address(
                host=host,
                port=int(port),
                listener=arguments.listen,
                hosted=arguments.host_store,
                prefix=arguments.prefix,
                timeout_seconds=timeout,
            )
        )
        if arguments.rank == 0:
            serve(
                store,
                arguments.run_dir,
                world_size=arguments.world_size,
                timeout_seconds=timeout,
                terminal=arguments.terminal,
                on_ready=hosts.append,
            )
        else:
            work(store, rank=arguments.rank, world_size=arguments.world_size, timeout_seconds=timeout)
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)  # the supervisor reads it
        os._exit(1)  # threads of the RPC agent may hold up an ordinary exit
    sys.exit(DONE)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, required=True, help="0 serves, the others work")
    parser.add_argument("--world-size", type=int, required=True, help="workers plus one")
    parser.add_argument("--store", required=True, metavar="HOST:PORT", help="where processes find one another")
    parser.add_argument("--prefix", default="ormo_rpc", help="what our keys in the store begin with")
    parser.add_argument("--listen", type=int, help="bound socket on which to keep the store")
    parser.add_argument("--host-store", action="store_true", help="keep the store without such a socket")
    parser.add_argument("--start-timeout", type=float, required=True, metavar="SECONDS")
    parser.add_argument("--run-dir", type=Path, help="of the server")
    parser.add_argument("--terminal", type=int, help="descriptor for the progress bar")
    parser.add_argument("--control", type=int, required=True, help="reading end of the supervisor's pipe")
    return parser.parse_args()


if __name__ == "__main__":
    main()
