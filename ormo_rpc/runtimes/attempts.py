"""Starts of the ranks by torchrun: what rank 0 leaves for its next start, so that the run goes on.

Torchrun starts the ranks again after a failure (``--max-restarts``) and when a node joins (``--nnodes=MIN:MAX``). What a start
leaves is in the folder of torchrun's agent, which belongs to this job alone and lasts as long as the agent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ormo_rpc.runtimes.torchrun import Torchrun
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import TRACE, write_json

DEFAULT_RUN_ID = "none"
"""The name that every job without ``--rdzv-id`` has."""
_FILE = "ormo_rpc_run.json"


@dataclass(frozen=True)
class FormerRun:
    """The run that an earlier start of the ranks began.

    Attributes:
        run_dir: Its run directory.
        address: HOST:PORT of its listener, at which workers and elastic workers look for it.
    """

    run_dir: Path
    address: str


def remember(torchrun: Torchrun, run: FormerRun) -> None:
    """Remember the run for the next start of rank 0, which torchrun's agent of this node makes."""
    if torchrun.agent_folder is not None:
        write_json(torchrun.agent_folder / _FILE, {"run_dir": str(run.run_dir), "address": run.address})


def former_run(torchrun: Torchrun) -> FormerRun | None:
    """The run of an earlier start of rank 0 on this node; None where there is none, or its files are gone."""
    file = None if torchrun.agent_folder is None else torchrun.agent_folder / _FILE
    if torchrun.rank != 0 or file is None or not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    found = FormerRun(Path(values["run_dir"]), values["address"])
    return found if (found.run_dir / TRACE).is_file() else None


def continues(torchrun: Torchrun, run_dir: Path) -> bool:
    """Tell whether a run directory holds the run that an earlier start of the ranks began.

    Where rank 0 is on another node than before, nothing is remembered; a directory on a shared file system has the job's name.
    """
    former = former_run(torchrun)
    if former is not None:
        return former.run_dir == run_dir
    named = torchrun.attempt > 0 and torchrun.run_id != DEFAULT_RUN_ID and (run_dir / TRACE).is_file()
    return named and Launch.read(run_dir).torchrun == torchrun.run_id
