"""Replay live runs and compare them bit for bit: ``python -m experiments.replays [--cifar DIRECTORY]``.

Runs each case live on this machine, replays it from its trace, and writes ``results/replays.md``. CIFAR-10 needs the folder
that holds ``cifar-10-batches-py`` (``--cifar``); without it that case is left out, and the result says so.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from experiments import common
from ormo_rpc import RunFailed, train
from ormo_rpc.report.table import as_markdown
from ormo_rpc.storage.environment import environment
from ormo_rpc.storage.run_directory import read_trace

CASES: dict[str, tuple[str, ...]] = {
    "ormo, one slow worker": ("heterogeneity=one_slow",),
    "smega2": ("algorithm=smega2", "train.lr=0.005"),
    "ormo under sync": ("scheduler=sync",),
    "fedbuff": ("algorithm=fedbuff",),
    "ringmaster with discards": ("algorithm=ringmaster", "algorithm.delay_threshold=2", "heterogeneity=one_slow"),
    "MLP with dropout": ("model.dropout=0.5", "model.depth=2"),
}
RESNET = ("dataset=cifar10", "dataset.verify=false", "model=resnet20", "train.max_iterations=100")


def replayed(overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Run live and replay; return events, discards, largest delay, the verdict, and the hash of the parameters."""
    with tempfile.TemporaryDirectory(prefix="replays_") as folder:
        live = Path(folder) / "live"
        summary = train(["logger=none", *overrides], run_dir=live)
        events = read_trace(live)[1]
        try:
            train(["runtime=replay", f"replay.run={live}"], run_dir=Path(folder) / "replay")
            verdict = "identical"
        except RunFailed as failure:
            verdict = str(failure)
    figures = (str(len(events)), str(summary["discarded"]), str(summary["delay_max"]))
    return (*figures, verdict, summary["final_params_sha256"][:16])


def main() -> None:
    """Run, replay, and write the results."""
    parser = common.parser(__doc__)
    parser.add_argument("--cifar", metavar="FOLDER", help="folder that holds cifar-10-batches-py")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    a = parser.parse_args()
    into = common.folder(a.into)
    cases = {name: (f"train.epochs={a.epochs}", *CASES[name]) for name in a.cases}
    if a.cifar:
        cases["ResNet-20 on CIFAR-10 with augmentation"] = (*RESNET, f"train.epochs={a.epochs}", f"dataset.root={a.cifar}")
    table: list[tuple[str, ...]] = [
        ("live run, 4 workers", "events", "discards", "largest delay", "replay", "final_params_sha256")
    ]
    for name, overrides in cases.items():
        table.append((name, *replayed(overrides)))
        print("  ".join(table[-1]), flush=True)
    versions = environment()
    left_out = "" if a.cifar else "\n\nLeft out: ResNet-20 on CIFAR-10, for want of the data."
    machine = f"torch {versions['torch']}, {versions['cpu']}, {os.cpu_count()} cores, 1 thread per process"
    (into / "replays.md").write_text(f"{as_markdown(table)}{left_out}\n\n{machine}, 1 run per case.\n")


if __name__ == "__main__":
    main()
