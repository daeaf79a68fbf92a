"""The server's updates per second: ``python -m benchmarks.throughput --parameters D --workers K --seconds S [--json]``.

Drives the real server and workers through `ormo_rpc.train`, with a model whose gradient costs next to nothing. Everything is
taken from what any run leaves behind: updates and round trips from the trace (with a worker that computes nothing, the time
between two of its pushes is its round trip), lock times from the summary, processor time and memory from the processes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.common import Job, peak_bytes, result
from ormo_rpc import train
from ormo_rpc.run_directory import read_trace

TRANSPORTS, WIRES = ("auto", "shm", "uv"), ("float32", "bf16")
WARM_UP_SECONDS = 1.0
SAMPLE_SECONDS = 0.05


def overrides(job: Job, transport: str, wire: str) -> list[str]:
    """The run that is measured; an option that has its default is left out, so that older versions can be measured too."""
    return [
        *("runtime=rpc", "algorithm=ormo", "logger=none", "logger.progress=false", f"workers={job.workers}", "train.lr=1e-6"),
        *("model=custom", "model._target_=benchmarks.stand_in.StandIn", f"model.kwargs={{parameters:{job.parameters}}}"),
        *("dataset=custom", "dataset._target_=benchmarks.stand_in.data"),
        *("train.batch_size=1", "train.epochs=1000000", f"train.max_seconds={WARM_UP_SECONDS + job.seconds}"),
        *([] if transport == "auto" else [f"wire.transport={transport}"]),
        *([] if wire == "float32" else [f"wire.dtype={wire}"]),
    ]


class Watch:
    """Processor time and peak memory of a run's processes, looked at from outside while it runs.

    Args:
        run_dir: Its directory, where ``processes.json`` tells who they are.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.cpu: list[float] = []
        """Seconds of the server's processors, at each look."""
        self.peaks: dict[str, int] = {}
        """Bytes of "server" and of each worker."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            with contextlib.suppress(OSError, psutil.Error):  # not there yet, or not any more
                processes = json.loads((self.run_dir / "processes.json").read_text())
                times = psutil.Process(processes["server"]).cpu_times()
                self.cpu.append(times.user + times.system)
                for name, pid in {"server": processes["server"], **processes["workers"]}.items():
                    self.peaks[name] = max(self.peaks.get(name, 0), peak_bytes(pid))


def measure(job: Job, transport: str, wire: str) -> dict[str, Any]:
    """One run, as the line of a contender with what the server alone can tell."""
    with tempfile.TemporaryDirectory(prefix="throughput_") as folder:
        run_dir = Path(folder) / "run"
        with Watch(run_dir) as watch:
            summary = train(overrides(job, transport, wire), run_dir=run_dir)
        applied = [event for event in read_trace(run_dir)[1] if event["event"] == "apply"]
    pushes: dict[int, list[float]] = defaultdict(list)
    for event in applied:
        if WARM_UP_SECONDS <= event["seconds"] < WARM_UP_SECONDS + job.seconds:
            pushes[event["worker"]].append(event["seconds"])
    durations = [after - before for times in pushes.values() for before, after in itertools.pairwise(times)]
    cpu = (watch.cpu[-1] - watch.cpu[0]) / len(applied) if len(watch.cpu) > 1 else 0.0
    workers = [peak for name, peak in watch.peaks.items() if name != "server"]
    line = result("ormo_rpc", job, durations, cpu * len(durations), watch.peaks.get("server"), workers)
    return line | {
        "transport": transport,
        "wire": wire,
        "lock_wait_seconds_per_update": summary["lock_wait_seconds"] / len(applied),
        "lock_held_seconds_per_update": summary["lock_held_seconds"] / len(applied),
        "spread_of_workers": _spread([len(times) for times in pushes.values()]),
    }


def _spread(counts: list[int]) -> float:
    """The standard deviation of the workers' pushes over their mean: who is served less than others."""
    return statistics.pstdev(counts) / statistics.fmean(counts) if counts else 0.0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=272_474, metavar="D")
    parser.add_argument("--workers", type=int, default=2, metavar="K")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    parser.add_argument("--transport", choices=TRANSPORTS, default="auto")
    parser.add_argument("--wire", choices=WIRES, default="float32")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    job = Job(parameters=arguments.parameters, workers=arguments.workers, seconds=arguments.seconds)
    line = measure(job, arguments.transport, arguments.wire)
    if arguments.json:
        print(json.dumps(line), flush=True)
        return
    for name, value in line.items():
        print(f"{name:<34}{value:.6g}" if isinstance(value, float) else f"{name:<34}{value}")


if __name__ == "__main__":
    main()
