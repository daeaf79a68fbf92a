"""Runs over several nodes, which are network namespaces of this machine, each with a torchrun agent of its own."""

from __future__ import annotations

import re
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from ormo_rpc.rendezvous.addresses import written
from tests.support.namespaces import Nodes, why_none
from tests.support.processes import check_lineage, events, processes, replayed, summary, wait_until
from tests.support.torchrun_job import TorchrunJob, sockets_of

PORTS = (41000, 41999)
"""A range for a firewall."""
pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Generator[Nodes]:
    if reason := why_none():
        pytest.skip(reason)
    with Nodes(3, interfaces=2, version=getattr(request, "param", 4)) as made:
        yield made


# Torchrun numbers the nodes of c10d in the order of their addresses: rank 0 is on the first node by eth0, on the last by eth1.
@pytest.mark.parametrize(
    ("rendezvous", "host", "ranks", "interface", "port", "nodes"),
    [("c10d", 0, [1, 1, 1], 1, None, 4), ("static", 0, [2, 2], 0, PORTS[1], 6)],
    ids=[
        "c10d, rank 0 on the third node, the store on the first",
        "static, two ranks a node, IPv6, fixed port, the others closed at first",
    ],
    indirect=["nodes"],
)
def test_nodes_train_together_over_the_wanted_interface_alone(
    rendezvous: str, host: int, ranks: list[int], interface: int, port: int | None, nodes: Nodes, tmp_path: Path
) -> None:
    total, workers = 1000, sum(ranks) - 1
    options = (f"train.max_iterations={total}", "train.epochs=1000", *([] if port is None else [f"server.address=:{port}"]))
    used = nodes.nodes[: len(ranks)]
    nodes.set_port_range(*PORTS)
    if port is not None:
        nodes.drop(used[0], (PORTS[0], port - 1))
    with TorchrunJob(tmp_path, used, options, rendezvous=rendezvous, host=host, ranks=ranks, interface=interface) as job:
        if port is not None:
            agent = rf"{re.escape(written(used[0].address, 41))}\d\d\d"
            closed = (
                rf"worker 2: no server can be joined at .*: the server's agent of .* at {agent} does not answer \(no answer"
            )
            wait_until(lambda: re.search(closed, job.said(used[1])), "a line about the closed port")
            nodes.drop(used[0], None)
        wait_until(lambda: events(job.run_dir, "apply"), "the first gradient")
        found = {node: sockets_of(node) for node in used}
        assert job.wait() == [0] * len(used)
        said = "".join(job.said(node) for node in used)
    for node, sockets in found.items():
        assert {each.local for each in sockets} == {node.addresses[interface]}
    server = used[-1] if interface == 1 else used[0]
    listening = {each.local for sockets in found.values() for each in sockets if each.listening}
    assert server.addresses[interface] in listening
    assert all(PORTS[0] <= each.port <= PORTS[1] for sockets in found.values() for each in sockets if each.listening)

    result = summary(job.run_dir)
    assert (result["status"], result["num_workers"], result["evictions"]) == ("completed", workers, [])
    assert set(result["pushes_per_worker"]) == {str(worker) for worker in range(workers)}
    assert result["control"] == "rpc"
    # Static rank 1 is on the node of rank 0, with which it shares memory; all others are on nodes of their own.
    shared = {"0"} if rendezvous == "static" else set[str]()
    took = {worker: "shm" if worker in shared else "gloo" for worker in result["pushes_per_worker"]}
    assert {worker: each["transport"] for worker, each in result["transports"].items()} == took
    check_lineage(job.run_dir, total)

    address = processes(job.run_dir)["address"]
    if port is not None:
        assert address == f"[{server.addresses[interface]}]:{port}"
    at = re.escape(address)
    over = rf"on eth{interface} \({re.escape(server.addresses[interface])}\)"
    assert re.search(rf"^launch\.py: rank 0 of {workers + 1} on {server.host}: the server at {at} {over}", said, re.M), said
    for worker in range(workers):
        who = rf"^launch\.py: rank {worker + 1} of {workers + 1} on node-.: "
        assert re.search(rf"{who}worker {worker}, for the server at {at} over eth{interface} \(", said, re.M), said
        assert re.search(rf"worker {worker}: joined as worker {worker}; pushes by {took[str(worker)]}: \w", said), said
        pushed = result["pushes_per_worker"][str(worker)]
        assert re.search(rf"{who}the run completed: {total} gradients, {pushed} of them by worker {worker}$", said, re.M), said


def test_ranks_that_torchrun_starts_again_continue_their_run(nodes: Nodes, tmp_path: Path) -> None:
    """The launcher of rank 0 is killed, and its server with it."""
    total = 900
    options = (f"train.max_iterations={total}", "train.epochs=1000", "checkpoint.every=100")
    with TorchrunJob(tmp_path, nodes.nodes[:2], options, ranks=[1, 2], options=["--max-restarts=1"]) as job:
        wait_until(lambda: len(events(job.run_dir, "apply")) > 300, "gradients")
        address = processes(job.run_dir)["address"]
        job.ranks(nodes.nodes[0])[0].send_signal(signal.SIGKILL)
        assert job.wait() == [0, 0]
    check_lineage(job.run_dir, total)
    result = summary(job.run_dir)
    (resumed,) = events(job.run_dir, "resume")
    assert resumed["iteration"] > 0
    assert (resumed["incarnation"], resumed["workers"]) == (1, [0, 1])
    assert (result["status"], result["iterations"], result["incarnations"]) == ("completed", total, 2)
    assert result["rolled_back"] > 0
    assert processes(job.run_dir)["address"] == address
    assert [path.name for path in tmp_path.glob("*/trace.jsonl")] == ["trace.jsonl"]
    assert replayed(job.run_dir, tmp_path / "again") == result["final_params_sha256"]


def test_a_node_whose_link_is_lost_and_one_that_vanishes_and_comes_back(nodes: Nodes, tmp_path: Path) -> None:
    """The run pauses for as long as a worker is missing, so that nothing here depends on the length of a fault."""
    total, timeout = 1500, 4.0
    slow = ("heterogeneity=slow_tail", "heterogeneity.fraction=1", "heterogeneity.factor=20", "train.epochs=1000")
    waiting = ("runtime.min_workers=2", f"runtime.worker_timeout_seconds={timeout:g}", f"train.max_iterations={total}")
    first, second = nodes.nodes[:2]
    with TorchrunJob(tmp_path, [first, second], (*slow, *waiting), rendezvous="static", ranks=[2, 1]) as job:

        def remote() -> int:
            return sum(event["worker"] == 1 for event in events(job.run_dir, "apply"))

        def evicted() -> int:
            return job.said(first).count("was evicted: ")

        wait_until(remote, "the first gradient of the second node")
        nodes.link(second, up=False)
        wait_until(lambda: evicted() == 1, "the eviction of a worker behind a lost link")
        before = remote()
        nodes.link(second, up=True)
        wait_until(lambda: remote() > before, "its return")
        nodes.link(second, up=False)
        second.kill()
        wait_until(lambda: evicted() == 2, "the eviction of a vanished node's worker")
        nodes.link(second, up=True)
        job.start(second)
        assert job.wait() == [0, 0]
        said = job.said(first)
    check_lineage(job.run_dir, total)
    result = summary(job.run_dir)
    assert (result["status"], result["incarnations"]) == ("completed", 1)
    assert [loss["worker"] for loss in result["evictions"]] == [1, 1]
    assert said.count(f"was evicted: it was silent for {timeout:g} s") == 2, said
    assert said.count("paused: 1 workers, and runtime.min_workers=2") == 2, said
