"""Live runs over RPC, computed again bit for bit: ``python benchmarks/replays.py [--cifar DIRECTORY]``.

Runs each case live on this machine, replays it from its trace, and writes ``results/replays.md``. CIFAR-10 needs the
folder that holds ``cifar-10-batches-py`` (``--cifar``) and is left out, and said to be, without it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from ormo_rpc import RunFailed, train
from ormo_rpc.report.table import as_markdown
from ormo_rpc.storage.run_directory import environment, read_trace

CASES: dict[str, tuple[str, ...]] = {
    "ormo, one slow worker": ("heterogeneity=one_slow",),
    "smega2": ("algorithm=smega2", "train.lr=0.005"),
    "ormo under sync": ("scheduler=sync",),
    "fedbuff": ("algorithm=fedbuff",),
    "ringmaster with discards": ("algorithm=ringmaster", "algorithm.delay_threshold=2", "heterogeneity=one_slow"),
    "MLP with dropout": ("model.dropout=0.5", "model.depth=2"),
}
RESNET = ("dataset=cifar10", "dataset.verify=false", "model=resnet20", "train.max_iterations=100")
RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Run, replay, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", help="the folder that holds cifar-10-batches-py")
    cifar = parser.parse_args().cifar
    cases = dict(CASES)
    if cifar:
        cases["ResNet-20 on CIFAR-10 with augmentation"] = (*RESNET, f"dataset.root={cifar}")
    table: list[tuple[str, ...]] = [
        ("live run, 4 workers", "events", "discards", "largest delay", "replay", "final_params_sha256")
    ]
    for name, overrides in cases.items():
        with tempfile.TemporaryDirectory(prefix="replays_") as folder:
            live = Path(folder) / "live"
            summary = train(["logger=none", "train.epochs=10", *overrides], run_dir=live)
            events = read_trace(live)[1]
            try:
                train(["runtime=replay", f"replay.run={live}"], run_dir=Path(folder) / "replay")
                verdict = "identical"
            except RunFailed as failure:
                verdict = str(failure)
            figures = (str(len(events)), str(summary["discarded"]), str(summary["delay_max"]))
            table.append((name, *figures, verdict, summary["final_params_sha256"][:16]))
            print("  ".join(table[-1]), flush=True)
    here = environment()
    left_out = "" if cifar else "\n\nLeft out: ResNet-20 on CIFAR-10, for want of the data."
    RESULTS.mkdir(exist_ok=True)
    machine = f"torch {here['torch']}, {here['cpu']}, {os.cpu_count()} cores, 1 thread per process"
    text = f"{as_markdown(table)}{left_out}\n\n{machine}, 1 run per case.\n"
    (RESULTS / "replays.md").write_text(text)


if __name__ == "__main__":
    main()
