"""The six methods of arXiv 2407.19234 side by side, simulated: ``python benchmarks/paper_methods.py --root DIRECTORY``.

K = 16 virtual workers, alike (``none``) and with one of them ten times slower (``slow_tail``), an MLP on Fashion-MNIST. The
procedure is the same for every method and setting: each learning rate of one grid is run with a seed that is not reported (the
tuning seed), the one with the lowest mean loss over the last tenth of the gradients is taken (a run that diverges is out), and
the seeds of the table are run with it. Nothing else is tuned. Writes ``results/paper_methods.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ormo_rpc import train
from ormo_rpc.report.table import as_markdown, spread
from ormo_rpc.storage.run_directory import environment, read_trace

METHODS = ("asgd", "naive", "shifted", "smega2", "ormo", "ormo_da")
SETTINGS = ("none", "slow_tail")
GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
TUNING_SEED = 1000
SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parents[1] / "results"


def run(method: str, setting: str, lr: float, seed: int, root: str, epochs: int) -> dict[str, Any]:
    """One simulated run: its summary, with the mean loss of the last tenth of the gradients."""
    overrides = (
        *("runtime=sim", "workers=16", "logger=none", "logger.progress=false", "dataset=fashion_mnist", f"dataset.root={root}"),
        *("model=mlp", f"train.epochs={epochs}", "train.batch_size=64"),
        *(f"algorithm={method}", f"heterogeneity={setting}", f"train.lr={lr}", f"seed={seed}"),
    )
    folder = Path(tempfile.mkdtemp(prefix="paper_methods_"))
    try:
        summary = train(overrides, run_dir=folder / "run")
        losses = [event["loss"] for event in read_trace(folder / "run")[1] if event["event"] == "apply"]
    finally:
        shutil.rmtree(folder)
    last = losses[-max(1, len(losses) // 10) :]
    return {**summary, "last_loss": statistics.fmean(last) if last else None}


def main() -> None:
    """Tune, run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="the folder that holds FashionMNIST/raw")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    cases = [(setting, method) for setting in SETTINGS for method in METHODS]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(cases) * (len(GRID) + len(SEEDS)), unit=" runs") as bar:
        for setting, method in cases:
            tuning: dict[float, float | None] = {}
            for lr in GRID:
                tried = run(method, setting, lr, TUNING_SEED, arguments.root, arguments.epochs)
                tuning[lr] = tried["last_loss"] if tried["status"] == "completed" else None
                bar.update()
            best = min((lr for lr, loss in tuning.items() if loss is not None), key=lambda lr: tuning[lr] or 0.0)
            summaries: list[dict[str, Any]] = []
            for seed in SEEDS:
                summaries.append(run(method, setting, best, seed, arguments.root, arguments.epochs))
                bar.update()
            rows.append({"setting": setting, "method": method, "lr": best, "tuning": tuning, "runs": summaries})
    RESULTS.mkdir(exist_ok=True)
    header = {
        "environment": environment(),
        "epochs": arguments.epochs,
        "grid": GRID,
        "tuning_seed": TUNING_SEED,
        "seeds": SEEDS,
    }
    (RESULTS / "paper_methods.json").write_text(json.dumps({**header, "rows": [_short(row) for row in rows]}, indent=1) + "\n")
    table = [("heterogeneity", "method", "lr", "test accuracy", "training loss", "virtual seconds", "mean delay", "diverged")]
    table += [_cells(row) for row in rows]
    (RESULTS / "paper_methods.md").write_text(as_markdown(table) + "\n")
    print(as_markdown(table))


def _short(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("seed", "status", "test_accuracy", "last_loss", "virtual_seconds", "delay_mean", "delay_max", "final_params_sha256")
    return {**row, "runs": [{key: summary[key] for key in keys} for summary in row["runs"]]}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    whole = [summary for summary in row["runs"] if summary["status"] == "completed"]
    return (
        *(row["setting"], row["method"], f"{row['lr']:g}"),
        spread([summary["test_accuracy"] for summary in whole], ".2%"),
        spread([summary["last_loss"] for summary in whole], ".4f"),
        spread([summary["virtual_seconds"] for summary in whole], ".0f"),
        spread([summary["delay_mean"] for summary in whole], ".1f"),
        f"{len(row['runs']) - len(whole)} of {len(row['runs'])}",
    )


if __name__ == "__main__":
    main()
