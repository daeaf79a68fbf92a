"""The results of `experiments.reproduce`, from the runs that are finished."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import gpu_machine
from experiments import common
from experiments.resumable import ResumableRun
from ormo_rpc.report.table import as_markdown, spread
from ormo_rpc.storage.environment import environment

if TYPE_CHECKING:
    from experiments.reproduce import Planned

KEYS = (
    *("status", "test_accuracy", "test_loss", "train_loss", "training_seconds", "delay_mean", "delay_max"),
    *("iterations", "final_params_sha256", "wall_seconds"),
)
MACHINE = "machine.json"
"""The GPU and its machine, in the folder of the runs."""
ALL_EPOCHS = 160
"""The length of the paper's runs."""
DEPARTURES = (
    "The clock is virtual: an undisturbed gradient takes 0.1 s, and the network nothing.",
    "Passes are computed under bfloat16 autocast; parameters, momentum and gradients are float32.",
    "Learning rates are ours and not tuned: each gradient moves the parameters by the same amount in all, `eta` without "
    "momentum and `eta / (1 - beta)` with it.",
    "The slow workers of `het` are reconstructed: a sixteenth of the workers, ten times slower.",
    "`ormo_da` lowers the rate by the rule that docs/algorithms.md states, as the one of the paper's experiments is not known.",
)


def epochs_done(run: ResumableRun) -> float:
    """The epochs of a run so far, by its newest row of metrics."""
    return max((row["epoch"] for row in run.rows()), default=0.0)


def real_minutes(run: ResumableRun) -> float | None:
    """The real minutes of a finished run; None where an attempt before was interrupted, whose time may be lost."""
    summary = run.summary
    return None if summary is None or len(run.attempts) > 1 else summary["wall_seconds"] / 60


def note_machine(work: Path, about: Mapping[str, Any]) -> None:
    """Keep what a GPU and its machine are beside the runs, as results may be written elsewhere.

    Whoever knows more, such as what else has run on the GPU, may add an entry ``note``, which is kept.
    """
    file = work / MACHINE
    former = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    note = {"note": former["note"]} if "note" in former else {}
    file.write_text(json.dumps({**about, **note}, indent=1) + "\n", encoding="utf-8")


def machine_of(a: Namespace) -> dict[str, Any]:
    """The machine of the runs: with a GPU the one that was kept beside them, else this one."""
    kept = a.work / MACHINE
    return json.loads(kept.read_text("utf-8")) if a.device != "cpu" and kept.is_file() else environment()


def machine_in_words(machine: Mapping[str, Any]) -> str:
    """Device, precision and versions in a sentence."""
    if "card" not in machine:
        return f"torch {machine['torch']}, {machine['cpu']}, 1 thread, channels last"
    at_once = "one run at a time" if machine["jobs"] == 1 else f"{machine['jobs']} runs at once"
    note = f" {machine['note']}." if "note" in machine else ""
    return (
        f"Data, workers and server on a GPU, each gradient one captured graph, channels last, {at_once}.{note} "
        f"{gpu_machine.in_words({**machine})}"
    )


def name_of(a: Namespace) -> str:
    """The name of the results' files, which says device and length."""
    return "_".join(["reproduce", *(["full"] if a.full else []), *([a.device] if a.device != "cpu" else [])])


def curve(run: ResumableRun, key: str = "test_accuracy") -> tuple[list[float], list[float], list[float]]:
    """Epochs, virtual seconds and values of a metric in every evaluation so far."""
    rows = [row for row in run.rows() if row.get(key) is not None]
    return [row["epoch"] for row in rows], [row["seconds"] for row in rows], [row[key] for row in rows]


def grouped(plan: Sequence[Planned]) -> dict[tuple[str, str], list[Planned]]:
    """The runs by experiment and method, in the order of the plan."""
    groups: dict[tuple[str, str], list[Planned]] = {}
    for each in plan:
        groups.setdefault((each.experiment, each.method), []).append(each)
    return groups


def table(plan: Sequence[Planned]) -> list[tuple[str, ...]]:
    """A header and a row for each setting and method with a finished run; figures are of the runs that did not diverge."""
    rows: list[tuple[str, ...]] = [
        (
            "setting",
            "method",
            "lr",
            "seeds finished",
            "diverged",
            "test accuracy",
            "training loss",
            "virtual seconds",
            "mean delay",
            "real minutes",
        )
    ]
    for (experiment, method), runs in grouped(plan).items():
        ended = [summary for each in runs if (summary := each.run.summary) is not None]
        if not ended:
            continue
        completed = [summary for summary in ended if summary["status"] == "completed"]
        rows.append(
            (
                *(experiment, method, f"{runs[0].lr:g}", f"{len(ended)} of {len(runs)}", common.not_completed(ended)),
                *(
                    spread([summary[key] for summary in completed], form)
                    for key, form in (
                        ("test_accuracy", ".2%"),
                        ("train_loss", ".3f"),
                        ("training_seconds", ".0f"),
                        ("delay_mean", ".1f"),
                    )
                ),
                spread([minutes for each in runs if (minutes := real_minutes(each.run)) is not None], ".1f"),
            )
        )
    return rows


def unfinished(plan: Sequence[Planned]) -> list[str]:
    """A line for each run that is not finished."""
    lines: list[str] = []
    for each in plan:
        if each.run.summary is None:
            epochs, _, values = curve(each.run)
            so_far = f", {values[-1]:.2%} at epoch {epochs[-1]:.0f}" if values else ""
            done = f"{epochs_done(each.run):.1f} of {each.epochs} epochs{so_far}"
            lines.append(f"{each.experiment}, {each.method}, seed {each.seed}: {done}")
    return lines


def picture(plan: Sequence[Planned]) -> Figure:
    """Test accuracy over epochs and over virtual seconds, for each setting: a line per run, dashed while it is not finished."""
    experiments = [*dict.fromkeys(each.experiment for each in plan)]
    methods = [*dict.fromkeys(each.method for each in plan)]
    figure = Figure(figsize=(10, 3.4 * len(experiments)), layout="constrained")
    axes = figure.subplots(len(experiments), 2, squeeze=False)
    colours = matplotlib.colormaps["tab10"]
    for row, experiment in enumerate(experiments):
        for each in (each for each in plan if each.experiment == experiment):
            epochs, seconds, values = curve(each.run)
            style = {"color": colours(methods.index(each.method)), "linewidth": 1.0}
            label = each.method if each.seed == plan[0].seed else None
            for column, times in enumerate((epochs, seconds)):
                line = "-" if each.run.summary is not None else "--"
                axes[row][column].plot(times, values, line, label=label if values else None, **style)
        for column, unit in enumerate(("epochs", "virtual seconds")):
            axes[row][column].set(xlabel=unit, ylabel="test accuracy", title=experiment)
            axes[row][column].grid(alpha=0.3)
            if axes[row][column].lines and any(not line.get_label().startswith("_") for line in axes[row][column].lines):
                axes[row][column].legend(fontsize="small", frameon=False)
    return figure


def content(plan: Sequence[Planned], a: Namespace) -> dict[str, Any]:
    """All that is in ``reproduce.json``."""
    runs: list[Mapping[str, Any]] = []
    for each in plan:
        summary = each.run.summary
        epochs, seconds, values = curve(each.run)
        end = {"epochs_done": epochs_done(each.run)} if summary is None else common.select(summary, KEYS)
        run = {key: getattr(each, key) for key in ("experiment", "method", "seed", "lr", "epochs")}
        at = {"epoch": epochs, "virtual_seconds": seconds, "value": values}
        runs.append({**run, "finished": summary is not None, **end, "test_accuracy_at": at})
    return {"environment": machine_of(a), "departures": departures(plan, a), "runs": runs}


def departures(plan: Sequence[Planned], a: Namespace) -> list[str]:
    """Return the differences from the paper's setting, a sentence each."""
    found = [*DEPARTURES, *(["The files of the data set are a repackaged copy."] if a.repackaged else [])]
    if any(each.epochs != ALL_EPOCHS for each in plan):
        found.insert(0, f"{plan[0].epochs} epochs in place of {ALL_EPOCHS}, milestones and warm-up scaled alike.")
    return found


def write(plan: Sequence[Planned], a: Namespace) -> None:
    """Write ``reproduce.json``, ``.md`` and ``.png``, under the name that `name_of` gives, and print the table."""
    name, folder = name_of(a), Path(a.into)
    folder.mkdir(parents=True, exist_ok=True)
    data, left = content(plan, a), unfinished(plan)
    machine, rows = data["environment"], table(plan)
    options = f"{' --full' if a.full else ''}{'' if a.device == 'cpu' else f' --device {a.device}'}"
    finished = f"{len(plan) - len(left)} of {len(plan)} runs are finished"
    parts = [
        "# The experiments of arXiv 2407.19234",
        f"`python -m experiments.reproduce{options}`: ResNet-20, batch 64, momentum 0.9, weight decay "
        f"0.0001, simulated; mean and standard deviation over the seeds that are finished. {finished}. "
        f"{machine_in_words(machine)}.",
        as_markdown(rows) if len(rows) > 1 else "No run is finished.",
        f"![Test accuracy]({name}.png)",
        "## What differs from the paper's setting",
        "\n".join(f"* {each}" for each in data["departures"]),
    ]
    if left:
        parts += ["## Not finished", "\n".join(f"* {line}" for line in left)]
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    picture(plan).savefig(folder / f"{name}.png", dpi=110)
    print(f"{as_markdown(rows)}\n{finished}")
