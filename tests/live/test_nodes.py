"""Runs over several nodes, which are network namespaces of this machine, each with a torchrun agent of its own."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.support.namespaces import Nodes, why_none
from tests.support.processes import events, replayed, summary, wait_until
from tests.support.torchrun_job import TorchrunJob, sockets_of

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]


@pytest.fixture
def nodes() -> Generator[Nodes]:
    if reason := why_none():
        pytest.skip(reason)
    with Nodes(3, interfaces=2) as made:
        yield made


def check_lineage(run_dir: Path, total: int) -> None:
    """Every iteration in order, and every ticket exactly once."""
    applied = events(run_dir, "apply")
    assert [event["iteration"] for event in applied] == list(range(total))
    assert sorted(event["ticket"] for event in applied) == list(range(total))


# Torchrun numbers the nodes of c10d in the order of their addresses: rank 0 is on the first node by eth0, on the last by eth1.
@pytest.mark.parametrize(
    ("rendezvous", "host", "ranks", "interface"),
    [("c10d", 1, [1, 1], 0), ("c10d", 0, [1, 1, 1], 1), ("static", 0, [2, 2], 0)],
    ids=["c10d, store not on the node of rank 0", "c10d, rank 0 on the third node", "static, two ranks a node"],
)
def test_nodes_train_together_over_the_wanted_interface_alone(
    rendezvous: str, host: int, ranks: list[int], interface: int, nodes: Nodes, tmp_path: Path
) -> None:
    total, workers = 400, sum(ranks) - 1
    options = (f"train.max_iterations={total}",)
    used = nodes.nodes[: len(ranks)]
    with TorchrunJob(tmp_path, used, options, rendezvous=rendezvous, host=host, ranks=ranks, interface=interface) as job:
        wait_until(lambda: events(job.run_dir, "apply"), "the first gradient")
        found = {node: sockets_of(node) for node in used}
        assert job.wait() == [0] * len(used)
        said = "".join(job.said(node) for node in used)
    for node, sockets in found.items():
        assert {each.local for each in sockets} == {node.addresses[interface]}
    server = used[-1] if interface == 1 else used[0]
    listening = {each.local for sockets in found.values() for each in sockets if each.listening}
    assert server.addresses[interface] in listening

    result = summary(job.run_dir)
    assert (result["status"], result["num_workers"], result["evictions"]) == ("completed", workers, [])
    assert set(result["pushes_per_worker"]) == {str(worker) for worker in range(workers)}
    check_lineage(job.run_dir, total)

    address = json.loads((job.run_dir / "processes.json").read_text())["address"]
    over = rf"on eth{interface} \({re.escape(server.addresses[interface])}\)"
    assert re.search(rf"^launch\.py: rank 0 of {workers + 1} on {server.host}: the server at {address} {over}", said, re.M), (
        said
    )
    for worker in range(workers):
        who = rf"^launch\.py: rank {worker + 1} of {workers + 1} on node-.: "
        assert re.search(rf"{who}worker {worker}, for the server at {address} over eth{interface} \(", said, re.M), said
        pushed = result["pushes_per_worker"][str(worker)]
        assert re.search(rf"{who}the run completed: {total} gradients, {pushed} of them by worker {worker}$", said, re.M), said


def test_ranks_that_torchrun_starts_again_continue_their_run(nodes: Nodes, tmp_path: Path) -> None:
    """Rank 0's launcher dies; later a worker's, whose death torchrun answers by ending rank 0 in an orderly way."""
    total = 3000
    options = (f"train.max_iterations={total}", "train.epochs=1000", "checkpoint.every=100")
    with TorchrunJob(tmp_path, nodes.nodes[:2], options, ranks=[1, 2], options=["--max-restarts=2"]) as job:
        for rank, node in ((0, nodes.nodes[0]), (2, nodes.nodes[1])):
            seen = len(events(job.run_dir, "resume"))
            wait_until(lambda: len(events(job.run_dir, "apply")) > 300, "gradients")
            before = len(events(job.run_dir, "apply"))
            job.ranks(node)[rank].send_signal(signal.SIGKILL)
            wait_until(lambda seen=seen: len(events(job.run_dir, "resume")) > seen, "the next start of the ranks")
            resumed = events(job.run_dir, "resume")[-1]
            assert resumed["iteration"] > 0
            assert (resumed["iteration"] >= before) == (rank == 2)  # its last state is kept where it was ended in order
        assert job.wait() == [0, 0]
    check_lineage(job.run_dir, total)
    result = summary(job.run_dir)
    assert (result["status"], result["iterations"], result["incarnations"]) == ("completed", total, 3)
    assert [event["incarnation"] for event in events(job.run_dir, "resume")] == [1, 2]
    assert [path.name for path in tmp_path.glob("*/trace.jsonl")] == ["trace.jsonl"]
    assert replayed(job.run_dir, tmp_path / "again") == result["final_params_sha256"]
