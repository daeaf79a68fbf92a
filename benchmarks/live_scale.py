"""How the live server does with more and more workers on one machine: ``make live-scale``.

The real server and workers that compute nothing (`benchmarks.throughput`), K = 1 to 32. Told are the rate, the round trip, the
delay, the wait for the lock, and what is in use: the part of the time that the lock is held, and how many cores the server and
all processes take. The knee is the smallest K that reaches nine tenths of the best rate: from there on more workers
only wait longer. Writes ``results/live_scale.json``, ``.md`` and ``.png`` after every K.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import load, machine, versions, words
from benchmarks.peers.line import Job
from benchmarks.throughput import measure
from ormo_rpc.report.table import as_markdown

RESULTS = Path(__file__).parents[1] / "results"
WORKERS = (1, 2, 4, 8, 16, 32)
SIZES = (10_000, 272_474)
KNEE = 0.9
"""The part of the best rate at which more workers are not worth it."""
Lines = Sequence[Mapping[str, Any]]


def in_use(line: Mapping[str, Any]) -> dict[str, float]:
    """What is in use: the part of the time that the lock is held, and cores."""
    rate = line["updates_per_second"]
    server = rate * (line["server_cpu_seconds_per_update"] or 0.0)
    return {
        "lock": rate * line["lock_held_seconds_per_update"],
        "server": server,
        "all": server + rate * (line["workers_cpu_seconds_per_update"] or 0.0),
    }


def knee(lines: Lines) -> Mapping[str, Any]:
    """The line of the smallest K that is nearly as good as the best."""
    best = max(line["updates_per_second"] for line in lines)
    return next(line for line in lines if line["updates_per_second"] >= KNEE * best)


def reason(line: Mapping[str, Any], cores: int) -> str:
    """What the rate is bound by at a K, in words, from what is in use there."""
    used = in_use(line)
    parts = {
        "the cores of this machine": used["all"] / cores,
        "the server's lock": used["lock"],
        "the server's one interpreter, which runs on one core at a time": used["server"],
    }
    name, part = max(parts.items(), key=lambda item: item[1])
    figures = (
        f"lock held {used['lock']:.0%} of the time, server {used['server']:.2f} and all {used['all']:.2f} of {cores} cores"
    )
    return (
        f"{name} ({figures})" if part >= KNEE else f"nothing is in use all the time, so by waiting for one another ({figures})"
    )


def groups(content: Mapping[str, Any]) -> dict[int, list[Mapping[str, Any]]]:
    """The lines by D, in the order of K."""
    sizes = sorted({line["parameters"] for line in content["lines"]})
    by_workers: Callable[[Mapping[str, Any]], int] = lambda line: line["workers"]  # noqa: E731 - its type is of interest
    return {d: sorted((line for line in content["lines"] if line["parameters"] == d), key=by_workers) for d in sizes}


def rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A header, and a row for each D and K."""
    header = ("D", "K", "updates/s", "round trip, ms", "99%, ms", "mean delay", "99% delay", "lock wait, us", "lock held, us")
    found: list[tuple[str, ...]] = [(*header, "lock in use", "server, cores", "all, cores", "spread of workers")]
    for parameters, lines in groups(content).items():
        for line in lines:
            used = in_use(line)
            found.append(
                (
                    *(f"{parameters:,}", str(line["workers"]), f"{line['updates_per_second']:,.0f}"),
                    f"{1e3 * line['round_trip_median_seconds']:.2f}",
                    f"{1e3 * line['round_trip_99_percent_seconds']:.2f}",
                    *(f"{line['delay_mean']:.2f}", f"{line['delay_99_percent']}"),
                    f"{1e6 * line['lock_wait_seconds_per_update']:,.0f}",
                    f"{1e6 * line['lock_held_seconds_per_update']:,.0f}",
                    *(f"{used['lock']:.0%}", f"{used['server']:.2f}", f"{used['all']:.2f}"),
                    f"{line['spread_of_workers']:.1%}",
                )
            )
    return found


def as_text(content: Mapping[str, Any]) -> str:
    """All of it as Markdown."""
    about = {**content["machine"], **content["versions"], "load at start": content["load_at_start"], "load at end": load()}
    cores = content["machine"]["cores"]
    bends: list[str] = []
    for parameters, lines in groups(content).items():
        at = knee(lines)
        where = f"* D = {parameters:,}: the knee is at K = {at['workers']} with {at['updates_per_second']:,.0f} updates/s"
        bends.append(f"{where}, bound by {reason(at, cores)}.")
    text = [
        *(f"# Live server against the number of workers, {content['date'][:10]}", "", words(about), ""),
        f"{content['seconds']:g} s each, workers that compute nothing, all on this machine. With K gradients in the making the",
        "mean delay is K - 1. Times that the lock is waited for and held have in them what other processes take of the cores.",
        *("", as_markdown(rows(content)), "", *bends),
    ]
    return "\n".join(text) + "\n"


def picture(content: Mapping[str, Any], path: Path) -> None:
    """Rate, round trip, delay, and lock against K."""
    from matplotlib import pyplot  # slow to load, and only the end needs it

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.5))
    for color, (parameters, lines) in zip(
        ("tab:blue", "tab:orange", "tab:green", "tab:red"), groups(content).items(), strict=False
    ):
        workers = [line["workers"] for line in lines]
        curves = (
            (axes[0][0], "", "-o", [line["updates_per_second"] for line in lines]),
            (axes[0][1], "median", "-o", [1e3 * line["round_trip_median_seconds"] for line in lines]),
            (axes[0][1], "99%", "--^", [1e3 * line["round_trip_99_percent_seconds"] for line in lines]),
            (axes[1][0], "mean", "-o", [line["delay_mean"] for line in lines]),
            (axes[1][0], "99%", "--^", [line["delay_99_percent"] for line in lines]),
            (axes[1][1], "wait", "--^", [1e6 * line["lock_wait_seconds_per_update"] for line in lines]),
            (axes[1][1], "held", "-o", [1e6 * line["lock_held_seconds_per_update"] for line in lines]),
        )
        for axis, name, style, values in curves:
            axis.plot(workers, values, style, color=color, markersize=4, label=f"{name} D = {parameters:,}".strip())
        axes[0][0].axvline(knee(lines)["workers"], color=color, linestyle=":", linewidth=1)
    titles = ("updates/s (dotted: the knee)", "round trip, ms", "delay, iterations", "the server's lock, us per update")
    for axis, title in zip(axes.flat, titles, strict=True):
        scale = "linear" if axis is axes[0][0] else "symlog" if axis is axes[1][0] else "log"
        axis.set(title=title, xlabel="K, workers", xscale="log", yscale=scale)
        axis.set_xticks(sorted({line["workers"] for line in content["lines"]}), labels=None)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axes[0][0].set_ylim(bottom=0)
    axes[1][0].set_ylim(bottom=0)
    figure.suptitle(f"One server, workers that compute nothing, {content['machine']['cores']} cores", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(content: Mapping[str, Any], folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / "live_scale"
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    stem.with_suffix(".md").write_text(as_text(content))
    picture(content, stem.with_suffix(".png"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, metavar="K")
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    a = parser.parse_args()
    content: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions({}),
        "load_at_start": load(),
        "seconds": a.seconds,
        "lines": [],
    }
    cases = [(workers, parameters) for workers in a.workers for parameters in a.parameters]
    with tqdm(cases, unit="run") as bar:
        for workers, parameters in bar:
            bar.set_description(f"K = {workers}, D = {parameters:,}")
            content["lines"].append(measure(Job(parameters=parameters, workers=workers, seconds=a.seconds)))
            write(content, a.into)
    print(as_text(content))


if __name__ == "__main__":
    main()
