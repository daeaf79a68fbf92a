"""The environment variables that torchrun sets for its processes."""

from __future__ import annotations

import os
from dataclasses import dataclass


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
        one_machine: All ranks are on this machine.
    """

    run_id: str
    rank: int
    world_size: int
    store: str
    attempt: int
    agent_store: bool
    one_machine: bool

    @classmethod
    def from_environment(cls) -> Torchrun | None:
        """Read the environment; None where this process was not started by torchrun."""
        env = os.environ
        if "TORCHELASTIC_RUN_ID" not in env:
            return None
        return cls(
            run_id=env["TORCHELASTIC_RUN_ID"],
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            store=f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}",
            attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            one_machine=env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"],
        )
