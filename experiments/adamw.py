"""Compare AdamW in order of arrival and in order, simulated: ``python -m experiments.adamw``.

K = 4 and 16 virtual workers train a small transformer to predict the next character of the reference manual that Python ships
(`pydoc_data.topics`), with random times (``exponential``), with one worker that is ten times slower (``slow_tail``) and with
workers that are alike (``none``). The procedure is the same for every method and K: each learning rate of one grid is run with
random times and a tuning seed, which is not reported, and, while the best is at an edge, up to three beyond it; the one with
the lowest validation loss at the end is chosen (a run that diverges is out), and the seeds of the table are run with it in each
setting, where the loss on the test split is reported. AdamW and momentum SGD have a grid each, of the same length. Nothing else
is tuned. All runs apply the same number of gradients, so that methods which make one step of K gradients make fewer steps.
Writes ``results/adamw.json`` and ``.md``.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm
from typing_extensions import override

from experiments import common
from ormo_rpc.report.table import as_markdown, spread
from ormo_rpc.storage.environment import environment

ADAMW_GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
SGD_GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
METHODS: Mapping[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "adamw": (("algorithm=adamw",), ADAMW_GRID),
    "adamw_da": (("algorithm=adamw_da",), ADAMW_GRID),
    "ormo_adamw": (("algorithm=ormo_adamw",), ADAMW_GRID),
    "ormo_adamw, sync": (("algorithm=ormo_adamw", "scheduler=sync"), ADAMW_GRID),
    "ormo": (("algorithm=ormo",), SGD_GRID),
}
"""Overrides and learning rates of each method."""
SETTINGS = ("exponential", "slow_tail", "none")
WORKERS = (4, 16)
ITERATIONS = 800
TUNING_SEED = 1000
SEEDS = (0, 1, 2)
KEYS = ("seed", "status", "test_loss", "val_loss", "virtual_seconds", "delay_mean", "delay_max", "final_params_sha256")

CHARACTERS = 240_000
"""Of the manual, which is used from its beginning."""
CONTEXT, WIDTH, HEADS, LAYERS = 32, 48, 4, 1
"""Characters of a sample; features of a character, and the parts that attend on their own; layers."""
TRAINED_ON = 0.9
"""The share of the text that is trained on (or held out from it for validation); the rest is the test split."""


def text() -> tuple[TensorDataset, TensorDataset]:
    """Samples of `CONTEXT` characters, with the characters that follow as targets: training and test split."""
    characters = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    number = {character: place for place, character in enumerate(sorted(set(characters)))}
    numbers = torch.tensor([number[character] for character in characters[:CHARACTERS]])
    cut = int(TRAINED_ON * len(numbers))
    first, second = (part.unfold(0, CONTEXT + 1, CONTEXT) for part in (numbers[:cut], numbers[cut:]))
    return TensorDataset(first[:, :-1], first[:, 1:]), TensorDataset(second[:, :-1], second[:, 1:])


class Transformer(nn.Module):
    """A causal transformer over characters: logits of the shape (N, C, T)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_classes, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)
        self.mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)

    @override
    def forward(self, characters: Tensor) -> Tensor:
        features = self.layers(self.embed(characters) + self.place, mask=self.mask, is_causal=True)
        return self.head(self.norm(features)).movedim(-1, 1)


def run(method: str, workers: int, setting: str, lr: float, seed: int, iterations: int) -> dict[str, Any]:
    """Simulate one run: its summary."""
    overrides, _ = METHODS[method]
    summary, _ = common.run(
        (
            *(*common.QUIET, f"workers={workers}", *overrides, f"heterogeneity={setting}"),
            *(
                "dataset._target_=experiments.adamw.text",
                "dataset.validation=0.1",
                "model._target_=experiments.adamw.Transformer",
            ),
            *("train.epochs=1000", f"train.max_iterations={iterations}", "train.batch_size=8", "train.warmup_epochs=0.05"),
            *("train.weight_decay=0.01", f"train.lr={lr}", f"seed={seed}"),
        )
    )
    return summary


def tune(method: str, workers: int, iterations: int, bar: tqdm[Any]) -> dict[float, float | None]:
    """The validation loss at each learning rate that is tried; None where the run diverges."""

    def score(lr: float) -> float | None:
        tried = run(method, workers, SETTINGS[0], lr, TUNING_SEED, iterations)
        bar.update()
        return tried["val_loss"] if tried["status"] == "completed" else None

    return common.tuned(score, METHODS[method][1])


def main() -> None:
    """Tune, run, and write the results."""
    parser = common.parser(__doc__)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, metavar="K")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, metavar="SETTING")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED")
    a = parser.parse_args()
    into = common.folder(a.into)
    tuned: dict[tuple[str, int], dict[float, float | None]] = {}
    rows: list[dict[str, Any]] = []
    tuning = sum(len(METHODS[method][1]) for method in a.methods)
    total = len(a.workers) * (tuning + len(a.settings) * len(a.methods) * len(a.seeds))
    with tqdm(total=total, unit=" runs") as bar:
        for workers in a.workers:
            for method in a.methods:
                tuned[method, workers] = tune(method, workers, a.iterations, bar)
        for setting in a.settings:
            for (method, workers), scores in tuned.items():
                best, runs = common.best(scores), list[dict[str, Any]]()
                for seed in a.seeds:
                    runs.append(run(method, workers, setting, best, seed, a.iterations))
                    bar.update()
                rows.append(
                    {"setting": setting, "workers": workers, "method": method, "lr": best, "tuning": scores, "runs": runs}
                )
    machine = environment()
    header = {"environment": machine, "iterations": a.iterations, "tuning_seed": TUNING_SEED, "seeds": a.seeds}
    grids = [f"{', '.join(map(str, grid))} ({name})" for name, grid in (("AdamW", ADAMW_GRID), ("momentum SGD", SGD_GRID))]
    stated = (
        f"`python -m experiments.adamw`: a transformer of {WIDTH} features on {CHARACTERS:,} characters, {a.iterations} "
        f"gradients of batches of 8, simulated; virtual seconds. Each method has for each K the learning rates "
        f"{' or '.join(grids)} and, while the best is at an edge, up to {common.BEYOND} beyond it, judged with another seed by "
        f"the validation loss with random times (`{SETTINGS[0]}`); {len(a.seeds)} seeds, mean and standard deviation. "
        f"torch {machine['torch']}, {machine['cpu']}, 1 thread."
    )
    common.write_table(into, "adamw", header, rows, KEYS, stated, as_markdown(cells(rows)))


def cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A header, and a row for each setting, K and method: mean and spread over the runs that completed."""
    found = [("heterogeneity", "K", "method", "lr", "test loss", "virtual seconds", "mean delay", "largest delay", "diverged")]
    for row in sorted(rows, key=lambda row: (SETTINGS.index(row["setting"]), row["workers"])):
        completed = [summary for summary in row["runs"] if summary["status"] == "completed"]
        found.append(
            (
                *(row["setting"], str(row["workers"]), row["method"], f"{row['lr']:g}"),
                spread([summary["test_loss"] for summary in completed], ".3f"),
                spread([summary["virtual_seconds"] for summary in completed], ".1f"),
                spread([summary["delay_mean"] for summary in completed], ".1f"),
                str(max((summary["delay_max"] for summary in completed), default="")),
                common.not_completed(row["runs"]),
            )
        )
    return found


if __name__ == "__main__":
    main()
