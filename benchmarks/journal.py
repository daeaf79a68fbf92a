"""What the journal costs: ``python benchmarks/journal.py``, or ``make journal``.

One worker pushes to the RPC service in this process, without the wire, with and without `checkpoint.journal`, taking turns in
rounds; the difference is what a push pays for being on disk before it is acknowledged: checksum, write and fsync.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ormo_rpc import build_server
from ormo_rpc.messages import Reply
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.storage.journal import Journal, NoJournal
from ormo_rpc.storage.run_directory import environment

SIZES = (7_000, 272_474, 2_000_000)
"""About the default MLP, ResNet-20, and ten times that."""
RESULT = Path(__file__).parents[1] / "results" / "journal.md"


class Pusher:
    """A service with one worker.

    Args:
        dimension: D.
        run_dir: Where the journal goes; None for no journal.
    """

    def __init__(self, dimension: int, run_dir: Path | None) -> None:
        self.journal = NoJournal() if run_dir is None else Journal(run_dir)
        server = build_server(params=torch.zeros(dimension), num_workers=1, lr=1e-6)
        self.service = Service(server, lambda _: None, journal=self.journal)
        self.membership = self.service.join({"wanted": 0, "process": 1, "host": "here", "slot": ""})
        self.reply = self.service.register(self.membership.session_id).value()
        self.grad = torch.randn(dimension)

    def seconds(self, pushes: int) -> float:
        """The median time of a push, over so many."""
        times: list[float] = []
        for _ in range(pushes):
            assert isinstance(self.reply, Reply)
            assert self.reply.ticket is not None
            place = (self.reply.ticket, self.reply.stamp, self.reply.incarnation)
            began = time.perf_counter()
            self.reply = self.service.receive(self.membership.session_id, *place, None, 1, self.grad).value()
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pushes", type=int, default=20, help="per round and contender")
    parser.add_argument("--folder", type=Path, default=RESULT.parent, help="on the disk to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[str] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for dimension in SIZES:
            run_dir = Path(folder) / str(dimension)
            run_dir.mkdir()
            plain, durable = Pusher(dimension, None), Pusher(dimension, run_dir)
            pairs = [(plain.seconds(arguments.pushes), durable.seconds(arguments.pushes)) for _ in range(arguments.rounds)]
            without, with_ = (statistics.median(times) for times in zip(*pairs, strict=True))
            ratios = sorted(b / a for a, b in pairs)
            rows.append(
                f"| {dimension:,} | {without * 1e3:.2f} ms | {with_ * 1e3:.2f} ms | {statistics.median(ratios):.1f} "
                f"({ratios[0]:.1f} to {ratios[-1]:.1f}) | {dimension * 4 / (with_ - without) / 1e6:.0f} MB/s |"
            )
            print(rows[-1], flush=True)
            durable.journal.close()
    here = environment()
    RESULT.write_text(
        "# What the journal costs\n\n"
        f"`make journal`: a push of D float32 values to the service, without the wire, {arguments.rounds} rounds of "
        f"{arguments.pushes} pushes taking turns; medians, and the least and largest ratio of a round. {here['cpu']}, "
        f"one thread, torch {here['torch']}, commit {here['commit']}.\n\n"
        "| D | without | with | ratio | to disk |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()
