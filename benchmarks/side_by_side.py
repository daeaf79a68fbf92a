"""Our throughput beside that of the peers, in one run on one machine: ``make bench``.

Every contender is a process of its own that prints a line of JSON. The contenders take turns, for several rounds; the figures
are medians over the rounds, with the lowest and the highest, and the ratio to raw sockets is taken within each round. Writes
``results/throughput-DATE.json``, ``.md`` and ``.png``. A contender that is not installed is left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from ormo_rpc.report.table import as_markdown
from ormo_rpc.run_directory import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
BASELINE = "raw_sockets"
NOT_INSTALLED = 69
"""Exit status of a contender whose system is not there (EX_UNAVAILABLE)."""
TIMEOUT_SECONDS = 240.0
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """How one is run.

    Attributes:
        name: In tables.
        module: ``python -m`` this.
        arguments: Its own, besides D, K and S.
        interpreter: The Python of its environment; ours where it is None.
        env: Added to the environment.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    interpreter: Path | None = None
    env: tuple[tuple[str, str], ...] = ()


def peers_python(name: str) -> Path:
    """The interpreter of a peer's own environment, made by ``make bench-NAME``."""
    return ROOT / f".venv-{name}" / "bin" / "python"


CONTENDERS = {
    c.name: c
    for c in (
        Contender(name="ormo_rpc", module="benchmarks.throughput", arguments=("--json",)),
        Contender(name="ormo_rpc_uv", module="benchmarks.throughput", arguments=("--json", "--transport", "uv")),
        Contender(
            name="ormo_rpc_uv_bf16", module="benchmarks.throughput", arguments=("--json", "--transport", "uv", "--wire", "bf16")
        ),
        Contender(name=BASELINE, module="benchmarks.peers.raw_sockets"),
        Contender(name="rpc_tensors", module="benchmarks.peers.rpc_tensors"),
        Contender(name="rpc_flat", module="benchmarks.peers.rpc_flat"),
        Contender(name="rpc_flat_huge", module="benchmarks.peers.rpc_flat", env=(("THP_MEM_ALLOC_ENABLE", "1"),)),
        Contender(name="gloo", module="benchmarks.peers.gloo"),
        Contender(name="ray", module="benchmarks.peers.ray_server", interpreter=peers_python("ray")),
        Contender(name="tensorflow", module="benchmarks.peers.tensorflow_server", interpreter=peers_python("tensorflow")),
        Contender(name="one_host", module="benchmarks.one_host"),
        Contender(name="one_host_rpc", module="benchmarks.one_host", arguments=("--control", "rpc")),
    )
}
DEFAULT = [name for name in CONTENDERS if not name.startswith(("one_host", "ormo_rpc_"))]


def run(contender: Contender, parameters: int, workers: int, seconds: float) -> dict[str, Any] | str:
    """One measurement; where there is none, why."""
    python = contender.interpreter or Path(sys.executable)
    if not python.exists():
        return f"not installed: make bench-{contender.name}"
    command = [
        *(str(python), "-m", contender.module, "--parameters", str(parameters), "--workers", str(workers)),
        *("--seconds", str(seconds), *contender.arguments),
    ]
    env = {**os.environ, **LOOPBACK, "PYTHONPATH": str(ROOT), **dict(contender.env)}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_SECONDS:g} seconds"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
    return json.loads(lines[-1]) if done.returncode == 0 else lines[-1]


def measure(names: Sequence[str], sizes: Sequence[int], workers: int, seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    """All rounds of all contenders, taking turns; what is known so far, after each round.

    A contender that fails is not tried again.
    """
    lines: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "environment": environment()}
    with tqdm(total=rounds * len(sizes) * len(names)) as bar:
        for number in range(rounds):
            for parameters in sizes:
                for name in names:
                    bar.set_description(f"{name}, D = {parameters:,}")
                    if name not in failures:
                        found = run(CONTENDERS[name], parameters, workers, seconds)
                        if isinstance(found, str):
                            failures[name] = found
                            bar.write(f"{name}: {found}")
                        else:
                            lines.append({**found, "contender": name, "round": number})
                    bar.update()
            done = {"workers": workers, "seconds": seconds, "rounds": number + 1}
            yield {**about, **done, "lines": lines, "failures": failures}


def machine() -> dict[str, Any]:
    """What the figures depend on besides versions."""
    load = os.getloadavg()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processors": os.cpu_count(),
        "memory_gigabytes": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": [round(value, 2) for value in load],
    }


def rows(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """A header, and a row for each size and contender."""
    groups: dict[tuple[int, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in content["lines"]:
        groups[line["parameters"], line["contender"]][line["round"]] = line
    header = ("D", "contender", "updates/s", "lowest - highest", "of raw sockets", "round trip, ms", "99%, ms")
    found: list[tuple[str, ...]] = [(*header, "server CPU, ms", "server, MB", "worker, MB")]
    for (parameters, name), by_round in groups.items():
        rates = [line["updates_per_second"] for line in by_round.values()]
        baseline = groups.get((parameters, BASELINE), {})
        ratios = [
            line["updates_per_second"] / baseline[number]["updates_per_second"]
            for number, line in by_round.items()
            if number in baseline
        ]
        found.append(
            (
                *(f"{parameters:,}", name, f"{statistics.median(rates):.1f}", f"{min(rates):.1f} - {max(rates):.1f}"),
                f"{statistics.median(ratios):.2f}" if ratios else "-",
                _median(by_round, "round_trip_median_seconds", 1e3, ".2f"),
                _median(by_round, "round_trip_99_percent_seconds", 1e3, ".2f"),
                _median(by_round, "server_cpu_seconds_per_update", 1e3, ".2f"),
                _median(by_round, "server_peak_bytes", 1e-6, ".0f"),
                _median(by_round, "worker_peak_bytes", 1e-6, ".0f"),
            )
        )
    return found


def _median(by_round: dict[int, dict[str, Any]], key: str, factor: float, form: str) -> str:
    values = [line[key] for line in by_round.values() if line.get(key) is not None]
    return format(statistics.median(values) * factor, form) if values else "-"


def picture(content: dict[str, Any], path: Path) -> None:
    """Updates per second of raw sockets = 1, for each size: a dot per round, a bar at the median."""
    from matplotlib import pyplot  # slow to load, and only the end needs it

    lines = content["lines"]
    sizes = sorted({line["parameters"] for line in lines})
    names = list(dict.fromkeys(line["contender"] for line in lines))
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(4 * len(sizes), 0.35 * len(names) + 1.6), sharey=True, squeeze=False)
    for axis, parameters in zip(axes[0], sizes, strict=True):
        here = {
            (line["contender"], line["round"]): line["updates_per_second"] for line in lines if line["parameters"] == parameters
        }
        for place, name in enumerate(names):
            ratios = [rate / here[BASELINE, r] for (who, r), rate in here.items() if who == name and (BASELINE, r) in here]
            if ratios:
                axis.barh(place, statistics.median(ratios), color="tab:blue" if name.startswith("ormo") else "lightgray")
                axis.plot(ratios, [place] * len(ratios), ".", color="black", markersize=3)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"D = {parameters:,}")
        axis.set_xlabel("updates/s, raw sockets = 1")
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"K = {content['workers']}, {content['rounds']} rounds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(content: dict[str, Any], folder: Path) -> Path:
    """Write the three files; return the path without a suffix."""
    folder.mkdir(exist_ok=True)
    stem = folder / f"throughput-{content['date'][:10]}-K{content['workers']}"
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    about = {**content["machine"], **content["environment"]}
    text = [
        *(f"# Throughput, {content['date'][:10]}", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""),
        f"K = {content['workers']}, {content['rounds']} rounds of {content['seconds']:g} s each, interleaved; medians.",
        *("", as_markdown(rows(content))),
        *("", *(f"* {name}: {reason}" for name, reason in content["failures"].items())),
    ]
    stem.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")
    if content["lines"]:
        picture(content, stem.with_suffix(".png"))
    return stem


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, nargs="+", default=[272_474, 2_000_000, 25_000_000], metavar="D")
    parser.add_argument("--workers", type=int, default=2, metavar="K")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=DEFAULT, metavar="NAME")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    a, stem = arguments, Path()
    for content in measure(a.contenders, a.parameters, a.workers, a.seconds, a.rounds):
        stem = write(content, a.into)
    print(stem.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
