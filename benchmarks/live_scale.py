"""Measure the live server with more and more workers on one machine: ``make live-scale``.

The real server and workers that compute nothing (`benchmarks.throughput`), K = 1 to 32: the rate, the round trip, the delay,
the wait for the lock, and the utilization, that is the part of the time that the lock is held and the cores that the server and
all processes take. The knee is the smallest K that reaches nine tenths of the best rate: beyond it more workers only wait
longer. Writes ``results/live_scale.json``, ``.md`` and ``.png`` after every K, with ``--transport NAME``
``results/live_scale-NAME.*``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import in_words, load
from benchmarks.measuring import RESULTS, conditions
from benchmarks.peers.measurement import Job
from benchmarks.throughput import TRANSPORTS, measure
from ormo_rpc.report.table import as_markdown

WORKERS = (1, 2, 4, 8, 16, 32)
SIZES = (10_000, 272_474)
KNEE = 0.9
"""The part of the best rate from which on more workers are not worth it."""
UTILIZATION = (
    *("lock in use", "server, cores", "all, cores", "spread of workers"),
    *("server's threads", "descriptors", "server, MB", "a worker, MB"),
)
"""The last columns of the table."""
Measurements = Sequence[Mapping[str, Any]]


def utilization(measurement: Mapping[str, Any]) -> dict[str, float]:
    """The part of the time that the lock is held, and the cores that the server and all processes take."""
    rate = measurement["updates_per_second"]
    server = rate * (measurement["server_cpu_seconds_per_update"] or 0.0)
    return {
        "lock": rate * measurement["lock_held_seconds_per_update"],
        "server": server,
        "all": server + rate * (measurement["workers_cpu_seconds_per_update"] or 0.0),
    }


def knee(measurements: Measurements) -> Mapping[str, Any]:
    """The measurement of the smallest K that is nearly as good as the best."""
    best = max(each["updates_per_second"] for each in measurements)
    return next(each for each in measurements if each["updates_per_second"] >= KNEE * best)


def bottleneck(measurement: Mapping[str, Any], cores: int) -> str:
    """The resource that bounds the rate at a K, in words, by its utilization."""
    used = utilization(measurement)
    parts = {
        "the cores of this machine": used["all"] / cores,
        "the server's lock": used["lock"],
        "the server's one interpreter, which runs on one core at a time": used["server"],
    }
    name, part = max(parts.items(), key=lambda item: item[1])
    figures = (
        f"lock held {used['lock']:.0%} of the time, server {used['server']:.2f} and all {used['all']:.2f} of {cores} cores"
    )
    return f"{name} ({figures})" if part >= KNEE else f"waiting for one another, as no resource is in full use ({figures})"


def groups(content: Mapping[str, Any]) -> dict[int, list[Mapping[str, Any]]]:
    """The measurements by D, in the order of K."""
    sizes = sorted({each["parameters"] for each in content["measurements"]})
    by_workers: Callable[[Mapping[str, Any]], int] = lambda each: each["workers"]  # noqa: E731 - its type is of interest
    return {d: sorted((each for each in content["measurements"] if each["parameters"] == d), key=by_workers) for d in sizes}


def rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A header, and a row for each D and K."""
    header = ("D", "K", "updates/s", "round trip, ms", "99%, ms", "mean delay", "99% delay", "lock wait, us", "lock held, us")
    found: list[tuple[str, ...]] = [(*header, *UTILIZATION)]
    for parameters, measurements in groups(content).items():
        for each in measurements:
            used = utilization(each)
            found.append(
                (
                    *(f"{parameters:,}", str(each["workers"]), f"{each['updates_per_second']:,.0f}"),
                    f"{1e3 * each['round_trip_median_seconds']:.2f}",
                    f"{1e3 * each['round_trip_99_percent_seconds']:.2f}",
                    *(f"{each['delay_mean']:.2f}", f"{each['delay_99_percent']}"),
                    f"{1e6 * each['lock_wait_seconds_per_update']:,.0f}",
                    f"{1e6 * each['lock_held_seconds_per_update']:,.0f}",
                    *(f"{used['lock']:.0%}", f"{used['server']:.2f}", f"{used['all']:.2f}"),
                    f"{each['spread_of_workers']:.1%}",
                    *(_whole(each, "server_threads"), _whole(each, "server_descriptors")),
                    *(_whole(each, "server_peak_bytes", 1e-6), _whole(each, "worker_peak_bytes", 1e-6)),
                )
            )
    return found


def _whole(measurement: Mapping[str, Any], key: str, factor: float = 1.0) -> str:
    value = measurement.get(key)
    return "-" if value is None else f"{factor * value:,.0f}"


def as_text(content: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    about = {**content["machine"], **content["versions"], "load at start": content["load_at_start"], "load at end": load()}
    cores = content["machine"]["cores"]
    bends: list[str] = []
    for parameters, measurements in groups(content).items():
        at = knee(measurements)
        where = f"* D = {parameters:,}: the knee is at K = {at['workers']} with {at['updates_per_second']:,.0f} updates/s"
        bends.append(f"{where}, bound by {bottleneck(at, cores)}.")
    text = [
        *(f"# Live server against the number of workers, transport {content['transport']}, {content['date'][:10]}", ""),
        *(in_words(about), ""),
        f"{content['seconds']:g} s each, workers that compute nothing, all on this machine. With K gradients in flight the",
        "mean delay is K - 1. Times of waiting for the lock and holding it include what other processes take of the cores.",
        *("", as_markdown(rows(content)), "", *bends),
    ]
    return "\n".join(text) + "\n"


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Rate, round trip, delay, and lock against K."""
    from matplotlib import pyplot  # slow to load, and only the end needs it

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.5))
    for color, (parameters, measurements) in zip(
        ("tab:blue", "tab:orange", "tab:green", "tab:red"), groups(content).items(), strict=False
    ):
        workers = [each["workers"] for each in measurements]
        curves = (
            (axes[0][0], "", "-o", [each["updates_per_second"] for each in measurements]),
            (axes[0][1], "median", "-o", [1e3 * each["round_trip_median_seconds"] for each in measurements]),
            (axes[0][1], "99%", "--^", [1e3 * each["round_trip_99_percent_seconds"] for each in measurements]),
            (axes[1][0], "mean", "-o", [each["delay_mean"] for each in measurements]),
            (axes[1][0], "99%", "--^", [each["delay_99_percent"] for each in measurements]),
            (axes[1][1], "wait", "--^", [1e6 * each["lock_wait_seconds_per_update"] for each in measurements]),
            (axes[1][1], "held", "-o", [1e6 * each["lock_held_seconds_per_update"] for each in measurements]),
        )
        for axis, name, style, values in curves:
            axis.plot(workers, values, style, color=color, markersize=4, label=f"{name} D = {parameters:,}".strip())
        axes[0][0].axvline(knee(measurements)["workers"], color=color, linestyle=":", linewidth=1)
    titles = ("updates/s (dotted: the knee)", "round trip, ms", "delay, iterations", "the server's lock, us per update")
    for axis, title in zip(axes.flat, titles, strict=True):
        scale = "linear" if axis is axes[0][0] else "symlog" if axis is axes[1][0] else "log"
        axis.set(title=title, xlabel="K, workers", xscale="log", yscale=scale)
        axis.set_xticks(sorted({each["workers"] for each in content["measurements"]}), labels=None)
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
    transport = content["transport"]
    stem = folder / ("live_scale" if transport == "auto" else f"live_scale-{transport}")
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    stem.with_suffix(".md").write_text(as_text(content))
    plot(content, stem.with_suffix(".png"))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, metavar="K")
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S")
    parser.add_argument("--transport", choices=TRANSPORTS, default="auto")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    a = parser.parse_args()
    content: dict[str, Any] = {**conditions(), "seconds": a.seconds, "transport": a.transport, "measurements": []}
    cases = [(workers, parameters) for workers in a.workers for parameters in a.parameters]
    with tqdm(cases, unit="run") as bar:
        for workers, parameters in bar:
            bar.set_description(f"K = {workers}, D = {parameters:,}")
            content["measurements"].append(measure(Job(parameters=parameters, workers=workers, seconds=a.seconds), a.transport))
            write(content, a.into)
    print(as_text(content))


if __name__ == "__main__":
    main()
