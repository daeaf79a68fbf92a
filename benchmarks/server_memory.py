"""The live server's memory: ``make server-memory``.

*How much.* Peak memory at some D, less that at D = 10, in bytes for each parameter, and a budget for OrMo: 16 D (parameters,
momentum, and two vectors besides, such as the copy that an export is made with), 4 D for each snapshot that somebody may hold
(one for each worker, and the newest), and 4 D for each worker (the gradient that is on its way).

*No growth.* What the server has at the end of many updates, less what it had after the first tenth of them, in bytes for each
update. Each figure is the highest within a tenth of the run, as memory goes up and down by what is on its way.

Writes ``results/server_memory.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import machine, versions, words
from benchmarks.peers.line import Job
from benchmarks.throughput import Look, Watch, overrides
from ormo_rpc import train
from ormo_rpc.report.table import as_markdown

RESULTS = Path(__file__).parents[1] / "results"
TINY = 10
"""D of a server whose vectors weigh nothing."""
BYTES_FOR_PEAK = 24e9
"""Bytes of gradients that are pushed while memory is looked at: some seconds at any D."""
LONGEST_SECONDS = 600.0
GROWTH_LIMIT = 100.0
"""Bytes for each update: an event of the trace that is kept, or a tensor object, would be more."""


def budget(workers: int) -> int:
    """Bytes for each parameter."""
    return 16 + 4 * (workers + 1) + 4 * workers


def looks_at(parameters: int, workers: int, updates: int, transport: str) -> list[Look]:
    """A run of so many updates, as it was seen while it went on."""
    job = Job(parameters=parameters, workers=workers, seconds=LONGEST_SECONDS)
    with tempfile.TemporaryDirectory(prefix="server_memory_") as folder:
        run_dir = Path(folder) / "run"
        with Watch(run_dir) as watch:
            train([*overrides(job, transport), f"train.max_iterations={updates}"], run_dir=run_dir)
    return watch.between(1, updates - 1)


def peak(looks: Sequence[Look]) -> int:
    """The most memory that the server has had until the last look, in bytes.

    Raises:
        ValueError: the run was over before it could be looked at.
    """
    if not looks:
        raise ValueError("got a run that was over before anybody looked at it, expected more updates")
    return looks[-1].server_bytes


def growth(looks: Sequence[Look]) -> float:
    """Bytes for each update, from the second tenth of the updates to the last.

    Raises:
        ValueError: too little was seen.
    """
    total = looks[-1].updates if looks else 0
    early = [look for look in looks if 0.1 * total <= look.updates < 0.2 * total]
    late = [look for look in looks if look.updates >= 0.9 * total]
    if not early or not late:
        raise ValueError(f"got {len(looks)} looks at {total} updates, expected some in the second tenth and some in the last")
    middle = [sum(look.updates for look in part) / len(part) for part in (early, late)]
    highest = [max(look.server_bytes_now for look in part) for part in (early, late)]
    return (highest[1] - highest[0]) / (middle[1] - middle[0])


def peak_rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A header, and a row for each D and K."""
    found: list[tuple[str, ...]] = [("D", "K", "peak, MB", "bytes for each parameter", "budget", "within it")]
    for line in content["peaks"]:
        per_parameter, limit = line["bytes_per_parameter"], line["budget"]
        found.append(
            (
                *(f"{line['parameters']:,}", str(line["workers"]), f"{line['peak_bytes'] / 1e6:,.0f}"),
                *(f"{per_parameter:.1f}", str(limit), "yes" if per_parameter <= limit else "no"),
            )
        )
    return found


def as_text(content: Mapping[str, Any]) -> str:
    """All of it as Markdown."""
    grown = content["growth"]
    verdict = "no growth" if grown["bytes_per_update"] <= GROWTH_LIMIT else "growth"
    text = [
        *(f"# Memory of the live server, {content['date'][:10]}", "", words({**content["machine"], **content["versions"]}), ""),
        "Peaks while gradients are applied, less that at D = 10; the budget is 16 + 4 (K + 1) + 4 K bytes for each parameter.",
        *("", as_markdown(peak_rows(content)), ""),
        f"{grown['updates']:,} updates at D = {grown['parameters']:,}, K = {grown['workers']}: {verdict},",
        f"{grown['bytes_per_update']:.1f} bytes for each update ({grown['first_bytes'] / 1e6:,.1f} MB early, "
        f"{grown['last_bytes'] / 1e6:,.1f} MB in the end); the limit is {GROWTH_LIMIT:g}.",
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=[2_000_000, 25_000_000], metavar="D")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4], metavar="K")
    parser.add_argument("--updates", type=int, default=100_000, help="for the growth")
    parser.add_argument("--small", type=int, default=1_000, metavar="D", help="for the growth")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    a = parser.parse_args()
    peaks: list[dict[str, Any]] = []
    with tqdm(total=len(a.workers) * (1 + len(a.parameters)) + 1, unit="run") as bar:
        for workers in a.workers:
            least = 0
            for parameters in (TINY, *a.parameters):
                bar.set_description(f"peak, D = {parameters:,}, K = {workers}")
                updates = min(6_000, int(BYTES_FOR_PEAK / (4 * parameters)))
                most = peak(looks_at(parameters, workers, updates, a.transport))
                bar.update()
                if parameters == TINY:
                    least = most
                    continue
                line = {"parameters": parameters, "workers": workers, "peak_bytes": most, "least_bytes": least}
                peaks.append({**line, "bytes_per_parameter": (most - least) / parameters, "budget": budget(workers)})
        bar.set_description(f"growth, {a.updates:,} updates")
        looks = looks_at(a.small, a.workers[0], a.updates, a.transport)
        bar.update()
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions({}),
        "transport": a.transport,
        "peaks": peaks,
        "growth": {
            "parameters": a.small,
            "workers": a.workers[0],
            "updates": a.updates,
            "bytes_per_update": growth(looks),
            "first_bytes": looks[0].server_bytes_now,
            "last_bytes": looks[-1].server_bytes_now,
        },
    }
    a.into.mkdir(parents=True, exist_ok=True)
    (a.into / "server_memory.json").write_text(json.dumps(content, indent=1) + "\n")
    (a.into / "server_memory.md").write_text(as_text(content))
    print(as_text(content))


if __name__ == "__main__":
    main()
