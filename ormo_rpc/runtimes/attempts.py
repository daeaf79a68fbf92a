"""Starts of the ranks: what rank 0 leaves for its next start, so that the run goes on.

Torchrun starts the ranks again after a failure (``--max-restarts``) and when a node joins (``--nnodes=MIN:MAX``), Slurm when a
job is queued again. What a start leaves is in the folder of torchrun's agent, which belongs to this job alone and lasts as long
as the agent, and in the run directory, which names the agent and the job. Without such a folder all is in the run directory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ormo_rpc.runtimes.ranks import TORCHRUN, Ranks
from ormo_rpc.runtimes.torchrun_agent import Agent
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import TRACE, write_json

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


def remember(ranks: Ranks, run: FormerRun) -> None:
    """Remember the run for the next start of rank 0, which torchrun's agent of this node makes."""
    if not ranks.agent_store and ranks.agent_folder is None:
        return  # the address is the same at each start
    folder = ranks.agent_folder or run.run_dir
    write_json(folder / _FILE, {"run_dir": str(run.run_dir), "address": run.address})


def former_run(ranks: Ranks, run_dir: Path | None = None) -> FormerRun | None:
    """The run of an earlier start of rank 0 on this node; None where there is none, or its files are gone.

    Args:
        ranks: The ranks.
        run_dir: The run directory that was claimed, or is continued, where torchrun's agent has no folder.
    """
    folder = ranks.agent_folder or run_dir
    if ranks.rank != 0 or folder is None or not (folder / _FILE).is_file():
        return None
    values = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    found = FormerRun(Path(values["run_dir"]), values["address"])
    return found if (found.run_dir / TRACE).is_file() else None


def claimed_by(ranks: Ranks | None) -> Launch:
    """The job and the agent that a run directory is to name, by which `continues` knows it again."""
    if ranks is None:
        return Launch()
    agent = Agent.of_this_rank() if ranks.launcher == TORCHRUN else None
    return Launch(job=ranks.job, agent=None if agent is None else agent.name)


def continues(ranks: Ranks, run_dir: Path) -> bool:
    """Tell whether a run directory holds the run that an earlier start of the ranks began.

    The agent that has started rank 0 is known again, whatever it is called and wherever it has its folder. Where rank 0 is on
    another node than before, a directory on a shared file system has the job's name.
    """
    former = former_run(ranks)
    if former is not None:
        return former.run_dir == run_dir
    if not (run_dir / TRACE).is_file():
        return False
    ours, its = claimed_by(ranks), Launch.read(run_dir)
    by_job = ranks.attempt > 0 and ours.job is not None and ours.job == its.job
    return by_job or (ours.agent is not None and ours.agent == its.agent)
