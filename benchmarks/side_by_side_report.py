"""Tables, plot and files of `side_by_side`, from its measurements."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import in_words
from benchmarks.measuring import spread
from benchmarks.systems import RAW_SOCKETS, RPC_TENSORS
from ormo_rpc.report.table import as_markdown

Rounds = Mapping[int, Mapping[str, Any]]
"""The measurements of one system at one D, by round."""


def by_size(measurements: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Rounds]]:
    """Group measurements by D, system and round, each in the order of its first appearance."""
    found: dict[int, dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for each in measurements:
        found[each["parameters"]][each["system"]][each["round"]] = each
    return {parameters: {**systems} for parameters, systems in found.items()}


def ratios(rounds: Rounds, baseline: Rounds) -> list[float]:
    """Updates per second over the baseline's, in each round in which both were measured."""
    rate = "updates_per_second"
    return [each[rate] / baseline[number][rate] for number, each in sorted(rounds.items()) if number in baseline]


def rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A header, and a row for each size and system, the fastest first."""
    header = ("D", "system", "updates/s", "lowest - highest", "MB/s", "of raw sockets", "of RPC, 65 tensors")
    found: list[tuple[str, ...]] = [(*header, "round trip, ms", "99%, ms", "server CPU, ms", "server, MB", "worker, MB")]
    for parameters, systems in sorted(by_size(content["measurements"]).items()):
        for name, rounds in sorted(systems.items(), key=lambda item: -_middle(item[1], "updates_per_second")):
            rates = [each["updates_per_second"] for each in rounds.values()]
            found.append(
                (
                    *(f"{parameters:,}", name, f"{statistics.median(rates):,.1f}", f"{min(rates):,.1f} - {max(rates):,.1f}"),
                    _shown(rounds, "megabytes_per_second", 1, ",.0f"),
                    *(spread(ratios(rounds, systems.get(other, {}))) for other in (RAW_SOCKETS, RPC_TENSORS)),
                    _shown(rounds, "round_trip_median_seconds", 1e3, ".2f"),
                    _shown(rounds, "round_trip_99_percent_seconds", 1e3, ".2f"),
                    _shown(rounds, "server_cpu_seconds_per_update", 1e3, ".2f"),
                    _shown(rounds, "server_peak_bytes", 1e-6, ",.0f"),
                    _shown(rounds, "worker_peak_bytes", 1e-6, ",.0f"),
                )
            )
    return found


def lock_rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A header, and a row for each size and system that measures its server's lock, as only ours does."""
    found: list[tuple[str, ...]] = [
        ("D", "system", "lock wait, us", "lock held, us", "step of it", "mean delay", "99% delay", "spread of workers")
    ]
    for parameters, systems in sorted(by_size(content["measurements"]).items()):
        for name, rounds in systems.items():
            if all("step_part_of_lock" in each for each in rounds.values()):
                found.append(
                    (
                        *(f"{parameters:,}", name),
                        _shown(rounds, "lock_wait_seconds_per_update", 1e6, ",.0f"),
                        _shown(rounds, "lock_held_seconds_per_update", 1e6, ",.0f"),
                        _shown(rounds, "step_part_of_lock", 1, ".0%"),
                        _shown(rounds, "delay_mean", 1, ".2f"),
                        _shown(rounds, "delay_99_percent", 1, ".0f"),
                        _shown(rounds, "spread_of_workers", 1, ".1%"),
                    )
                )
    return found


def failures(content: Mapping[str, Any]) -> list[str]:
    """The systems left out, with the reason; once, if it is the same at all sizes."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, reason in content["failures"].items():
        name, _, size = key.partition(", D = ")
        reasons[name, reason].append(size)
    everywhere = len(
        {key.partition(", D = ")[2] for key in content["failures"]} | {f"{d:,}" for d in by_size(content["measurements"])}
    )
    return [
        f"{name}: {reason}" if len(sizes) == everywhere else f"{name} at D = {' and '.join(sizes)}: {reason}"
        for (name, reason), sizes in reasons.items()
    ]


def as_text(content: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    about = {**content["machine"], **content["versions"]}
    loads = {"load at start": content["load_at_start"], "load at end": content["load_at_end"]}
    lock = lock_rows(content)
    place = ", between two network namespaces" if content.get("namespaces") else ""
    text = [
        *(f"# Throughput, {content['date'][:10]}, K = {content['workers']}{place}", "", in_words({**about, **loads}), ""),
        f"{content['rounds']} rounds of {content['seconds']:g} s each, interleaved; medians, and ratios within each round,",
        "with the lowest and the highest. MB/s counts both vectors of an update: 8 D bytes, or 4 D where both are bf16.",
        *("", as_markdown(rows(content))),
        *(
            ["", "The server's lock; the step is the algorithm's, with the snapshot:", "", as_markdown(lock)]
            if lock[1:]
            else []
        ),
        *(["", "Left out:", ""] if content["failures"] else []),
        *(f"* {failure}" for failure in failures(content)),
    ]
    return "\n".join(text).rstrip() + "\n"


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Updates per second on a logarithmic scale, a panel for each size: median, lowest and highest, and the ratio."""
    from matplotlib import pyplot  # slow to load, and only the end needs it

    sizes = by_size(content["measurements"])
    names = list(dict.fromkeys(name for systems in sizes.values() for name in systems))
    names.sort(key=lambda name: -max(_middle(each[name], "updates_per_second") for each in sizes.values() if name in each))
    height = 0.4 * len(names) + 1.4
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(4.4 * len(sizes) + 1.2, height), sharey=True, squeeze=False)
    for axis, (parameters, systems) in zip(axes[0], sorted(sizes.items()), strict=True):
        for row, name in enumerate(names):
            if name not in systems:
                continue
            rates = [each["updates_per_second"] for each in systems[name].values()]
            middle, color = statistics.median(rates), "tab:blue" if name.startswith("ormo") else "tab:gray"
            error = [[middle - min(rates)], [max(rates) - middle]]
            axis.errorbar(middle, row, xerr=error, fmt="o", color=color, capsize=3, markersize=5)
            factor = ratios(systems[name], systems.get(RAW_SOCKETS, {}))
            label = f"{middle:,.{0 if middle >= 100 else 1}f}" + (f"  ({statistics.median(factor):.2g}x)" if factor else "")
            axis.annotate(label, (max(rates), row), (6, 0), textcoords="offset points", va="center", fontsize=8)
        if RAW_SOCKETS in systems:
            axis.axvline(_middle(systems[RAW_SOCKETS], "updates_per_second"), color="black", linewidth=0.7, linestyle=":")
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * (high / low) ** 0.45)  # room for the labels
        axis.grid(axis="x", which="both", alpha=0.25)
        axis.set_title(f"D = {parameters:,}", fontsize=10)
        axis.set_xlabel("updates/s  (of raw sockets)")
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    measured = f"median, lowest and highest of {content['rounds']} rounds of {content['seconds']:g} s"
    place = ", two network namespaces" if content.get("namespaces") else ""
    title = f"K = {content['workers']} workers, {content['machine']['cores']} cores{place}; {measured}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(content: Mapping[str, Any], folder: Path, draw: Callable[[Mapping[str, Any], Path], None] = plot) -> Path:
    """Write the three files; return the path without a suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    path = stem(content, folder)
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_text(content))
    if content["measurements"]:
        draw(content, path.with_suffix(".png"))
    return path


def stem(content: Mapping[str, Any], folder: Path) -> Path:
    """The path of a result's files, without a suffix."""
    place = "-namespaces" if content.get("namespaces") else ""
    return folder / f"throughput-{content['date'][:10]}-K{content['workers']}{place}"


def _middle(rounds: Rounds, key: str) -> float:
    return statistics.median(each[key] for each in rounds.values())


def _shown(rounds: Rounds, key: str, factor: float, form: str) -> str:
    values = [each[key] for each in rounds.values() if each.get(key) is not None]
    return format(statistics.median(values) * factor, form) if values else "-"
