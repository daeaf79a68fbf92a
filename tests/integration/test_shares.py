"""Simulated synchronous rounds whose samples are divided by speed: times in closed form, and the updates of equal shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ormo_rpc import ConfigError, train

QUADRATIC = ("runtime=sim", "runtime.gradient=quadratic", "runtime.dimension=5", "train.lr=0.01", "logger=none")
SYNC = ("algorithm=ormo", "scheduler=sync", "train.lr_scaling=mean")


@pytest.mark.parametrize(
    ("heterogeneity", "workers", "equal", "proportional"),
    [
        # 10 rounds of 0.1 s x the slowest worker's factor; or of 0.1 s x K / (the sum of 1 / factor), with whole samples.
        (("half_slow", "heterogeneity.factor=3"), 4, 3.0, 4 / (2 + 2 / 3)),
        (("one_slow", "heterogeneity.factor=4", "train.batch_size=13"), 4, 4.0, 4 / (3 + 1 / 4)),
        (("none",), 3, 1.0, 1.0),
        # 40 samples at speeds 1 and 1/10: 36.36 and 3.64, so 36 and 4: the slow one needs 10 x 4 / 20 of 0.1 s.
        (("one_slow", "train.batch_size=20"), 2, 10.0, 2.0),
    ],
)
def test_a_round_takes_as_long_as_the_sum_of_the_speeds_allows(
    heterogeneity: tuple[str, ...], workers: int, equal: float, proportional: float, tmp_path: Path
) -> None:
    keys = (*QUADRATIC, *SYNC, f"workers={workers}", f"train.max_iterations={10 * workers}")
    keys = (*keys, "heterogeneity=" + heterogeneity[0], *heterogeneity[1:])
    runs = {
        shares: train([*keys, f"runtime.shares={shares}"], run_dir=tmp_path / shares) for shares in ("equal", "proportional")
    }
    assert runs["equal"]["virtual_seconds"] == pytest.approx(equal)
    assert runs["proportional"]["virtual_seconds"] == pytest.approx(proportional)
    assert runs["equal"]["final_params_sha256"] == runs["proportional"]["final_params_sha256"]
    again = train(["runtime=replay", f"replay.run={tmp_path / 'proportional'}", "logger=none"], run_dir=tmp_path / "again")
    assert again["identical"] is True


def test_short_rounds_are_divided_by_what_is_in_them(tmp_path: Path) -> None:
    # 1,437 samples are 7 tickets of 200 and one of 37. At speeds 1, 1 and 1/4 three tickets, 600 samples, are 267, 267 and 66:
    # 4 x 66 is less than 267. The round of tickets 6 to 8 has 437 samples, 194, 194 and 49, and 4 x 49 = 196 is the longest.
    keys = (
        "runtime=sim",
        "logger=none",
        "workers=3",
        "train.batch_size=200",
        "heterogeneity=one_slow",
        "heterogeneity.factor=4",
    )
    rule = (*SYNC, "runtime.shares=proportional", "runtime.compute_seconds=1.0")
    summary = train([*keys, *rule, "train.epochs=2", "train.max_iterations=10"], run_dir=tmp_path / "run")
    # The last round has one ticket, whose 200 samples all divide: 89, 89, 22, and 89 is the longest.
    assert summary["virtual_seconds"] == pytest.approx((2 * 267 + 196 + 89) / 200)


HALF_SLOW = (*QUADRATIC, *SYNC, "workers=4", "heterogeneity=half_slow", "runtime.shares=proportional")


def test_a_run_goes_on_after_whole_rounds(tmp_path: Path) -> None:
    train([*HALF_SLOW, "train.max_iterations=12"], run_dir=tmp_path / "first")
    whole = train([*HALF_SLOW, "train.max_iterations=22"], run_dir=tmp_path / "whole")
    words = [*HALF_SLOW, "train.max_iterations=22", f"checkpoint.resume={tmp_path / 'first'}"]
    resumed = train(words, run_dir=tmp_path / "again")
    assert resumed["virtual_seconds"] == pytest.approx(whole["virtual_seconds"] - 3 * 0.15)  # the first three rounds


def test_rounds_are_not_counted_on_after_a_short_one(tmp_path: Path) -> None:
    train([*HALF_SLOW, "train.max_iterations=10"], run_dir=tmp_path / "first")
    words = [*HALF_SLOW, "train.max_iterations=22", f"checkpoint.resume={tmp_path / 'first'}"]
    with pytest.raises(ConfigError, match=r"^checkpoint\.resume: got .* at iteration 10, expected a multiple of workers=4"):
        train(words, run_dir=tmp_path / "again")


def test_m_sync_of_all_workers_has_the_times_and_the_updates_of_the_mean_of_a_round(tmp_path: Path) -> None:
    keys = (*QUADRATIC, "workers=4", "train.max_iterations=40", "heterogeneity=half_slow", "heterogeneity.factor=3")
    runs = [
        train([*keys, *rule, "runtime.shares=proportional"], run_dir=tmp_path / name)
        for name, rule in {"ormo": SYNC, "m_sync": ("algorithm=m_sync",)}.items()
    ]
    assert [run["virtual_seconds"] for run in runs] == pytest.approx([4 / (2 + 2 / 3)] * 2)
    equal = train([*keys, "algorithm=m_sync"], run_dir=tmp_path / "equal")
    assert equal["final_params_sha256"] == runs[1]["final_params_sha256"]
    ormo, m_sync = (torch.load(Path(run["checkpoint"]) / "model.pt")["x"] for run in runs)
    torch.testing.assert_close(ormo, m_sync, rtol=1e-5, atol=1e-6)


def test_random_times_have_equal_shares(tmp_path: Path) -> None:
    keys = (*QUADRATIC, *SYNC, "workers=3", "train.max_iterations=30", "heterogeneity=exponential")
    runs = [train([*keys, f"runtime.shares={shares}"], run_dir=tmp_path / shares) for shares in ("equal", "proportional")]
    assert runs[0]["virtual_seconds"] == runs[1]["virtual_seconds"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("scheduler=async",), r"got proportional with algorithm=ormo scheduler=async, expected equal: only the samples"),
        (("scheduler=partial",), r"got proportional with algorithm=ormo scheduler=partial, expected equal"),
        (("algorithm=m_sync", "algorithm.m=3"), r"got proportional with algorithm=m_sync scheduler=async, expected equal"),
        (("algorithm=local_sgd",), r"got proportional with algorithm=local_sgd scheduler=async, expected equal"),
        (("scheduler=sync", "algorithm=orlomo"), r"got proportional with algorithm=orlomo scheduler=sync, expected equal"),
        (
            ("scheduler=sync", "runtime.leaves={0: 1.0}"),
            r"got proportional with runtime.joins or runtime.leaves, expected equal",
        ),
    ],
)
def test_what_has_no_rounds_of_all_workers_cannot_divide_them(keys: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^runtime\.shares: {message}"):
        train([*QUADRATIC, "train.max_iterations=4", *keys, "runtime.shares=proportional"], run_dir=tmp_path / "run")
