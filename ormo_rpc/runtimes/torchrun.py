"""What torchrun tells a process through its environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Torchrun:
    """This process's place in a torchrun job.

    Attributes:
        rank: Of this process.
        world_size: Of the job.
        store: HOST:PORT of the store.
        attempt: How often torchrun has restarted the ranks.
        agent_store: Whether torchrun's agent keeps the store; otherwise rank 0 has to.
        one_machine: Whether all ranks are on this machine.
    """

    rank: int
    world_size: int
    store: str
    attempt: int
    agent_store: bool
    one_machine: bool

    @classmethod
    def from_environment(cls) -> Torchrun | None:
        """None where this process was not started by torchrun."""
        env = os.environ
        if "TORCHELASTIC_RUN_ID" not in env:
            return None
        return cls(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            store=f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}",
            attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            one_machine=env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"],
        )
