"""The results of `experiments.reproduce`, from the runs that are finished."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from experiments import common
from experiments.on_device import machine_in_words, machine_of
from ormo_rpc.report.table import as_markdown, spread

if TYPE_CHECKING:
    from experiments.reproduce import Planned

Entry = Mapping[str, Any]
"""A run in the results, see `entry`."""
KEYS = (
    *("status", "test_accuracy", "test_loss", "train_loss", "training_seconds", "delay_mean", "delay_max"),
    *("iterations", "final_params_sha256", "wall_seconds"),
)
ALL_EPOCHS = 160
"""The length of the paper's runs."""
EPOCHS = 15
"""The length without ``--full``."""
DEPARTURES = (
    "The clock is virtual: an undisturbed gradient takes 0.1 s, and the network nothing.",
    "Learning rates are ours and not tuned: each gradient moves the parameters by the same amount in all, `eta` without "
    "momentum and `eta / (1 - beta)` with it.",
    "The slow workers of `het` are reconstructed: a sixteenth of the workers, ten times slower.",
    "`ormo_da` lowers the rate by the rule that docs/algorithms.md states, as the one of the paper's experiments is not known.",
)


def name_of(a: Namespace) -> str:
    """The name of the results' files, which says what is not the default: length and device."""
    length = [] if a.epochs in (None, default_epochs(a)) else [f"{a.epochs}_epochs"]
    return "_".join(["reproduce", *(["full"] if a.full else []), *length, *([a.device] if a.device != "cpu" else [])])


def default_epochs(a: Namespace) -> int:
    """The length of the runs where ``--epochs`` does not say it."""
    return ALL_EPOCHS if a.full else EPOCHS


def epochs_done(rows: Iterable[Mapping[str, Any]]) -> float:
    """The epochs of a run so far, by its rows of metrics."""
    return max((row["epoch"] for row in rows), default=0.0)


def entry(each: Planned, a: Namespace) -> dict[str, Any]:
    """A run in the results: what determines it, how far it is, its figures where it has ended, and its evaluations.

    Raises:
        ConfigError: its folder was made with something else.
    """
    run = each.run
    run.check()
    summary, rows = run.summary, run.rows()
    evaluated = [row for row in rows if row.get("test_accuracy") is not None]
    found = {key: getattr(each, key) for key in ("experiment", "method", "seed", "lr", "epochs", "precision", "version")}
    found |= {"finished": summary is not None, "epochs_done": epochs_done(rows)}
    if rows:
        *earlier, newest = run.environments if a.device == "cpu" else [machine_of(a)]
        found |= {"environment": newest, **({"earlier_environments": earlier} if earlier else {})}
        found |= {"repackaged": "dataset.verify=false" in run.words}
    if summary is not None:
        found |= common.select(summary, KEYS)
        if len(run.attempts) > 1:
            found["wall_seconds"] = None  # that of an attempt that was interrupted may be lost
    columns = {"epoch": "epoch", "virtual_seconds": "seconds", "value": "test_accuracy"}
    return {**found, "test_accuracy_at": {name: [row[key] for row in evaluated] for name, key in columns.items()}}


def begun(entries: Iterable[Entry]) -> list[Entry]:
    """The runs that are finished or have evaluations."""
    return [each for each in entries if each["finished"] or each["epochs_done"]]


def grouped(entries: Iterable[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """The runs by experiment and method, in their order."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for each in entries:
        groups.setdefault((each["experiment"], each["method"]), []).append(each)
    return groups


def table(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """A header and a row for each setting and method with a finished run; figures are of the runs that did not diverge."""
    rows: list[tuple[str, ...]] = [
        (
            "setting",
            "method",
            "lr",
            "precision",
            "seeds finished",
            "diverged",
            "test accuracy",
            "training loss",
            "virtual seconds",
            "mean delay",
            "real minutes",
        )
    ]
    for (experiment, method), runs in grouped(entries).items():
        ended = [each for each in runs if each["finished"]]
        if not ended:
            continue
        completed = [each for each in ended if each["status"] == "completed"]
        rows.append(
            (
                *(experiment, method, f"{ended[0]['lr']:g}", ", ".join(dict.fromkeys(each["precision"] for each in ended))),
                *(f"{len(ended)} of {len(runs)}", common.not_completed(ended)),
                *(
                    spread([each[key] for each in completed], form)
                    for key, form in (
                        ("test_accuracy", ".2%"),
                        ("train_loss", ".3f"),
                        ("training_seconds", ".0f"),
                        ("delay_mean", ".1f"),
                    )
                ),
                spread([each["wall_seconds"] / 60 for each in ended if each["wall_seconds"] is not None], ".1f"),
            )
        )
    return rows


def unfinished(entries: Iterable[Entry]) -> list[str]:
    """A line for each run that has begun and is not finished, and one for those of a setting that have not begun."""
    lines, others = list[str](), dict[str, dict[str, list[str]]]()
    for each in entries:
        if each["finished"]:
            continue
        if not each["epochs_done"]:
            others.setdefault(each["experiment"], {}).setdefault(each["method"], []).append(str(each["seed"]))
            continue
        at = each["test_accuracy_at"]
        so_far = f", {at['value'][-1]:.2%} at epoch {at['epoch'][-1]:.0f}" if at["value"] else ""
        done = f"{each['epochs_done']:.1f} of {each['epochs']} epochs{so_far}"
        lines.append(f"{each['experiment']}, {each['method']}, seed {each['seed']}: {done}")
    for experiment, methods in others.items():
        by_seeds = dict[str, list[str]]()
        for method, seeds in methods.items():
            by_seeds.setdefault(", ".join(seeds), []).append(method)
        told = "; ".join(f"{', '.join(names)} (seed{'s' if ',' in seeds else ''} {seeds})" for seeds, names in by_seeds.items())
        lines.append(f"{experiment}, not begun: {told}")
    return lines


def picture(entries: Sequence[Entry]) -> Figure:
    """Test accuracy over epochs and over virtual seconds, for each setting: a line per run, dashed while it is not finished."""
    experiments = [*dict.fromkeys(each["experiment"] for each in entries)]
    methods = [*dict.fromkeys(each["method"] for each in entries)]
    figure = Figure(figsize=(10, 3.4 * len(experiments)), layout="constrained")
    axes = figure.subplots(len(experiments), 2, squeeze=False)
    colours = matplotlib.colormaps["tab10"]
    for row, experiment in enumerate(experiments):
        named = set[str]()
        for each in (each for each in entries if each["experiment"] == experiment and each["test_accuracy_at"]["value"]):
            at, method = each["test_accuracy_at"], each["method"]
            style = {"color": colours(methods.index(method)), "linewidth": 1.0}
            for column, times in enumerate((at["epoch"], at["virtual_seconds"])):
                line = "-" if each["finished"] else "--"
                axes[row][column].plot(times, at["value"], line, label=None if method in named else method, **style)
            named.add(method)
        for column, unit in enumerate(("epochs", "virtual seconds")):
            axes[row][column].set(xlabel=unit, ylabel="test accuracy", title=experiment)
            axes[row][column].grid(alpha=0.3)
            if named:
                axes[row][column].legend(fontsize="small", frameon=False)
    return figure


def departures(entries: Sequence[Entry], device: str) -> list[str]:
    """Return the differences from the paper's setting, a sentence each."""
    found = [*DEPARTURES]
    if any(each["precision"] == "bf16" for each in begun(entries)):
        found.insert(1, "Passes at precision `bf16` are computed under bfloat16 autocast; all else is float32.")
    if device == "cpu" and any(each["precision"] == "float32" for each in begun(entries)):
        found.append("Passes at precision `float32` are compiled by Inductor.")
    if moved := sum("earlier_environments" in each for each in entries):
        found.append(f"{moved} of the runs were continued with another processor or version, and are of none of them alone.")
    if any(each.get("repackaged") for each in entries):
        found.append("The files of the data set are a repackaged copy.")
    if any(each["epochs"] != ALL_EPOCHS for each in entries):
        found.insert(0, f"{entries[0]['epochs']} epochs in place of {ALL_EPOCHS}, milestones and warm-up scaled alike.")
    return found


def write(entries: Sequence[Entry], a: Namespace) -> None:
    """Write ``reproduce.json``, ``.md`` and ``.png``, under the name that `name_of` gives, and print the table."""
    name, folder = name_of(a), Path(a.into)
    folder.mkdir(parents=True, exist_ok=True)
    left, rows, differing = unfinished(entries), table(entries), departures(entries, a.device)
    count = sum(each["finished"] for each in entries)
    options = f"{' --full' if a.full else ''}{'' if a.device == 'cpu' else f' --device {a.device}'}"
    finished = f"{count} of {len(entries)} runs are finished"
    machines = dict.fromkeys(
        machine_in_words(environment)
        for each in entries
        if "environment" in each
        for environment in (*each.get("earlier_environments", ()), each["environment"])
    )
    parts = [
        "# The experiments of arXiv 2407.19234",
        f"`python -m experiments.reproduce{options}`: ResNet-20, batch 64, momentum 0.9, weight decay "
        f"0.0001, simulated; mean and standard deviation over the seeds that are finished, real "
        f"minutes over those that were not interrupted. {finished}.",
        *(f"{machine}." for machine in machines),
        as_markdown(rows) if len(rows) > 1 else "No run is finished.",
        f"![Test accuracy]({name}.png)",
        "## What differs from the paper's setting",
        "\n".join(f"* {each}" for each in differing),
    ]
    if left:
        parts += ["## Not finished", "\n".join(f"* {line}" for line in left)]
    common.write_results(
        folder / f"{name}.json", json.dumps({"departures": differing, "runs": begun(entries)}, indent=1) + "\n"
    )
    common.write_results(folder / f"{name}.md", "\n\n".join(parts) + "\n")
    picture(begun(entries) or entries).savefig(folder / f"{name}.png", dpi=110)
    print(f"{as_markdown(rows)}\n{finished}")
