"""Measure what ``checkpoint.journal`` costs a push: ``python -m benchmarks.journal``.

One worker pushes to the service in this process, without a transport, with and without the journal, taking turns in rounds;
the difference is the price of a push that is on disk before it is acknowledged: checksum, write and fsync.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measuring import RESULTS, spread
from ormo_rpc import build_server
from ormo_rpc.control.messages import JoinRequest
from ormo_rpc.messages import Push, Reply
from ormo_rpc.report.table import as_markdown
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.storage.environment import environment
from ormo_rpc.storage.journal import FileJournal, NoJournal

SIZES = (7_000, 272_474, 2_000_000)
"""About the default MLP, ResNet-20, and ten times that."""


class Pusher:
    """A service and its only worker.

    Args:
        dimension: D.
        run_dir: The folder of the journal; None for no journal.
    """

    def __init__(self, dimension: int, run_dir: Path | None) -> None:
        self.journal = NoJournal() if run_dir is None else FileJournal(run_dir)
        server = build_server(params=torch.zeros(dimension), num_workers=1, lr=1e-6)
        self.service = Service(server, lambda _: None, journal=self.journal)
        self.membership = self.service.join(JoinRequest(preferred_worker=0, pid=1, host="here", slot_id=""))
        self.reply = self.service.register(self.membership.session_id).value()
        self.grad = torch.randn(dimension)

    def seconds(self, pushes: int) -> float:
        """The median seconds of a push."""
        times: list[float] = []
        for _ in range(pushes):
            assert isinstance(self.reply, Reply)
            assert self.reply.ticket is not None
            push = Push(
                worker=self.membership.worker,
                ticket=self.reply.ticket,
                stamp=self.reply.stamp,
                grad=self.grad,
                incarnation=self.reply.incarnation,
            )
            began = time.perf_counter()
            self.reply = self.service.push(self.membership.session_id, push).value()
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--pushes", type=int, default=20, help="in each round, with and without")
    parser.add_argument(
        "--into", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the result, on the disk to measure"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = [("D", "without", "with", "ratio", "to disk")]
    with tempfile.TemporaryDirectory(dir=arguments.into) as folder:
        for dimension in arguments.parameters:
            run_dir = Path(folder) / str(dimension)
            run_dir.mkdir()
            plain, durable = Pusher(dimension, None), Pusher(dimension, run_dir)
            pairs = [(plain.seconds(arguments.pushes), durable.seconds(arguments.pushes)) for _ in range(arguments.rounds)]
            without, with_journal = (statistics.median(times) for times in zip(*pairs, strict=True))
            ratios = spread([after / before for before, after in pairs], ".1f")
            rate = f"{dimension * 4 / (with_journal - without) / 1e6:.0f} MB/s"
            rows.append((f"{dimension:,}", f"{without * 1e3:.2f} ms", f"{with_journal * 1e3:.2f} ms", ratios, rate))
            print("  ".join(rows[-1]), flush=True)
            durable.journal.close()
    machine = environment()
    (arguments.into / "journal.md").write_text(
        "# Cost of the journal\n\n"
        f"`make journal`: a push of D float32 values to the service, without a transport, {arguments.rounds} rounds of "
        f"{arguments.pushes} pushes taking turns; medians, with the lowest and the highest ratio of a round. {machine['cpu']}, "
        f"one thread, torch {machine['torch']}, commit {machine['commit']}.\n\n{as_markdown(rows)}\n"
    )


if __name__ == "__main__":
    main()
