"""A rank of ``runtime=ddp`` for tests: ``python -m tests.support.ddp_ranks RANK SIZE FOLDER`` trains each configuration there.

Rank 0 leaves the final parameters of ``NAME.yaml`` in ``NAME.pt``.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ormo_rpc.config.parsing import load_config
from ormo_rpc.runtimes.ddp.trainer import Trainer
from ormo_rpc.runtimes.job import Job


def main(rank: int, size: int, folder: Path) -> None:
    """Train all configurations, one after the other."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    for file in sorted(folder.glob("*.yaml")):
        trainer = Trainer(Job(load_config(file)), rank, size)
        trainer.warm_up()
        for number in range(trainer.rounds.count):
            trainer.round(number)
        if rank == 0:
            torch.save(trainer.model.flat_params(), file.with_suffix(".pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
