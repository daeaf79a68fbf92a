"""The environment variables that torchrun sets for its processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Torchrun:
    """This process's rank in a torchrun job.

    Attributes:
        run_id: The name of the job, ``--rdzv-id``.
        rank: The rank of this process.
        world_size: The number of ranks.
        store: HOST:PORT of the store.
        attempt: Restarts of the ranks after failures; one for a change of the nodes does not count.
        agent_store: Torchrun's agent hosts the store; otherwise rank 0 has to.
        agent_folder: Of torchrun's agent on this node, for this job; None where it has none.
        one_machine: All ranks are on this machine.
    """

    run_id: str
    rank: int
    world_size: int
    store: str
    attempt: int
    agent_store: bool
    agent_folder: Path | None
    one_machine: bool

    @classmethod
    def from_environment(cls) -> Torchrun | None:
        """Read the environment; None where this process was not started by torchrun."""
        env = os.environ
        if "TORCHELASTIC_RUN_ID" not in env:
            return None
        error_file = env.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_0/0/error.json
        return cls(
            run_id=env["TORCHELASTIC_RUN_ID"],
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            store=f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}",
            attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            agent_folder=Path(error_file).parents[2] if error_file else None,
            one_machine=env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"],
        )
