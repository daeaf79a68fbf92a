"""Compare the six methods of arXiv 2407.19234, simulated: ``python -m experiments.paper_methods --root DIRECTORY``.

K = 16 virtual workers, equally fast (``none``) and with one of them ten times slower (``slow_tail``), an MLP on Fashion-MNIST.
The procedure is the same for every method and setting: each learning rate of one grid is run with a tuning seed, which is not
reported, and, while the best is at an edge, up to three beyond it; the one with the lowest mean loss over the last tenth of the
gradients is chosen (a run that diverges is out), and the seeds of the table are run with it. Nothing else is tuned.
Writes ``results/paper_methods.json`` and ``.md``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from experiments import common
from ormo_rpc.report.table import as_markdown, spread
from ormo_rpc.storage.environment import environment

METHODS = ("asgd", "naive", "shifted", "smega2", "ormo", "ormo_da")
SETTINGS = ("none", "slow_tail")
WORKERS = 16
GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
TUNING_SEED = 1000
SEEDS = (0, 1, 2)
KEYS = ("seed", "status", "test_accuracy", "last_loss", "virtual_seconds", "delay_mean", "delay_max", "final_params_sha256")


def run(method: str, setting: str, lr: float, seed: int, root: str, epochs: int) -> dict[str, Any]:
    """Simulate one run: its summary with the mean loss of the last tenth of the gradients."""
    summary, applied = common.run(
        (
            *(*common.QUIET, f"workers={WORKERS}", "dataset=fashion_mnist", f"dataset.root={root}"),
            *("model=mlp", f"train.epochs={epochs}", "train.batch_size=64"),
            *(f"algorithm={method}", f"heterogeneity={setting}", f"train.lr={lr}", f"seed={seed}"),
        )
    )
    return {**summary, "last_loss": common.last_loss(applied)}


def tune(method: str, setting: str, a: Namespace, bar: tqdm[Any]) -> dict[float, float | None]:
    """The loss at each learning rate that is tried; None where the run diverges."""

    def score(lr: float) -> float | None:
        tried = run(method, setting, lr, TUNING_SEED, a.root, a.epochs)
        bar.update()
        return tried["last_loss"] if tried["status"] == "completed" else None

    return common.tuned(score, a.grid)


def main() -> None:
    """Tune, run, and write the results."""
    parser = common.parser(__doc__)
    parser.add_argument("--root", default="data", help="folder that holds FashionMNIST/raw")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--grid", type=float, nargs="+", default=GRID, metavar="LR")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED")
    a = parser.parse_args()
    into = common.folder(a.into)
    cases = [(setting, method) for setting in SETTINGS for method in a.methods]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(cases) * (len(a.grid) + len(a.seeds)), unit=" runs") as bar:
        for setting, method in cases:
            tuning = tune(method, setting, a, bar)
            best = common.best(tuning)
            summaries: list[dict[str, Any]] = []
            for seed in a.seeds:
                summaries.append(run(method, setting, best, seed, a.root, a.epochs))
                bar.update()
            rows.append({"setting": setting, "method": method, "lr": best, "tuning": tuning, "runs": summaries})
    machine = environment()
    header = {"environment": machine, "epochs": a.epochs, "grid": a.grid, "tuning_seed": TUNING_SEED, "seeds": a.seeds}
    stated = (
        f"`python -m experiments.paper_methods`: K = {WORKERS}, MLP on Fashion-MNIST, {a.epochs} epochs, batch 64, momentum "
        f"0.9, simulated; virtual seconds. Each method in each setting has the learning rates {', '.join(map(str, a.grid))} "
        f"and, while the best is at an edge, up to {common.BEYOND} beyond it, judged with another seed by the training loss, "
        f"which is the mean over the last tenth of the gradients; {len(a.seeds)} seeds, mean and standard deviation. "
        f"torch {machine['torch']}, {machine['cpu']}, 1 thread."
    )
    common.write_table(into, "paper_methods", header, rows, KEYS, stated, as_markdown(cells(rows)))


def cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A header, and a row for each setting and method: mean and spread over the runs that completed."""
    found = [("heterogeneity", "method", "lr", "test accuracy", "training loss", "virtual seconds", "mean delay", "diverged")]
    for row in rows:
        completed = [summary for summary in row["runs"] if summary["status"] == "completed"]
        found.append(
            (
                *(row["setting"], row["method"], f"{row['lr']:g}"),
                spread([summary["test_accuracy"] for summary in completed], ".2%"),
                spread([summary["last_loss"] for summary in completed], ".4f"),
                spread([summary["virtual_seconds"] for summary in completed], ".0f"),
                spread([summary["delay_mean"] for summary in completed], ".1f"),
                common.not_completed(row["runs"]),
            )
        )
    return found


if __name__ == "__main__":
    main()
