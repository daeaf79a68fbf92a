"""Simulations whose workers are regions, each a server with workers of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typing_extensions import override

from ormo_rpc import ConfigError, train
from ormo_rpc.algorithms.easgd import EASGD
from ormo_rpc.composing import compose
from ormo_rpc.runtimes.job import Job
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import read_trace

HALOS = ("runtime=sim", "logger=none", "algorithm=halos", "train.lr=0.1")
QUADRATIC = (*HALOS, "runtime.gradient=quadratic", "runtime.dimension=20", "runtime.compute_seconds=0.025")
"""A ticket takes 0.1 s, as H = 4."""
REGIONS = ("workers=2", "algorithm.region_workers=4", "algorithm.exchange=12")
SLOW_LINK = "runtime.latency_seconds=[1.0]"


class Normalised(nn.Sequential):
    """A batch norm of the pixels, and a linear layer."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(64, momentum=0.3), nn.Linear(64, 10))

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.flatten(1))


class Faint(nn.Linear):
    """A linear layer whose outputs, and gradients, are small."""

    def __init__(self) -> None:
        super().__init__(64, 10)

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.flatten(1)) * 1e-6


def simulate(run_dir: Path, *overrides: str) -> dict[str, Any]:
    return train([*QUADRATIC, *overrides], run_dir=run_dir)


def applied(run_dir: Path) -> list[int]:
    """Return the tickets in the order in which they were applied."""
    return [event["ticket"] for event in read_trace(run_dir)[1] if event["event"] == "apply"]


def test_over_a_slow_link_regions_take_a_fraction_of_the_time_of_a_single_level(tmp_path: Path) -> None:
    # 240 tickets of H steps, 0.1 s each, over 8 workers. Flat: each of 30 in a row is there, 0.1 s, and back: 2.1 s.
    flat = simulate(tmp_path / "flat", "workers=8", "train.max_iterations=240", SLOW_LINK)
    assert flat["virtual_seconds"] == pytest.approx(30 * 2.1)
    # Two regions of 4: 10 exchanges each, of 12 pushes: there, 3 in a row of 0.1 s, and back.
    waiting = simulate(tmp_path / "regions", *REGIONS, "train.max_iterations=20", SLOW_LINK)
    assert waiting["virtual_seconds"] == pytest.approx(10 * 2.3)
    # With as many tickets ahead as the link takes they never wait: there, 10 times 0.3 s, and back.
    ahead = simulate(tmp_path / "ahead", *REGIONS, "train.max_iterations=20", SLOW_LINK, "worker.prefetch=9")
    assert ahead["virtual_seconds"] == pytest.approx(1 + 10 * 0.3 + 1)
    assert ahead["utilisation_per_worker"] == pytest.approx(dict.fromkeys(map(str, range(8)), 3 / 5))


def test_messages_within_a_region_take_their_time(tmp_path: Path) -> None:
    summary = simulate(tmp_path, *REGIONS, "train.max_iterations=4", "runtime.region_latency_seconds=0.05")
    assert summary["virtual_seconds"] == pytest.approx(2 * 3 * (0.05 + 0.1 + 0.05))


def test_the_tickets_of_a_region_that_dies_are_done_by_others_once(tmp_path: Path) -> None:
    summary = simulate(tmp_path, *REGIONS, "train.max_iterations=12", "runtime.leaves={1: 0.5}", "runtime.joins={2: 1.0}")
    assert sorted(applied(tmp_path)) == list(range(12))
    assert summary["status"] == "completed"
    assert summary["pushes_per_worker"]["1"] == 1


def test_one_that_joins_is_a_region_of_its_own(tmp_path: Path) -> None:
    # One of four workers: 12 pushes in 0.3 s. From 0.6 s on there are two, which take 0.3 s for two tickets.
    options = ("workers=1", *REGIONS[1:], "train.max_iterations=8", "runtime.joins={1: 0.6}")
    summary = simulate(tmp_path, *options)
    assert summary["virtual_seconds"] == pytest.approx(0.6 + 3 * 0.3)
    assert summary["pushes_per_worker"] == {"0": 5, "1": 3}
    # Local workers 0 to 3 have computed all the time, and the others since they have joined.
    assert summary["utilisation_per_worker"] == pytest.approx(dict.fromkeys(map(str, range(8)), 1.0))


@pytest.mark.slow
def test_regions_learn_as_regions_on_one_server_do(tmp_path: Path) -> None:
    digits = (*HALOS, "train.epochs=12", "train.batch_size=8")
    apart = train([*digits, "workers=2", "algorithm.region_workers=3"], run_dir=tmp_path / "apart")
    together = train([*digits, "workers=6"], run_dir=tmp_path / "together")
    assert apart["test_accuracy"] == pytest.approx(together["test_accuracy"], abs=0.03)


@pytest.mark.parametrize(("algorithm", "most"), [("halos", "exchange"), ("hiermo", "edge_rounds")])
def test_statistics_of_batch_norms_count_each_batch_of_a_region(algorithm: str, most: str, tmp_path: Path) -> None:
    # One worker takes the tickets in order, and what comes into the first layer does not hang on the parameters.
    words = ("runtime=sim", "logger=none", "workers=1", f"algorithm={algorithm}", "algorithm.region_workers=1")
    model = ("model=custom", f"model._target_={__name__}.Normalised", "train.batch_size=20")
    words = (*words, *model, f"algorithm.{most}=3", "algorithm.local_steps=2", "train.epochs=2")
    train(words, run_dir=tmp_path)
    job = Job(compose(words))
    expected = torch.nn.BatchNorm1d(64, momentum=0.3)
    for number in range(job.total_tickets):
        for _, batch in job.epochs.batches(number, 6):
            inputs, _ = job.data.train.batch(batch, None)
            expected(inputs.flatten(1))
    found = checkpoint.read(checkpoint.locate(tmp_path), checkpoint.SERVER)["buffers"]
    assert found["0.num_batches_tracked"] == expected.num_batches_tracked
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(found[f"0.{name}"], getattr(expected, name))


def test_losses_in_float16_are_scaled_in_a_region_too(tmp_path: Path) -> None:
    # The gradients of this loss are some 1e-7: without a scale nearly all of them are zero in float16.
    words = (*HALOS[:3], "workers=2", "algorithm.region_workers=2", "algorithm.exchange=4", "algorithm.local_steps=1")
    model = ("model=custom", f"model._target_={__name__}.Faint", "train.lr=100000", "train.epochs=1")
    moved = dict[str, torch.Tensor]()
    for precision in ("none", "fp16"):
        train([*words, *model, f"worker.autocast={precision}"], run_dir=tmp_path / precision)
        moved[precision] = checkpoint.read(checkpoint.locate(tmp_path / precision), checkpoint.SERVER)["params"]
    torch.testing.assert_close(moved["fp16"], moved["none"], rtol=0.1, atol=0.01)


@pytest.mark.parametrize(
    ("regions", "number", "rounds", "pull"),
    [
        (1, 3, 2, 0.05),
        (2, 2, 1, 0.0),  # samples go to other edges than on one server, which then does not matter
    ],
)
def test_edges_with_servers_of_their_own_train_as_those_of_one_server(
    regions: int, number: int, rounds: int, pull: float, tmp_path: Path
) -> None:
    rule = ("algorithm=hiermo", "algorithm.local_steps=2", f"algorithm.edge_rounds={rounds}", f"algorithm.edge_momentum={pull}")
    digits = ("runtime=sim", "logger=none", "train.lr=0.05", "train.batch_size=8", "model.dropout=0.2", *rule)
    tickets, parts = 6 * regions, rounds * number
    options = (f"workers={regions}", f"algorithm.region_workers={number}", f"train.max_iterations={tickets}")
    apart = train([*digits, *options], run_dir=tmp_path / "apart")
    options = (f"workers={regions * number}", f"algorithm.regions={regions}", f"train.max_iterations={tickets * parts}")
    together = train([*digits, *options], run_dir=tmp_path / "together")
    assert apart["virtual_seconds"] == pytest.approx(together["virtual_seconds"])
    found, expected = (
        checkpoint.read(checkpoint.locate(tmp_path / name), checkpoint.SERVER)["params"] for name in ("apart", "together")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # a push is a difference, rounded in float32


def test_a_resumed_simulation_begins_its_regions_anew_and_does_the_rest_once(tmp_path: Path) -> None:
    first = simulate(tmp_path / "first", *REGIONS, "train.max_iterations=30", "train.max_seconds=2.0")
    assert 0 < first["iterations"] < 30
    resume = f"checkpoint.resume={tmp_path / 'first'}"
    rest = simulate(tmp_path / "rest", *REGIONS, "train.max_iterations=30", resume)
    assert (rest["status"], rest["iterations"]) == ("completed", 30)
    assert sorted(applied(tmp_path / "first") + applied(tmp_path / "rest")) == list(range(30))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime=ddp", r"^runtime: got ddp, expected "),
        ("wire.dtype=bf16", r"^wire, compression: got bf16, expected exact with algorithm\.region_workers$"),
    ],
)
def test_regions_with_servers_of_their_own_are_refused_where_they_cannot_be(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train([*HALOS, "algorithm.region_workers=2", override], run_dir=tmp_path)


@dataclass(kw_only=True)
class Regional(EASGD):
    """An algorithm that is no HALoS, and whose workers are regions all the same."""

    @property
    @override
    def workers_are_regions(self) -> bool:
        return True


@pytest.mark.parametrize("runtime", ["sim", "rpc"])
def test_workers_of_other_algorithms_are_no_regions(tmp_path: Path, runtime: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^algorithm: got .*Regional, whose workers_are_regions is true, expected halos, hiermo, "
    ):
        train([f"algorithm._target_={__name__}.Regional", f"runtime={runtime}"], run_dir=tmp_path)


def test_a_live_region_has_no_tickets_ahead(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^worker\.prefetch: got 1, expected 0 with algorithm\.region_workers: a live"):
        train([*HALOS, "runtime=rpc", "algorithm.region_workers=2", "worker.prefetch=1"], run_dir=tmp_path)


def test_their_runs_are_not_replayed(tmp_path: Path) -> None:
    simulate(tmp_path / "run", *REGIONS, "train.max_iterations=4")
    with pytest.raises(ConfigError, match=r"had regions with servers of their own \(algorithm\.region_workers\), expected"):
        train(["runtime=replay", f"replay.run={tmp_path / 'run'}", "logger=none"], run_dir=tmp_path / "replay")
