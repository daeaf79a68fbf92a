"""Measure updates per second of a live run: ``python -m benchmarks.throughput --parameters D --workers K --seconds S``.

Drives the real server and workers through `ormo_rpc.train`, with workers that compute nothing (``worker.dummy=true``).
Everything is read from what any run leaves behind: updates and round trips from the trace (a worker that computes nothing
pushes again at once, so the time between two of its pushes is its round trip), lock times from the summary, processor time and
memory from the processes while they run, with the number of updates at that moment from the file ``progress``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.measurement import Job, cpu_seconds, measurement, peak_bytes
from ormo_rpc import train
from ormo_rpc.options import parts
from ormo_rpc.runtimes.ranks import Ranks
from ormo_rpc.storage.run_directory import read_trace

TRANSPORTS, WIRES = parts("transport"), ("float32", "bf16", "fp16")
WARM_UP_SECONDS = 1.0
SAMPLE_SECONDS = 0.1


def overrides(job: Job, transport: str = "auto", wire: str = "float32") -> list[str]:
    """The overrides of the run that is measured; defaults are left out."""
    return [
        *("runtime=rpc", "algorithm=ormo", "logger=none", "logger.progress=false", f"workers={job.workers}", "train.lr=1e-6"),
        *("model._target_=benchmarks.dummy_model.DummyModel", f"+model.parameters={job.parameters}"),
        *("dataset._target_=benchmarks.dummy_model.data", "worker.dummy=true"),
        *("train.batch_size=1", "train.epochs=1000000", f"train.max_seconds={WARM_UP_SECONDS + job.seconds}"),
        *([] if transport == "auto" else [f"transport={transport}"]),
        *([] if wire == "float32" else [f"wire.dtype={wire}"]),
        *([] if wire != "bf16" else ["wire.params=bf16"]),  # the only dtype that parameters can be rounded to
    ]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The processes of a run at one moment.

    Attributes:
        updates: Gradients applied so far.
        cpu_seconds: Processor time of the server so far.
        workers_cpu_seconds: Processor time of all workers so far.
        server_bytes: Peak memory of the server so far.
        server_bytes_now: Memory of the server now.
        server_threads: Threads of the server now.
        server_descriptors: Open file descriptors of the server now.
        worker_bytes: Largest peak memory of a worker so far.
    """

    updates: int
    cpu_seconds: float
    workers_cpu_seconds: float
    server_bytes: int
    server_bytes_now: int
    server_threads: int
    server_descriptors: int
    worker_bytes: int


class Sampler:
    """Sample a run's processes from outside, in a thread, while the context lasts.

    Args:
        run_dir: The run directory, whose ``processes.json`` has the process ids.

    Attributes:
        samples: In order of time.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.samples: list[Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            with contextlib.suppress(OSError, psutil.Error, ValueError):  # not started yet, or exited
                self.samples.append(self._sample())

    def _sample(self) -> Sample:
        pids = json.loads((self.run_dir / "processes.json").read_text())
        server, workers = psutil.Process(pids["server"]), [psutil.Process(pid) for pid in pids["workers"].values()]
        return Sample(
            updates=int.from_bytes((self.run_dir / "progress").read_bytes()[:8], "little"),
            cpu_seconds=cpu_seconds(server),
            workers_cpu_seconds=sum(map(cpu_seconds, workers)),
            server_bytes=peak_bytes(server.pid),
            server_bytes_now=server.memory_info().rss,
            server_threads=server.num_threads(),
            server_descriptors=server.num_fds(),
            worker_bytes=max(peak_bytes(worker.pid) for worker in workers),
        )

    def between(self, first: int, last: int) -> list[Sample]:
        """The samples taken between two numbers of updates."""
        return [sample for sample in self.samples if first <= sample.updates <= last]


def measure(job: Job, transport: str = "auto", wire: str = "float32", more: Sequence[str] = ()) -> dict[str, Any]:
    """Run, and measure as for every system, with more that only our server records.

    Args:
        job: What to measure.
        transport: Between server and workers.
        wire: The dtype of gradients on the wire; with bf16 that of parameters, too.
        more: Further overrides.

    Raises:
        ValueError: no worker finished a round trip in the time.
    """
    with tempfile.TemporaryDirectory(prefix="throughput_") as folder:
        run_dir = Path(folder) / "run"
        with Sampler(run_dir) as sampler:
            summary = train([*overrides(job, transport, wire), *more], run_dir=run_dir)
        applied = [event for event in read_trace(run_dir)[1] if event["event"] == "apply"]
    found = from_records(job, applied, sampler, summary)
    bytes_of_float32 = {"float32": 1.0, "bf16": 0.5, "fp16": 0.75}[wire]
    found["megabytes_per_second"] *= bytes_of_float32
    return {**found, "transport": transport, "wire": wire}


def from_records(
    job: Job, applied: Sequence[Mapping[str, Any]], sampler: Sampler, summary: Mapping[str, Any]
) -> dict[str, Any]:
    """The measurement of a run from what it left behind.

    Raises:
        ValueError: no worker finished a round trip in the time.
    """
    begin, end = WARM_UP_SECONDS, WARM_UP_SECONDS + job.seconds
    pushes: dict[int, list[float]] = defaultdict(list)
    for event in applied:
        pushes[event["worker"]].append(event["seconds"])
    # As with the peers, a round trip counts if it begins within the time.
    pairs = [pair for times in pushes.values() for pair in itertools.pairwise(times) if begin <= pair[0] < end]
    durations = [after - before for before, after in pairs]
    inside = [event for event in applied if begin <= event["seconds"] < end]
    if not durations:
        raise ValueError(f"got {len(inside)} updates in {job.seconds:g} s, expected two of one worker; measure for longer")
    samples = sampler.between(inside[0]["iteration"], inside[-1]["iteration"])
    cpu = _slope([(sample.updates, sample.cpu_seconds) for sample in samples])
    of_workers = _slope([(sample.updates, sample.workers_cpu_seconds) for sample in samples])
    held, count = summary["lock_held_seconds"], len(applied)
    last = samples[-1] if samples else None
    return {
        **measurement(
            *("ormo_rpc", job, durations, None if cpu is None else cpu * len(durations)),
            *(None if last is None else last.server_bytes, [] if last is None else [last.worker_bytes]),
        ),
        "workers_cpu_seconds_per_update": of_workers,
        "server_threads": max((sample.server_threads for sample in samples), default=None),
        "server_descriptors": max((sample.server_descriptors for sample in samples), default=None),
        "delay_mean": statistics.fmean(event["delay"] for event in inside),
        "delay_99_percent": sorted(event["delay"] for event in inside)[min(len(inside) - 1, int(0.99 * len(inside)))],
        "lock_wait_seconds_per_update": summary["lock_wait_seconds"] / count,
        "lock_held_seconds_per_update": held / count,
        "step_seconds_per_update": summary["step_seconds"] / count,
        "step_part_of_lock": summary["step_seconds"] / held if held else None,
        "spread_of_workers": _spread(Counter(event["worker"] for event in inside)),
    }


def _slope(seconds: Sequence[tuple[int, float]]) -> float | None:
    """Seconds per update between the first sample and the last; None without an update between them."""
    updates = seconds[-1][0] - seconds[0][0] if seconds else 0
    return (seconds[-1][1] - seconds[0][1]) / updates if updates else None


def _spread(pushes: Counter[int]) -> float:
    """The standard deviation of the workers' pushes over their mean: 0 if all are served alike."""
    return statistics.pstdev(pushes.values()) / statistics.fmean(pushes.values())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=272_474, metavar="D")
    parser.add_argument("--workers", type=int, default=2, metavar="K")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    parser.add_argument("--transport", choices=TRANSPORTS, default="auto")
    parser.add_argument("--wire", choices=WIRES, default="float32")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides of the run")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    job = Job(parameters=arguments.parameters, workers=arguments.workers, seconds=arguments.seconds)
    ranks = Ranks.from_environment()
    if ranks is not None and ranks.rank > 0:  # a worker of the run that rank 0 measures
        train([*overrides(job, arguments.transport, arguments.wire), *arguments.set])
        return
    found = measure(job, arguments.transport, arguments.wire, arguments.set)
    if arguments.json:
        print(json.dumps(found), flush=True)
        return
    for name, value in found.items():
        print(f"{name:<34}{value:.6g}" if isinstance(value, float) else f"{name:<34}{value}")


if __name__ == "__main__":
    main()
