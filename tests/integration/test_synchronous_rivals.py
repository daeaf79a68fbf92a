"""Synchronous rivals in the simulator: who makes up a round, how long it takes, what is cancelled; resumed and replayed."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_rpc import ConfigError, train
from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.runtimes.configured import time_generator
from ormo_rpc.runtimes.round_sizes import check_rounds
from ormo_rpc.storage.run_directory import read_trace
from tests.support.processes import replayed

QUADRATIC = ("runtime=sim", "logger=none", "runtime.gradient=quadratic", "runtime.dimension=20", "train.lr=0.01")
ONE_SLOW = ("workers=4", "heterogeneity=one_slow", "heterogeneity.factor=10", "runtime.compute_seconds=0.5")
EXPONENTIAL = ("workers=5", "heterogeneity=exponential", "runtime.compute_seconds=1.0", "train.max_iterations=300")


def simulate(run_dir: Path, *overrides: str) -> dict[str, Any]:
    return train([*QUADRATIC, *overrides], run_dir=run_dir)


def applied(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in read_trace(run_dir)[1] if event["event"] == "apply"]


def times(*overrides: str) -> Callable[[int], float]:
    """Draw the compute times of each worker's tickets, one after the other, as the configuration has them."""
    config = compose([*QUADRATIC, *overrides])
    generators: dict[int, torch.Generator] = {}

    def draw(worker: int) -> float:
        generator = generators.setdefault(worker, time_generator(config, worker))
        return config.sim.compute_seconds * config.slowdown(worker, generator)

    return draw


@pytest.mark.parametrize("cancel", [False, True])
def test_the_m_fastest_workers_make_up_every_round_where_speeds_are_fixed(cancel: bool, tmp_path: Path) -> None:
    options = (*ONE_SLOW, "train.max_iterations=120", "algorithm=m_sync", "algorithm.m=3", f"algorithm.cancel={cancel}")
    summary = simulate(tmp_path, *options)
    # 40 rounds of 0.5 s. The slow worker would take 5 s a ticket: it is in no round.
    assert {event["worker"] for event in applied(tmp_path)} == {0, 1, 2}
    assert [event["delay"] for event in applied(tmp_path)] == [0, 1, 2] * 40, "places in the round"
    if cancel:
        assert summary["virtual_seconds"] == pytest.approx(20.0)
        # Each round cancels it, but for the last ones, where the others have taken all tickets that are left.
        assert summary["cancelled"] == 39
        assert (summary["discarded"], summary["gradients_computed"]) == (0, 120)
        assert summary["utilisation_per_worker"] == pytest.approx({"0": 1.0, "1": 1.0, "2": 1.0, "3": 39 / 40})
    else:
        # At 5, 10, 15 s its gradient of ten rounds before is discarded, and at 20 s the ticket that it has is done by others.
        assert summary["cancelled"] == 0
        assert summary["discarded"] in (3, 4)
        assert summary["virtual_seconds"] == pytest.approx(20.5)


def test_a_round_of_all_workers_takes_as_long_as_its_slowest_one_and_is_that_of_ordered_momentum(tmp_path: Path) -> None:
    options = (*ONE_SLOW, "train.max_iterations=40")
    mine = simulate(tmp_path / "m_sync", *options, "algorithm=m_sync")
    theirs = simulate(tmp_path / "sync", *options, "algorithm=ormo", "scheduler=sync", "train.lr_scaling=mean")
    assert mine["virtual_seconds"] == theirs["virtual_seconds"] == pytest.approx(50.0)
    assert mine["utilisation_per_worker"] == theirs["utilisation_per_worker"]
    same = ("iteration", "worker", "ticket", "stamp", "seconds")
    assert [[event[key] for key in same] for event in applied(tmp_path / "m_sync")] == [
        [event[key] for key in same] for event in applied(tmp_path / "sync")
    ]


@pytest.mark.parametrize("m", [1, 3, 5])
def test_a_round_that_cancels_lasts_for_the_m_th_shortest_of_all_workers_times(m: int, tmp_path: Path) -> None:
    options = (*EXPONENTIAL, "algorithm=m_sync", f"algorithm.m={m}", "algorithm.cancel=true")
    simulate(tmp_path, *options)
    draw, ends, now = times(*options), list[float](), 0.0
    for _ in range(300 // m - 5):  # in the last rounds there are fewer tickets than workers
        drawn = sorted(draw(worker) for worker in range(5))
        ends += [now + seconds for seconds in drawn[:m]]
        now += drawn[m - 1]
    assert [event["seconds"] for event in applied(tmp_path)][: len(ends)] == pytest.approx(ends, abs=1e-5)


@pytest.mark.parametrize("m", [1, 3, 5])
def test_a_round_that_does_not_cancel_goes_on_without_the_workers_that_are_late(m: int, tmp_path: Path) -> None:
    options = (*EXPONENTIAL, "algorithm=m_sync", f"algorithm.m={m}")
    simulate(tmp_path, *options)
    draw, ends, version, waiting = times(*options), list[float](), 0, list[int]()
    busy = [(draw(worker), worker, version) for worker in range(5)]
    heapq.heapify(busy)
    while len(ends) < 250:
        now, worker, taken_at = heapq.heappop(busy)
        if taken_at != version:
            heapq.heappush(busy, (now + draw(worker), worker, version))
            continue
        ends.append(now)
        waiting.append(worker)
        if len(waiting) == m:
            version += 1
            for other in waiting:
                heapq.heappush(busy, (now + draw(other), other, version))
            waiting.clear()
    assert [event["seconds"] for event in applied(tmp_path)][:250] == pytest.approx(ends, abs=1e-5)


def test_what_is_under_way_or_waits_for_the_server_is_cancelled_too(tmp_path: Path) -> None:
    # Three workers of 1 s; replies and pushes take 0.25 s, the server 0.2 s. Pushes are served at 1.7, 1.9 and 2.1 s: the first
    # two are a round of 1.9 s, and the third one's push, which waits, is cancelled. It has computed for its full second.
    options = ("workers=3", "runtime.compute_seconds=1.0", "runtime.latency_seconds=[0.25]", "runtime.service_seconds=0.2")
    summary = simulate(
        tmp_path, *options, "algorithm=m_sync", "algorithm.m=2", "algorithm.cancel=true", "train.max_iterations=4"
    )
    found = read_trace(tmp_path)[1]
    cancelled = [(event["worker"], event["seconds"]) for event in found if event["event"] == "cancel"]
    assert cancelled == [(2, 1.9)]
    assert summary["gradients_computed"] == 4
    assert summary["cancelled"] == 1
    # The server is busy with the cancelled push until 2.1 s. The second round begins at 1.9 s; it is served at 3.6 and 3.8 s.
    assert summary["virtual_seconds"] == pytest.approx(3.8)
    assert summary["utilisation_per_worker"] == pytest.approx({"0": 2 / 3.8, "1": 2 / 3.8, "2": 1 / 3.8})


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["m_sync algorithm.m=3", "m_sync algorithm.m=3 algorithm.cancel=true", "local_sgd"])
def test_rounds_are_resumed_and_replayed_to_the_bit(algorithm: str, tmp_path: Path) -> None:
    links = ("runtime.latency_seconds=[0.3,0.1]", "runtime.joins={5: 20.5}", "runtime.leaves={1: 31.5}")
    options = (*EXPONENTIAL, *links, *f"algorithm={algorithm}".split())
    whole = simulate(tmp_path / "whole", *options)
    assert replayed(tmp_path / "whole", tmp_path / "again") == whole["final_params_sha256"]
    simulate(tmp_path / "half", *options, "checkpoint.every=100", "checkpoint.keep=10")
    (half,) = [each for each in (tmp_path / "half" / "checkpoints").iterdir() if each.name.endswith("0100")]
    rest = simulate(tmp_path / "rest", *options, f"checkpoint.resume={half}")
    for key in ("final_params_sha256", "virtual_seconds", "utilisation_per_worker"):
        assert rest[key] == whole[key], key


@pytest.mark.parametrize("algorithm", ["local_sgd", "easgd"])
def test_local_steps_take_their_time(algorithm: str, tmp_path: Path) -> None:
    options = ("workers=4", "runtime.compute_seconds=0.5", "train.max_iterations=12", f"algorithm={algorithm}")
    summary = simulate(tmp_path, *options, "algorithm.local_steps=3")
    assert summary["virtual_seconds"] == pytest.approx(3 * 3 * 0.5), "three tickets of three steps in a row"


@pytest.mark.parametrize("cancel", [False, True])
def test_a_rule_from_outside_that_cancels_is_refused_with_prefetch(cancel: bool) -> None:
    rule = ("runtime=sim", "algorithm._target_=tests.unit.server.test_held_workers.Rounds", f"+algorithm.cancel={cancel}")
    if not cancel:
        compose([*rule, "worker.prefetch=1"])
        return
    with pytest.raises(ConfigError, match=r"^worker\.prefetch: got 1, expected 0 with algorithm=.*Rounds, which cancels what "):
        compose([*rule, "worker.prefetch=1"])


def test_a_simulation_whose_workers_all_leave_but_the_held_one_goes_on(tmp_path: Path) -> None:
    # Worker 0 brings its gradient at 1 s, and waits for the others, which take 10 s and leave after 2 s.
    slow = ("workers=2", "heterogeneity=one_slow", "heterogeneity.factor=10", "runtime.compute_seconds=1.0")
    summary = simulate(tmp_path, *slow, "algorithm=m_sync", "runtime.leaves={1: 2.0}", "train.max_iterations=3")
    assert summary["status"] == "completed"
    assert [event["seconds"] for event in applied(tmp_path)] == [1.0, 3.0, 4.0]


def test_edges_and_their_cloud_go_at_the_speed_of_the_slowest_worker_and_no_gradient_is_stale(tmp_path: Path) -> None:
    options = ("algorithm=hiermo", "algorithm.edge_rounds=2", "algorithm.local_steps=3", "train.max_iterations=40")
    summary = simulate(tmp_path, *ONE_SLOW, *options)
    # 5 rounds of the cloud, each 2 of the slow worker's tickets of 3 steps, of 5 s each.
    assert summary["virtual_seconds"] == pytest.approx(5 * 2 * 3 * 5.0)
    # A round of the cloud has 2 pushes of each of 4 workers.
    assert all(event["stamp"] >= event["iteration"] // 8 * 8 for event in applied(tmp_path))
    assert summary["delay_within_round"]


@pytest.mark.parametrize("algorithm", ["m_sync", "local_sgd", "ringleader", "hiermo"])
def test_rounds_refuse_to_divide_by_their_number_twice(algorithm: str) -> None:
    message = rf"^train\.lr_scaling: got mean, expected none with algorithm={algorithm}: .* mean .* already$"
    with pytest.raises(ConfigError, match=message):
        compose([f"algorithm={algorithm}", "train.lr_scaling=mean"])


def test_more_gradients_in_a_round_than_workers_are_refused_unless_workers_join(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("workers=2", "algorithm=m_sync", "algorithm.m=3", "train.max_iterations=8", "runtime.compute_seconds=1.0")
    with pytest.raises(
        ConfigError, match=r"^algorithm\.m: got 3 with workers=2, expected at most 2: a round has one gradient "
    ):
        simulate(tmp_path / "refused", *options)
    simulate(tmp_path / "grows", *options, "runtime.joins={2: 1.5}")
    assert "algorithm.m=3 is more than the 2 workers at the start" in caplog.text
    # Two workers make up the first round, of 1 s. The third one joins the second round, which it ends at 2.5 s.
    assert [event["seconds"] for event in applied(tmp_path / "grows")] == [1, 1, 2, 2, 2.5, 3.5, 3.5, 3.5]


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({}, True),
        ({"server": {"address": "127.0.0.1:29400"}}, False),
        ({"runtime": {"min_workers": 3}}, False),
        ({"algorithm": {"name": "m_sync", "m": 2}}, False),
        ({"algorithm": "m_sync"}, False),
        ({"algorithm": "ormo", "scheduler": {"name": "partial", "k": 3}}, True),
        ({"algorithm": "ormo", "scheduler": {"name": "partial", "k": 3}, "runtime": {"min_workers": 3}}, False),
        ({"algorithm": "ormo", "scheduler": {"name": "partial", "k": 3}, "checkpoint": {"resume": "earlier"}}, False),
        ({"algorithm": "ormo", "scheduler": {"name": "partial", "k": 2}}, False),
        ({"algorithm": "ormo", "scheduler": "partial", "workers": 1}, False),
    ],
)
def test_live_rounds_may_be_larger_where_further_workers_are_expected(values: dict[str, Any], refused: bool) -> None:
    config = parse_config({"workers": 2, "algorithm": {"name": "m_sync", "m": 3}, **values})
    message = (
        r"^algorithm\.m: .* null has" if "scheduler" not in values else r"^scheduler\.k: got 3 .* scheduler=sync has those of"
    )
    with pytest.raises(ConfigError, match=message) if refused else contextlib.nullcontext():
        check_rounds(config)


@pytest.mark.parametrize("algorithm", ["m_sync", "local_sgd"])
def test_rounds_refuse_prefetch(algorithm: str) -> None:
    refused = rf"^worker\.prefetch: got 1, expected 0 with algorithm={algorithm}: its rounds wait for all tickets, "
    with pytest.raises(ConfigError, match=refused):
        compose([f"algorithm={algorithm}", "worker.prefetch=1"])


def test_cancelling_is_refused_live_before_anything_starts(tmp_path: Path) -> None:
    refused = r"^runtime: got rpc, expected sim with algorithm=m_sync, which cancels what slow workers compute: a live worker "
    with pytest.raises(ConfigError, match=refused):
        train(["algorithm=m_sync", "algorithm.m=2", "algorithm.cancel=true"], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
