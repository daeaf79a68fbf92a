"""Faults of whole nodes, in network namespaces of this machine: ``python -m tests.chaos.nodes``.

A link that is down for 20 seconds, with time-outs above and below that; a node that vanishes, one that comes back, and one that
joins. Writes ``results/nodes.md``; exits with status 1 where something that has to happen does not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ormo_rpc.report.table import as_markdown
from ormo_rpc.storage.environment import environment
from tests.support.namespaces import Node, Nodes, why_none
from tests.support.processes import ROOT, events, summary, wait_until
from tests.support.torchrun_job import TorchrunJob, sockets_of

POLL_SECONDS = 0.2
SLOW = ("train.epochs=1000000", "heterogeneity=slow_tail", "heterogeneity.fraction=1", "heterogeneity.factor=100")
"""Gradients that take some hundredths of a second."""
Row = tuple[str, str]
"""An action, and its effect."""


class Watched:
    """A job, and what its run has recorded since moments of interest.

    Args:
        job: The job.
    """

    def __init__(self, job: TorchrunJob) -> None:
        self.job = job
        self.rows: list[Row] = []

    def applied(self, workers: Sequence[int] | None = None, after: float = -1.0) -> int:
        """The number of gradients of these workers applied after a second of the run's clock."""
        found = [each for each in events(self.job.run_dir, "apply") if each["seconds"] > after]
        return sum(workers is None or each["worker"] in workers for each in found)

    def now(self) -> float:
        """The run's clock at its newest event."""
        return max((each["seconds"] for each in events(self.job.run_dir, "apply")), default=0.0)

    def evicted(self) -> list[dict[str, Any]]:
        """The evictions so far."""
        file = self.job.run_dir / "evictions.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for_work(self, workers: Sequence[int], what: str) -> None:
        """Wait until each of these workers has worked from now on."""
        since = self.now()
        wait_until(lambda: all(self.applied([each], since) > 2 for each in workers), what, POLL_SECONDS)

    def end(self, ended: Sequence[Node]) -> None:
        """Wait until the run has ended, and check it: completed, and every ticket once; these nodes' agents are stopped.

        A torchrun agent waits up to five minutes for the agents of nodes that have vanished.
        """
        summary_file = self.job.run_dir / "summary.json"
        wait_until(
            lambda: summary_file.exists() and summary(self.job.run_dir)["status"] != "interrupted", "the end", POLL_SECONDS
        )
        result = summary(self.job.run_dir)
        applied = events(self.job.run_dir, "apply")
        count = result["iterations"]
        assert result["status"] == "completed", result
        assert [each["iteration"] for each in applied] == list(range(count))
        assert sorted(each["ticket"] for each in applied) == list(range(count))
        for node in ended:
            wait_until(lambda node=node: not sockets_of(node), f"the end of the ranks of {node.host}", POLL_SECONDS)
        self.rows.append(("end of the run", f"completed; {count} iterations in order, every ticket once"))
        took = (f"worker {worker} {each['transport']}" for worker, each in result["transports"].items())
        self.rows.append((f"control plane {result['control']}, pushes by", ", ".join(took)))


def short_and_long_loss(nodes: Nodes, folder: Path, *, down: float, timeout: float, seconds: float) -> list[Row]:
    """The link of a node with two of four workers is down for a while; later the node is killed whole."""
    first, second = nodes.nodes[:2]
    limits = (f"train.max_seconds={seconds:g}", f"runtime.worker_timeout_seconds={timeout:g}")
    with TorchrunJob(folder, [first, second], (*SLOW, *limits), rendezvous="static", ranks=[3, 2]) as job:
        run = Watched(job)
        run.wait_for_work(range(4), "gradients of four workers")
        lost = down > timeout
        nodes.link(second, up=False)
        time.sleep(down)
        meanwhile, before = run.applied([0, 1], run.now() - down / 2), [each["worker"] for each in run.evicted()]
        nodes.link(second, up=True)
        assert meanwhile > 0, "the workers of the other node went on"
        assert sorted(before) == ([2, 3] if lost else []), before
        run.wait_for_work(range(4), "gradients of four workers after the link was up again")
        assert len(run.evicted()) == len(before)
        effect = "both workers evicted, and back" if lost else "nobody evicted, all went on"
        run.rows.append((f"link down for {down:g} s, time-out {timeout:g} s", effect))
        second.kill()
        wait_until(lambda: len(run.evicted()) == len(before) + 2, "the eviction of the killed node's workers", POLL_SECONDS)
        run.wait_for_work([0, 1], "gradients of the workers that are left")
        run.rows.append(("SIGKILL of all processes of that node", "both workers evicted, the others go on"))
        run.end([first])
        return run.rows


def vanished_and_back(nodes: Nodes, folder: Path, *, timeout: float, seconds: float) -> list[Row]:
    """A third node joins with ``role=worker``; a node vanishes without a word, and comes back with a new agent of torchrun."""
    first, second, third = nodes.nodes[:3]
    limits = (f"train.max_seconds={seconds:g}", f"runtime.worker_timeout_seconds={timeout:g}")
    with TorchrunJob(folder, [first, second], (*SLOW, *limits), rendezvous="static", ranks=[2, 2]) as job:
        run = Watched(job)
        run.wait_for_work(range(3), "gradients of three workers")
        address = json.loads((job.run_dir / "processes.json").read_text())["address"]
        elastic = job.command(third, "launch.py", "role=worker", f"server.address={address}")
        run.wait_for_work(range(4), "gradients of the third node")
        run.rows.append(("a third node joins with role=worker", "it works as worker 3"))
        nodes.link(second, up=False)
        second.kill()
        wait_until(lambda: len(run.evicted()) == 2, "the eviction of the vanished node's workers", POLL_SECONDS)
        nodes.link(second, up=True)
        run.rows.append(
            ("a node vanishes without closing a connection", f"both workers evicted after {timeout:g} s of silence")
        )
        job.start(second)
        run.wait_for_work(range(4), "gradients of the node that came back")
        run.rows.append(("the node comes back: torchrun with the same --node-rank", "its workers join the run that goes on"))
        run.end([first, second])
        assert job.wait(60) == [0, 0]
        assert elastic.wait(60) == 0
        return run.rows


def membership(nodes: Nodes, folder: Path, *, seconds: float) -> list[Row]:
    """With ``--nnodes=1:2`` a node vanishes and one joins: the ranks start again, and continue the run.

    In torch 2.14 the agent of a node that joins later waits in vain for the address of the shared store, hence the variable.
    """
    first, second = nodes.nodes[:2]
    limits = (f"train.max_seconds={seconds:g}", "runtime.worker_timeout_seconds=5", "checkpoint.every_seconds=2")
    options, env = ("--nnodes=1:2", "--max-restarts=2"), {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with TorchrunJob(folder, [first, second], (*SLOW, *limits), ranks=[2, 1], options=options, env=env) as job:
        run = Watched(job)
        run.wait_for_work(range(2), "gradients of two workers")
        second.kill()
        wait_until(lambda: len(run.evicted()) == 1, "the eviction of the killed node's worker", POLL_SECONDS)
        run.wait_for_work([0], "gradients of the other node")
        run.rows.append(
            ("--nnodes=1:2, a node is killed whole", "its worker is evicted, the others go on; no rank starts again")
        )
        job.start(second)
        wait_until(lambda: events(job.run_dir, "resume"), "the next start of the ranks", POLL_SECONDS)
        run.wait_for_work(range(2), "gradients of both nodes")
        run.rows.append(
            ("the node comes back", "torchrun starts all ranks again; rank 0 continues the run from its last state")
        )
        run.end([first, second])
        assert job.wait(60) == [0, 0]
        assert summary(job.run_dir)["incarnations"] == 2
        return run.rows


def main() -> None:
    """Run the scenarios, and write what was seen."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.nodes", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--into", type=Path, default=ROOT / "results", metavar="FOLDER", help="folder of the results")
    into: Path = parser.parse_args().into
    if reason := why_none():
        sys.exit(f"nodes: {reason}")
    scenarios: dict[str, Callable[[Nodes, Path], list[Row]]] = {
        "time-out above the loss": lambda nodes, folder: short_and_long_loss(nodes, folder, down=20, timeout=60, seconds=60),
        "time-out below the loss": lambda nodes, folder: short_and_long_loss(nodes, folder, down=20, timeout=10, seconds=75),
        "vanished and back": lambda nodes, folder: vanished_and_back(nodes, folder, timeout=5, seconds=75),
        "changes of the nodes": lambda nodes, folder: membership(nodes, folder, seconds=60),
    }
    rows = [("run", "done", "seen")]
    for name, scenario in scenarios.items():
        with tempfile.TemporaryDirectory(prefix="nodes_") as folder, Nodes(3) as nodes:
            for row in scenario(nodes, Path(folder)):
                print("  ".join((name, *row)), flush=True)
                rows.append((name, *row))
    machine = environment()
    head = (
        "# Faults of whole nodes\n\n`make nodes`: nodes are network namespaces of one machine, joined by a bridge, each with a "
        f"torchrun agent; digits, MLP, OrMo. Commit {machine['commit']}, torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['cpu']}, {os.cpu_count()} cores. 1 run of each.\n\n"
    )
    (into / "nodes.md").write_text(head + as_markdown(rows).strip() + "\n")


if __name__ == "__main__":
    main()
