"""The server's updates per second: ``python -m benchmarks.throughput --parameters D --workers K --seconds S [--json]``.

Drives the real server and workers through `ormo_rpc.train`, with workers that compute nothing (``worker.dummy=true``).
Everything is taken from what any run leaves behind: updates and round trips from the trace (a worker that computes nothing
pushes again at once, so the time between two of its pushes is its round trip), lock times from the summary, processor time and
memory from the processes while they run, and how far the server is at that moment from the file ``progress``.
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

from benchmarks.peers.line import Job, peak_bytes, result
from ormo_rpc import train
from ormo_rpc.storage.run_directory import read_trace

TRANSPORTS, WIRES = ("auto", "shm", "tcp", "uv"), ("float32", "bf16", "fp16")
WARM_UP_SECONDS = 1.0
LOOK_SECONDS = 0.1


def overrides(job: Job, transport: str = "auto", wire: str = "float32") -> list[str]:
    """The run that is measured; what has its default is left out."""
    return [
        *("runtime=rpc", "algorithm=ormo", "logger=none", "logger.progress=false", f"workers={job.workers}", "train.lr=1e-6"),
        *("model=custom", "model._target_=benchmarks.dummy_model.StandIn", f"model.kwargs={{parameters:{job.parameters}}}"),
        *("dataset=custom", "dataset._target_=benchmarks.dummy_model.data", "worker.dummy=true"),
        *("train.batch_size=1", "train.epochs=1000000", f"train.max_seconds={WARM_UP_SECONDS + job.seconds}"),
        *([] if transport == "auto" else [f"wire.transport={transport}"]),
        *([] if wire == "float32" else [f"wire.dtype={wire}"]),
        *([] if wire != "bf16" else ["wire.params=bf16"]),  # the only thing that parameters can be rounded to
    ]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen of a run at one moment.

    Attributes:
        updates: Gradients applied so far.
        cpu_seconds: What the server's process has used of processors so far.
        workers_cpu_seconds: What those of the workers have, together.
        server_bytes: The most memory that the server has had so far.
        server_bytes_now: What it has now.
        worker_bytes: The most memory that a worker has had so far.
    """

    updates: int
    cpu_seconds: float
    workers_cpu_seconds: float
    server_bytes: int
    server_bytes_now: int
    worker_bytes: int


class Watch:
    """Looks at a run's processes from outside, again and again, in a thread.

    Args:
        run_dir: Its directory, where ``processes.json`` tells who they are.

    Attributes:
        looks: What was seen.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.looks: list[Look] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            with contextlib.suppress(OSError, psutil.Error, ValueError):  # not there yet, or not any more
                self.looks.append(self._look())

    def _look(self) -> Look:
        told = json.loads((self.run_dir / "processes.json").read_text())
        server, workers = psutil.Process(told["server"]), [psutil.Process(pid) for pid in told["workers"].values()]
        return Look(
            updates=int.from_bytes((self.run_dir / "progress").read_bytes()[:8], "little"),
            cpu_seconds=_cpu_seconds(server),
            workers_cpu_seconds=sum(map(_cpu_seconds, workers)),
            server_bytes=peak_bytes(server.pid),
            server_bytes_now=server.memory_info().rss,
            worker_bytes=max(peak_bytes(worker.pid) for worker in workers),
        )

    def between(self, first: int, last: int) -> list[Look]:
        """What was seen while the server was between two numbers of updates."""
        return [look for look in self.looks if first <= look.updates <= last]


def measure(job: Job, transport: str = "auto", wire: str = "float32", more: Sequence[str] = ()) -> dict[str, Any]:
    """One run, as the line of a contender with what the server alone can tell.

    Args:
        job: D, K and how long.
        transport: Of the wire.
        wire: The numbers' format there.
        more: Further overrides.

    Raises:
        ValueError: too little happened in the time.
    """
    with tempfile.TemporaryDirectory(prefix="throughput_") as folder:
        run_dir = Path(folder) / "run"
        with Watch(run_dir) as watch:
            summary = train([*overrides(job, transport, wire), *more], run_dir=run_dir)
        applied = [event for event in read_trace(run_dir)[1] if event["event"] == "apply"]
    line = line_of(job, applied, watch, summary)
    bytes_of_float32 = {"float32": 1.0, "bf16": 0.5, "fp16": 0.75}[wire]
    line["megabytes_per_second"] *= bytes_of_float32
    return {**line, "transport": transport, "wire": wire}


def line_of(job: Job, applied: Sequence[Mapping[str, Any]], watch: Watch, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a run from what it left behind.

    Raises:
        ValueError: too little happened in the time.
    """
    begin, end = WARM_UP_SECONDS, WARM_UP_SECONDS + job.seconds
    pushes: dict[int, list[float]] = defaultdict(list)
    for event in applied:
        pushes[event["worker"]].append(event["seconds"])
    # As with the peers, a round trip counts that begins in time.
    pairs = [pair for times in pushes.values() for pair in itertools.pairwise(times) if begin <= pair[0] < end]
    durations = [after - before for before, after in pairs]
    inside = [event for event in applied if begin <= event["seconds"] < end]
    if not durations:
        raise ValueError(f"got {len(inside)} updates in {job.seconds:g} s, expected two of a worker; measure for longer")
    looks = watch.between(inside[0]["iteration"], inside[-1]["iteration"])
    cpu = _slope([(look.updates, look.cpu_seconds) for look in looks])
    of_workers = _slope([(look.updates, look.workers_cpu_seconds) for look in looks])
    held, count = summary["lock_held_seconds"], len(applied)
    last = looks[-1] if looks else None
    return {
        **result(
            *("ormo_rpc", job, durations, None if cpu is None else cpu * len(durations)),
            *(None if last is None else last.server_bytes, [] if last is None else [last.worker_bytes]),
        ),
        "workers_cpu_seconds_per_update": of_workers,
        "delay_mean": statistics.fmean(event["delay"] for event in inside),
        "delay_99_percent": sorted(event["delay"] for event in inside)[min(len(inside) - 1, int(0.99 * len(inside)))],
        "lock_wait_seconds_per_update": summary["lock_wait_seconds"] / count,
        "lock_held_seconds_per_update": held / count,
        "step_seconds_per_update": summary["step_seconds"] / count,
        "step_part_of_lock": summary["step_seconds"] / held if held else None,
        "spread_of_workers": _spread(Counter(event["worker"] for event in inside)),
    }


def _slope(looks: Sequence[tuple[int, float]]) -> float | None:
    """Processor seconds per update, between the first look and the last; None where nothing happened between them."""
    updates = looks[-1][0] - looks[0][0] if looks else 0
    return (looks[-1][1] - looks[0][1]) / updates if updates else None


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _spread(pushes: Counter[int]) -> float:
    """The standard deviation of the workers' pushes over their mean: who is served less than others."""
    return statistics.pstdev(pushes.values()) / statistics.fmean(pushes.values())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=272_474, metavar="D")
    parser.add_argument("--workers", type=int, default=2, metavar="K")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    parser.add_argument("--transport", choices=TRANSPORTS, default="auto")
    parser.add_argument("--wire", choices=WIRES, default="float32")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further options of the run")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    job = Job(parameters=arguments.parameters, workers=arguments.workers, seconds=arguments.seconds)
    line = measure(job, arguments.transport, arguments.wire, arguments.set)
    if arguments.json:
        print(json.dumps(line), flush=True)
        return
    for name, value in line.items():
        print(f"{name:<34}{value:.6g}" if isinstance(value, float) else f"{name:<34}{value}")


if __name__ == "__main__":
    main()
