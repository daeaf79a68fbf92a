"""Compare the time to a target accuracy under three schedulers, simulated: ``python -m experiments.when_it_pays``.

K = 8 virtual workers train the default job (handwritten digits, MLP, batches of 32) with the OrMo algorithm under three
schedulers: ``async`` answers each worker at once; ``sync`` waits for all 8, which is synchronous SGD with momentum; ``partial``
waits for any 7 of them. Workers are alike (``none``), one is ten times slower (``one_slow``), or each gradient takes a random
time (``exponential``). A gradient takes 0.1 virtual seconds where nothing slows it down; the network takes no time.

Every case is tuned alike: each learning rate of one grid is run with five seeds that are not reported, and the one with the
shortest mean time to the target on the validation split (a fifth of the training samples, held out in all runs) is taken, where
all five reach it. What is reported is the time on the test split. Both accuracies are measured at the end of each epoch, that
is, every 36 gradients. Writes ``results/when_it_pays.json`` and ``.md``, and ``docs/when_it_pays.png``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from experiments import common
from ormo_rpc import train
from ormo_rpc.report.runs import Run
from ormo_rpc.report.table import as_markdown, spread
from ormo_rpc.storage.environment import environment

WORKERS = 8
SCHEDULERS: Mapping[str, tuple[str, ...]] = {
    "sync": ("scheduler=sync",),
    "partial": ("scheduler=partial", f"scheduler.k={WORKERS - 1}"),
    "async": ("scheduler=async",),
}
LABELS = {"sync": "synchronous", "partial": f"waits for {WORKERS - 1} of {WORKERS}", "async": "asynchronous"}
SETTINGS = {"none": "all workers alike", "one_slow": "one worker 10 times slower", "exponential": "random times"}
RATES = (0.01, 0.02, 0.03, 0.05, 0.1)
TARGET = 0.95
VALIDATION = 0.2
EPOCHS = 15
TUNING_SEEDS = (1000, 1001, 1002, 1003, 1004)
SEEDS = tuple(range(10))
KEYS = ("status", "test_accuracy", "val_accuracy", "virtual_seconds", "delay_mean", "final_params_sha256")
TIME, TUNING_TIME = "seconds_to_target", "seconds_to_target_in_validation"
"""Entries of a run: the reported time, and the one that the learning rate is chosen by."""
DOCS = Path(__file__).parents[1] / "docs"


def run(setting: str, scheduler: str, lr: float, seed: int) -> dict[str, Any]:
    """Simulate one run; return the times at which it reached the target on each split (None: never), and final figures."""
    overrides = (
        *(*common.SIMULATED, f"workers={WORKERS}", "checkpoint.every_seconds=0"),
        *("algorithm=ormo", *SCHEDULERS[scheduler], f"heterogeneity={setting}"),
        *(f"train.epochs={EPOCHS}", f"train.lr={lr}", f"seed={seed}", f"dataset.validation={VALIDATION}"),
    )
    with tempfile.TemporaryDirectory(prefix="when_it_pays_") as folder:
        summary = train(overrides, run_dir=Path(folder) / "run")
        recorded = Run.load(Path(folder) / "run")
    reached = {
        time: next((when for _, when, accuracy in zip(*recorded.evaluated(key), strict=True) if accuracy >= TARGET), None)
        for time, key in ((TIME, "test_accuracy"), (TUNING_TIME, "val_accuracy"))
    }
    return {"lr": lr, "seed": seed, **reached, **common.select(summary, KEYS)}


def mean_time(runs: Sequence[Mapping[str, Any]], time: str = TIME) -> float:
    """Mean virtual seconds to the target; infinite where a run did not reach it."""
    return statistics.fmean(float("inf") if each[time] is None else each[time] for each in runs)


def case(setting: str, scheduler: str, bar: tqdm[Any]) -> dict[str, Any]:
    """Tune one scheduler in one setting, and run it with the reported seeds."""

    def repeat(lr: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for seed in seeds:
            found.append(run(setting, scheduler, lr, seed))
            bar.update()
        return found

    tuning = {lr: repeat(lr, TUNING_SEEDS) for lr in RATES}
    best = common.best({lr: mean_time(runs, TUNING_TIME) for lr, runs in tuning.items()})
    return {
        "setting": setting,
        "scheduler": scheduler,
        "lr": best,
        "tuning": {lr: [each[TUNING_TIME] for each in runs] for lr, runs in tuning.items()},
        "runs": repeat(best, SEEDS),
    }


def cells(row: Mapping[str, Any], synchronous: Mapping[str, Any]) -> tuple[str, ...]:
    """One row of the table."""
    runs = row["runs"]
    reached = [each[TIME] for each in runs if each[TIME] is not None]
    ratio = mean_time(synchronous["runs"]) / mean_time(runs)
    return (
        *(row["setting"], row["scheduler"], f"{row['lr']:g}"),
        *(f"{len(reached)} of {len(runs)}", spread(reached, ".1f"), f"{ratio:.2f}"),
        spread([each["test_accuracy"] for each in runs], ".2%"),
        spread([each["virtual_seconds"] for each in runs], ".1f"),
        spread([each["delay_mean"] for each in runs], ".1f"),
    )


def picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of the time to the target with each seed as a dot; the number is the mean."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for number, (scheduler, colour) in enumerate(zip(SCHEDULERS, ("#999999", "#6fa8dc", "#1f4e79"), strict=True)):
        selected = [
            next(row for row in rows if (row["setting"], row["scheduler"]) == (setting, scheduler)) for setting in SETTINGS
        ]
        places = [place + 0.27 * (number - 1) for place in range(len(selected))]
        axes.bar(places, [mean_time(row["runs"]) for row in selected], width=0.25, color=colour, label=LABELS[scheduler])
        for place, row in zip(places, selected, strict=True):
            seeds = [each[TIME] for each in row["runs"]]
            axes.plot([place] * len(seeds), seeds, "k.", markersize=2.5)
            axes.annotate(f"{mean_time(row['runs']):.1f}", (place, max(seeds)), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(SETTINGS)), list(SETTINGS.values()))
    axes.set_ylabel(f"virtual seconds to {TARGET:.0%}\ntest accuracy (less is better)")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    """Tune, run, and write the results."""
    into: Path = common.parser(__doc__).parse_args().into
    cases = [(setting, scheduler) for setting in SETTINGS for scheduler in SCHEDULERS]
    with tqdm(total=len(cases) * (len(RATES) * len(TUNING_SEEDS) + len(SEEDS)), unit=" runs") as bar:
        rows = [case(setting, scheduler, bar) for setting, scheduler in cases]
    machine = environment()
    header = {
        "environment": machine,
        "target": TARGET,
        "epochs": EPOCHS,
        "validation": VALIDATION,
        "workers": WORKERS,
        "rates": RATES,
    }
    synchronous = {row["setting"]: row for row in rows if row["scheduler"] == "sync"}
    table = [
        (
            *("heterogeneity", "scheduler", "lr", "reached", f"seconds to {TARGET:.0%}", "times as fast as sync"),
            *("test accuracy in the end", "seconds in all", "mean delay"),
        ),
        *(cells(row, synchronous[row["setting"]]) for row in rows),
    ]
    stated = (
        f"`python -m experiments.when_it_pays`: OrMo, K = {WORKERS}, digits, MLP, batch 32, momentum 0.9, {EPOCHS} epochs, "
        "simulated; virtual seconds, a gradient takes 0.1 where nothing slows it down. "
        f"Learning rates from {', '.join(map(str, RATES))}, tuned with {len(TUNING_SEEDS)} other seeds on a validation split "
        f"of {VALIDATION:g} of the training samples, which all runs hold out; times and accuracies are of the test split; "
        f"{len(SEEDS)} seeds, mean and standard deviation. torch {machine['torch']}, {machine['cpu']}, 1 thread."
    )
    (into / "when_it_pays.json").write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    (into / "when_it_pays.md").write_text(f"# When asynchrony pays\n\n{stated}\n\n{as_markdown(table)}\n")
    picture(rows).savefig((DOCS if into == common.RESULTS else into) / "when_it_pays.png", dpi=110)
    print(as_markdown(table))


if __name__ == "__main__":
    main()
