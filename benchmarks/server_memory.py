"""Measure the live server's memory: ``make server-memory``.

*Peak.* Peak memory at some D, less that at D = 10, in bytes per parameter, beside a budget for OrMo: 16 D (parameters,
momentum, and two more vectors, such as the copy that an export is made from), 4 D for each snapshot that may be in use (one per
worker, and the newest), and 4 D per worker (the gradient in flight).

*Growth.* Memory at the end of many updates, less that after the first tenth of them, in bytes per update. Each figure is the
highest within a tenth of the run, as memory goes up and down with what is in flight.

Writes ``results/server_memory.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import in_words
from benchmarks.measuring import RESULTS, conditions
from benchmarks.peers.measurement import Job
from benchmarks.throughput import TRANSPORTS, Sample, Sampler, overrides
from ormo_rpc import train
from ormo_rpc.report.table import as_markdown

TINY = 10
"""D of a server whose vectors take no memory to speak of."""
BYTES_FOR_PEAK = 24e9
"""Bytes of gradients pushed while memory is sampled: some seconds at any D."""
LONGEST_SECONDS = 600.0
GROWTH_LIMIT = 100.0
"""Bytes per update: keeping an event of the trace, or a tensor object, would take more."""


def budget(workers: int) -> int:
    """The budget in bytes per parameter."""
    return 16 + 4 * (workers + 1) + 4 * workers


def samples_of(parameters: int, workers: int, updates: int, transport: str) -> list[Sample]:
    """Run for that many updates: the samples taken meanwhile."""
    job = Job(parameters=parameters, workers=workers, seconds=LONGEST_SECONDS)
    with tempfile.TemporaryDirectory(prefix="server_memory_") as folder:
        run_dir = Path(folder) / "run"
        with Sampler(run_dir) as sampler:
            train([*overrides(job, transport), f"train.max_iterations={updates}"], run_dir=run_dir)
    return sampler.between(1, updates - 1)


def peak(samples: Sequence[Sample]) -> int:
    """The server's peak memory until the last sample, in bytes.

    Raises:
        ValueError: the run was over before the first sample.
    """
    if not samples:
        raise ValueError("got a run that was over before the first sample, expected more updates")
    return samples[-1].server_bytes


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """The highest memory in the second tenth of the updates and in the last, and the bytes per update in between.

    Raises:
        ValueError: there are too few samples.
    """
    total = samples[-1].updates if samples else 0
    early = [sample for sample in samples if 0.1 * total <= sample.updates < 0.2 * total]
    late = [sample for sample in samples if sample.updates >= 0.9 * total]
    if not early or not late:
        raise ValueError(
            f"got {len(samples)} samples of {total} updates, expected some in the second tenth and some in the last"
        )
    middle = [sum(sample.updates for sample in part) / len(part) for part in (early, late)]
    highest = [max(sample.server_bytes_now for sample in part) for part in (early, late)]
    return {
        "bytes_per_update": (highest[1] - highest[0]) / (middle[1] - middle[0]),
        "early_bytes": highest[0],
        "late_bytes": highest[1],
    }


def peak_rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A header, and a row for each D and K."""
    found: list[tuple[str, ...]] = [("D", "K", "peak, MB", "bytes per parameter", "budget", "within it")]
    for each in content["peaks"]:
        per_parameter, limit = each["bytes_per_parameter"], each["budget"]
        found.append(
            (
                *(f"{each['parameters']:,}", str(each["workers"]), f"{each['peak_bytes'] / 1e6:,.0f}"),
                *(f"{per_parameter:.1f}", str(limit), "yes" if per_parameter <= limit else "no"),
            )
        )
    return found


def as_text(content: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    grown = content["growth"]
    verdict = "no growth" if grown["bytes_per_update"] <= GROWTH_LIMIT else "growth"
    text = [
        *(
            f"# Memory of the live server, {content['date'][:10]}",
            "",
            in_words({**content["machine"], **content["versions"]}),
            "",
        ),
        "Peaks while gradients are applied, less that at D = 10; the budget is 16 + 4 (K + 1) + 4 K bytes per parameter.",
        *("", as_markdown(peak_rows(content)), ""),
        f"{grown['updates']:,} updates at D = {grown['parameters']:,}, K = {grown['workers']}: {verdict},",
        f"{grown['bytes_per_update']:.1f} bytes per update ({grown['early_bytes'] / 1e6:,.1f} MB early, "
        f"{grown['late_bytes'] / 1e6:,.1f} MB in the end); the limit is {GROWTH_LIMIT:g}.",
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=[2_000_000, 25_000_000], metavar="D")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4], metavar="K")
    parser.add_argument("--updates", type=int, default=100_000, help="of the run that measures growth")
    parser.add_argument("--small", type=int, default=1_000, metavar="D", help="of the run that measures growth")
    parser.add_argument("--transport", choices=TRANSPORTS, default="auto")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    a = parser.parse_args()
    peaks: list[dict[str, Any]] = []
    with tqdm(total=len(a.workers) * (1 + len(a.parameters)) + 1, unit="run") as bar:
        for workers in a.workers:
            least = 0
            for parameters in (TINY, *a.parameters):
                bar.set_description(f"peak, D = {parameters:,}, K = {workers}")
                updates = min(6_000, int(BYTES_FOR_PEAK / (4 * parameters)))
                most = peak(samples_of(parameters, workers, updates, a.transport))
                bar.update()
                if parameters == TINY:
                    least = most
                    continue
                found = {"parameters": parameters, "workers": workers, "peak_bytes": most, "least_bytes": least}
                peaks.append({**found, "bytes_per_parameter": (most - least) / parameters, "budget": budget(workers)})
        bar.set_description(f"growth, {a.updates:,} updates")
        samples = samples_of(a.small, a.workers[0], a.updates, a.transport)
        bar.update()
    content = {
        **conditions(),
        "transport": a.transport,
        "peaks": peaks,
        "growth": {
            "parameters": a.small,
            "workers": a.workers[0],
            "updates": a.updates,
            **growth(samples),
        },
    }
    a.into.mkdir(parents=True, exist_ok=True)
    (a.into / "server_memory.json").write_text(json.dumps(content, indent=1) + "\n")
    (a.into / "server_memory.md").write_text(as_text(content))
    print(as_text(content))


if __name__ == "__main__":
    main()
