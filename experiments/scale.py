"""Simulate runs with more and more workers: ``python -m experiments.scale``.

OrMo on the noisy quadratic (D = 100, condition 10), K = 1 to 4096 equal workers of 1 s per gradient, with fast links and with
slow ones (1 s each way); the server takes 1 ms per push, so it is saturated from about K = 1,000 on. The learning rate is one
value divided by K. The table has the mean delay, the server's load, the mean wait in its queue, and the virtual time until the
loss has fallen to a twentieth of its start. Writes ``results/scale.md``.
"""

from __future__ import annotations

from tqdm import tqdm

from experiments import common
from ormo_rpc.report.table import as_markdown

WORKERS = (1, 4, 16, 64, 256, 1024, 4096)
LATENCIES = {"fast": 0.0, "slow": 1.0}
PUSHES_PER_WORKER = 60
LEAST_PUSHES = 6000
RATE = 0.02


def run(workers: int, latency: float) -> tuple[str, ...]:
    """Simulate one run: a row of the table."""
    pushes = max(LEAST_PUSHES, PUSHES_PER_WORKER * workers)
    summary, applied = common.run(
        (
            *(*common.SIMULATED, "runtime.gradient=quadratic", "runtime.dimension=100"),
            *("runtime.condition=10", "runtime.noise=0.01", "runtime.compute_seconds=1.0", "runtime.service_seconds=0.001"),
            *(f"runtime.latency_seconds=[{latency}]", f"workers={workers}", f"train.max_iterations={pushes}"),
            f"train.lr={RATE / workers}",
        )
    )
    target = applied[0]["loss"] / 20
    # The loss of a gradient is that of its stamp's parameters.
    stamp = next((event["stamp"] for event in applied if event["loss"] <= target), None)
    return (
        *(str(workers), f"{latency:g}", str(pushes), f"{summary['delay_mean']:.1f}", f"{summary['server_load']:.1%}"),
        f"{summary['server_queue_seconds'] / pushes:.4f}",
        "not reached" if stamp is None else f"{applied[stamp - 1]['seconds']:.1f}",
        "not reached" if stamp is None else str(stamp),
    )


def main() -> None:
    """Run all, and write the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, metavar="K")
    a = parser.parse_args()
    into = common.folder(a.into)
    header = ("K", "latency (s)", "pushes", "mean delay", "server load", "queue (s)", "seconds to target", "pushes to target")
    cases = [(workers, latency) for latency in LATENCIES.values() for workers in a.workers]
    table = as_markdown([header, *(run(*case) for case in tqdm(cases, unit=" runs"))])
    (into / "scale.md").write_text(table + "\n\nVirtual seconds; one seed.\n")
    print(table)


if __name__ == "__main__":
    main()
