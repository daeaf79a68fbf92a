"""Compare accuracy and bytes of each lossy wire format, simulated: ``python -m experiments.compression --root DIRECTORY``.

OrMo with K = 8 equally fast virtual workers, an MLP on Fashion-MNIST. Every format is run with the same seeds at the same two
learning rates, one that suits the exact format and a third of it; nothing is tuned. Writes ``results/compression.json`` and
``.md``; without the data it says so and writes nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import common
from ormo_rpc.composing import compose
from ormo_rpc.report.table import as_markdown, spread
from ormo_rpc.runtimes.job import Job
from ormo_rpc.storage.environment import environment

TOPK, NO_FEEDBACK = "compression=topk", "compression.error_feedback=false"
FORMATS: dict[str, tuple[str, ...]] = {
    "float32 (exact)": (),
    "bf16": ("wire.dtype=bf16",),
    "fp16": ("wire.dtype=fp16",),
    "fp16, error feedback": ("wire.dtype=fp16", "compression.error_feedback=true"),
    "top-k 1%": (TOPK, "compression.ratio=0.01"),
    "top-k 1%, no error feedback": (TOPK, "compression.ratio=0.01", NO_FEEDBACK),
    "top-k 0.1%": (TOPK, "compression.ratio=0.001"),
    "top-k 0.1%, no error feedback": (TOPK, "compression.ratio=0.001", NO_FEEDBACK),
    "PowerSGD rank 1": ("compression=powersgd", "compression.rank=1"),
    "PowerSGD rank 2": ("compression=powersgd", "compression.rank=2"),
    "PowerSGD rank 4": ("compression=powersgd", "compression.rank=4"),
    "parameters bf16": ("wire.params=bf16",),
    "bf16 both ways": ("wire.dtype=bf16", "wire.params=bf16"),
}
SEEDS = (0, 1, 2)
RATES = (0.01, 0.003)
KEYS = (
    *("seed", "lr", "status", "wire", "parameters", "iterations", "test_accuracy", "last_loss", "cpu_seconds", "delay_mean"),
    "final_params_sha256",
)


def overrides(root: str, model: str, epochs: int) -> tuple[str, ...]:
    """The overrides that all runs share."""
    return (
        *(*common.SIMULATED, "workers=8", "algorithm=ormo", f"model={model}"),
        *("dataset=fashion_mnist", f"dataset.root={root}", f"train.epochs={epochs}", "train.batch_size=64"),
    )


def sizes(arguments: tuple[str, ...]) -> tuple[int, int]:
    """Bytes of a push and of the parameters in a reply."""
    config = compose([*arguments])
    job = Job(config)
    params = job.model().flat_params()
    return job.push_format().size, params.numel() * (config.wire.params.rounded or params.dtype).itemsize


def run(arguments: tuple[str, ...], lr: float, seed: int) -> dict[str, Any]:
    """Simulate one run: its summary with the mean loss of the last tenth of the gradients and processor seconds."""
    began = time.process_time()
    summary, applied = common.run((*arguments, f"train.lr={lr}", f"seed={seed}"))
    return {**summary, "last_loss": common.last_loss(applied), "cpu_seconds": time.process_time() - began}


def main() -> None:
    """Run, and write the results."""
    parser = common.parser(__doc__)
    parser.add_argument("--root", default="data", help="folder that holds FashionMNIST/raw")
    parser.add_argument("--model", default="mlp", choices=("mlp", "cnn"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED")
    a = parser.parse_args()
    if not (Path(a.root) / "FashionMNIST" / "raw").is_dir():
        sys.exit(f"skipped: there is no FashionMNIST/raw in {a.root}; say where with --root, or let a run download it")
    into = common.folder(a.into)
    shared = overrides(a.root, a.model, a.epochs)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(a.formats) * len(RATES) * len(a.seeds), unit=" runs") as bar:
        for name in a.formats:
            more = FORMATS[name]
            push_bytes, reply_bytes = sizes((*shared, *more))
            runs: list[dict[str, Any]] = []
            for lr, seed in ((lr, seed) for lr in RATES for seed in a.seeds):
                runs.append(run((*shared, *more), lr, seed))
                bar.update()
            rows.append({"form": name, "overrides": more, "push_bytes": push_bytes, "reply_bytes": reply_bytes, "runs": runs})
    machine = environment()
    setting = {"model": a.model, "epochs": a.epochs, "rates": RATES, "workers": 8, "seeds": a.seeds}
    short = [{**row, "runs": [common.select(summary, KEYS) for summary in row["runs"]]} for row in rows]
    conditions = (
        f"OrMo, async, K = 8 equal workers, {a.model} on Fashion-MNIST, {a.epochs} epochs, batch 64, "
        f"momentum 0.9, {len(a.seeds)} seeds at each learning rate: mean and standard deviation. torch {machine['torch']}, "
        f"{machine['cpu']}, 1 thread."
    )
    table = as_markdown(cells(rows, sizes(shared)[0]))
    (into / "compression.json").write_text(json.dumps({"environment": machine, **setting, "rows": short}, indent=1) + "\n")
    (into / "compression.md").write_text(f"{conditions}\n\n{table}\n")
    print(table)


def cells(rows: Sequence[dict[str, Any]], exact: int) -> list[tuple[str, ...]]:
    """A header, and a row for each format: accuracies of the runs that completed, bytes as a part of ``exact``."""
    accuracies = (f"test accuracy, lr {lr:g}" for lr in RATES)
    losses = (f"training loss, lr {lr:g}" for lr in RATES)
    found: list[tuple[str, ...]] = [("wire", "bytes a push", "of float32", "bytes a reply", *accuracies, *losses, "diverged")]
    for row in rows:
        completed = [summary for summary in row["runs"] if summary["status"] == "completed"]
        by_rate = [[summary for summary in completed if summary["lr"] == lr] for lr in RATES]
        found.append(
            (
                row["form"],
                f"{row['push_bytes']:,}",
                f"1 / {exact / row['push_bytes']:.1f}" if row["push_bytes"] != exact else "1",
                f"{row['reply_bytes']:,}",
                *(spread([summary["test_accuracy"] for summary in some], ".2%") for some in by_rate),
                *(spread([summary["last_loss"] for summary in some], ".4f") for some in by_rate),
                common.not_completed(row["runs"]),
            )
        )
    return found


if __name__ == "__main__":
    main()
