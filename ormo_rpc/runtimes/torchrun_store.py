"""The store of torchrun's agents: what the ranks tell one another, and what a start of the ranks tells the next start.

It belongs to the agent of rank 0's node, so it outlives the ranks, which torchrun starts again after a failure
(``--max-restarts``) or when a node joins (``--nnodes=MIN:MAX``). Where torchrun's agents share no store there is none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public

from ormo_rpc.runtimes.torchrun import Torchrun
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import TRACE

PREFIX = "ormo_rpc"
"""Of our keys."""
ADDRESS, SECRET_FILE, RUN, RESULT = "address", "secret_file", "run", "result"
"""The server's address and secret for the workers; the run for rank 0's next start; how it ended."""
DEFAULT_RUN_ID = "none"
"""The name that every job without ``--rdzv-id`` has."""
CONNECT_SECONDS = 30.0
"""The store is there before the ranks are."""


@dataclass(frozen=True)
class FormerRun:
    """The run that an earlier start of the ranks began.

    Attributes:
        run_dir: Its run directory.
        address: HOST:PORT of its listener, at which workers and elastic workers look for it.
        host: The name of the node that had rank 0.
    """

    run_dir: Path
    address: str
    host: str


def connect(address: str, timeout_seconds: float) -> PrefixStore:
    """Connect to the store at HOST:PORT.

    Args:
        address: Of the store.
        timeout_seconds: For the connection, and for each value that is waited for.

    Raises:
        RuntimeError: it cannot be reached.
    """
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_seconds)
    return PrefixStore(PREFIX, TCPStore(host, int(port), is_master=False, timeout=timeout, wait_for_workers=False))


def read(store: PrefixStore, key: str) -> str | None:
    """Read a value without waiting for it.

    Raises:
        RuntimeError: the store has ended.
    """
    return store.get(key).decode() if store.check([key]) else None


def remember(torchrun: Torchrun, run: FormerRun) -> None:
    """Remember the run for the next start of rank 0."""
    _write(torchrun, RUN, {**asdict(run), "run_dir": str(run.run_dir)})


def former_run(torchrun: Torchrun) -> FormerRun | None:
    """The run of an earlier start of the ranks, for rank 0; None where there is none, or its files are not on this node."""
    if torchrun.rank != 0 or not torchrun.agent_store:
        return None
    text = read(connect(torchrun.store, CONNECT_SECONDS), RUN)
    if text is None:
        return None
    values = json.loads(text)
    found = FormerRun(Path(values["run_dir"]), values["address"], values["host"])
    return found if (found.run_dir / TRACE).is_file() else None


def continues(torchrun: Torchrun, run_dir: Path) -> bool:
    """Tell whether a run directory holds the run that an earlier start of the ranks began.

    Where rank 0 is on another node than before, the store has forgotten the run; the directory, on a shared file system,
    has the job's name.
    """
    former = former_run(torchrun)
    if former is not None:
        return former.run_dir == run_dir
    named = torchrun.attempt > 0 and torchrun.run_id != DEFAULT_RUN_ID and (run_dir / TRACE).is_file()
    return named and Launch.read(run_dir).torchrun == torchrun.run_id


def tell_result(torchrun: Torchrun, summary: Mapping[str, Any]) -> None:
    """Tell the other ranks how the run ended."""
    _write(torchrun, RESULT, {key: summary.get(key) for key in ("status", "gradients_computed", "pushes_per_worker")})


def _write(torchrun: Torchrun, key: str, value: Mapping[str, Any]) -> None:
    if torchrun.agent_store:
        connect(torchrun.store, CONNECT_SECONDS).set(key, json.dumps(value))
