"""Accuracy against bytes for each lossy wire form, simulated: ``python -m benchmarks.compression --root DIRECTORY``.

OrMo with K = 8 virtual workers that are alike, an MLP on Fashion-MNIST. Every wire form is run with the same seeds at the same
two learning rates, one that suits the exact wire and a third of it; nothing is tuned. Writes ``results/compression.json`` and
``.md``; without the data it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ormo_rpc import train
from ormo_rpc.cli import compose
from ormo_rpc.report.table import as_markdown, spread
from ormo_rpc.runtimes.job import Job
from ormo_rpc.storage.run_directory import environment, read_trace

TOPK, NO_FEEDBACK = "compression=topk", "compression.error_feedback=false"
FORMS: dict[str, tuple[str, ...]] = {
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
RESULTS = Path(__file__).parents[1] / "results"


def overrides(root: str, model: str, epochs: int) -> tuple[str, ...]:
    """What all runs have in common."""
    return (
        *("runtime=sim", "workers=8", "algorithm=ormo", "logger=none", "logger.progress=false"),
        *("dataset=fashion_mnist", f"dataset.root={root}", f"model={model}", f"train.epochs={epochs}", "train.batch_size=64"),
    )


def sizes(arguments: tuple[str, ...]) -> tuple[int, int]:
    """Bytes of a push and of the parameters in a reply."""
    config = compose([*arguments])
    job = Job(config)
    params = job.model().flat_params()
    return job.push_format().size, params.numel() * (config.wire.params.rounded or params.dtype).itemsize


def run(arguments: tuple[str, ...], lr: float, seed: int) -> dict[str, Any]:
    """One simulated run: its summary, with the mean loss of the last tenth of the gradients and processor seconds."""
    folder = Path(tempfile.mkdtemp(prefix="compression_"))
    began = time.process_time()
    try:
        summary = train([*arguments, f"train.lr={lr}", f"seed={seed}"], run_dir=folder / "run")
        losses = [event["loss"] for event in read_trace(folder / "run")[1] if event["event"] == "apply"]
    finally:
        shutil.rmtree(folder)
    last = losses[-max(1, len(losses) // 10) :]
    return {**summary, "last_loss": statistics.fmean(last), "cpu_seconds": time.process_time() - began}


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="the folder that holds FashionMNIST/raw")
    parser.add_argument("--model", default="mlp", choices=("mlp", "cnn"))
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    if not (Path(arguments.root) / "FashionMNIST" / "raw").is_dir():
        sys.exit(f"skipped: there is no FashionMNIST/raw in {arguments.root}; say where with --root, or let a run download it")
    common = overrides(arguments.root, arguments.model, arguments.epochs)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(FORMS) * len(RATES) * len(SEEDS), unit=" runs") as bar:
        for name, more in FORMS.items():
            push_bytes, reply_bytes = sizes((*common, *more))
            runs: list[dict[str, Any]] = []
            for lr, seed in itertools.product(RATES, SEEDS):
                runs.append(run((*common, *more), lr, seed))
                bar.update()
            rows.append({"form": name, "overrides": more, "push_bytes": push_bytes, "reply_bytes": reply_bytes, "runs": runs})
    setting = {"model": arguments.model, "epochs": arguments.epochs, "rates": RATES, "workers": 8, "seeds": SEEDS}
    content = {"environment": environment(), **setting, "rows": [_short(row) for row in rows]}
    table = as_markdown(cells(rows))
    here = environment()
    stated = (
        f"OrMo, async, K = 8 alike workers, {arguments.model} on Fashion-MNIST, {arguments.epochs} epochs, batch 64, "
        f"momentum 0.9, {len(SEEDS)} seeds at each learning rate: mean and standard deviation. torch {here['torch']}, "
        f"{here['cpu']}, 1 thread."
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compression.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "compression.md").write_text(f"{stated}\n\n{table}\n")
    print(table)


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table; accuracies are of the runs that did not diverge, ratios those to the first row."""
    exact = rows[0]["push_bytes"]
    accuracies = (f"test accuracy, lr {lr:g}" for lr in RATES)
    losses = (f"training loss, lr {lr:g}" for lr in RATES)
    found: list[tuple[str, ...]] = [("wire", "bytes a push", "of float32", "bytes a reply", *accuracies, *losses, "diverged")]
    for row in rows:
        whole = [summary for summary in row["runs"] if summary["status"] == "completed"]
        by_rate = [[summary for summary in whole if summary["lr"] == lr] for lr in RATES]
        found.append(
            (
                row["form"],
                f"{row['push_bytes']:,}",
                f"1 / {exact / row['push_bytes']:.1f}" if row["push_bytes"] != exact else "1",
                f"{row['reply_bytes']:,}",
                *(spread([summary["test_accuracy"] for summary in some], ".2%") for some in by_rate),
                *(spread([summary["last_loss"] for summary in some], ".4f") for some in by_rate),
                f"{len(row['runs']) - len(whole)} of {len(row['runs'])}",
            )
        )
    return found


def _short(row: dict[str, Any]) -> dict[str, Any]:
    keys = (
        "seed",
        "lr",
        "status",
        "wire",
        "parameters",
        "iterations",
        "test_accuracy",
        "last_loss",
        "cpu_seconds",
        "delay_mean",
    )
    keys = (*keys, "final_params_sha256")
    return {**row, "runs": [{key: summary[key] for key in keys} for summary in row["runs"]]}


if __name__ == "__main__":
    main()
