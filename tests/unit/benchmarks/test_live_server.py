"""Reports on the live server: its rate against K, and its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import live_scale, server_memory
from benchmarks.peers.measurement import Job, measurement
from tests.unit.benchmarks.made_up import content, sample


def measured(parameters: int, workers: int, rate: float, server: float, of_workers: float, held: float) -> dict[str, Any]:
    job = Job(parameters=parameters, workers=workers, seconds=1.0)
    return {
        **measurement("ormo_rpc", job, [workers / rate] * 10, 10 * server, 1, [1]),
        "workers_cpu_seconds_per_update": of_workers,
        "lock_held_seconds_per_update": held,
        "lock_wait_seconds_per_update": 1e-6,
        "delay_mean": workers - 1.0,
        "delay_99_percent": workers,
        "spread_of_workers": 0.0,
    }


@pytest.mark.slow  # draws with matplotlib
def test_the_knee_is_the_smallest_good_k_and_the_report_names_the_bottleneck(tmp_path: Path) -> None:
    # The best rate is 1,000; K = 4 reaches 950 of it. There the server takes 0.95 cores and the workers 0.95: 1.9 of 2.
    rates = {1: 400.0, 2: 800.0, 4: 950.0, 8: 1000.0}
    measurements = [measured(1000, workers, rate, 1e-3, 1e-3, 5e-4) for workers, rate in reversed(rates.items())]
    made = {**content(measurements, {}), "transport": "auto"}
    (found,) = live_scale.groups(made).values()
    assert [each["workers"] for each in found] == [1, 2, 4, 8]
    at = live_scale.knee(found)
    assert at["workers"] == 4
    assert live_scale.utilization(at) == pytest.approx({"lock": 0.475, "server": 0.95, "all": 1.9})
    assert live_scale.bottleneck(at, 2).startswith(
        "the cores of this machine (lock held 48% of the time, server 0.95 and all 1.90"
    )
    assert live_scale.bottleneck(at, 8).startswith("the server's one interpreter")
    assert live_scale.bottleneck(measured(50, 1, 100.0, 1e-3, 0.0, 9.9e-3), 2).startswith("the server's lock (lock held 99%")
    assert live_scale.bottleneck(measured(50, 1, 100.0, 1e-3, 0.0, 1e-3), 2).startswith(
        "waiting for one another, as no resource"
    )
    live_scale.write(made, tmp_path)
    assert (
        "* D = 1,000: the knee is at K = 4 with 950 updates/s, bound by the cores" in (tmp_path / "live_scale.md").read_text()
    )
    assert (tmp_path / "live_scale.png").stat().st_size > 1000
    live_scale.write({**made, "transport": "gloo"}, tmp_path)
    assert "transport gloo" in (tmp_path / "live_scale-gloo.md").read_text()


def test_growth_of_memory_is_distinguished_from_fluctuation() -> None:
    # A start that fills caches, then 7 bytes per update, and 50 bytes more at every other sample.
    samples = [sample(n, server_bytes_now=1000 + min(n, 50) * 10 + 7 * n + 50 * (n // 10 % 2)) for n in range(0, 1001, 10)]
    # The highest are at 190 and 990: 1000 + 500 + 7 n + 50 bytes. Their tenths have 150 and 950 updates on average.
    expected = {"early_bytes": 2880, "late_bytes": 8480, "bytes_per_update": 7}
    assert server_memory.growth(samples) == pytest.approx(expected, rel=0.02)
    with pytest.raises(
        ValueError, match=r"^got 1 samples of 5 updates, expected some in the second tenth and some in the last$"
    ):
        server_memory.growth([sample(5)])


def test_the_memory_of_a_server_is_compared_with_its_budget() -> None:
    # 16 + 4 * 3 snapshots + 4 * 2 workers = 36
    assert server_memory.budget(2) == 36
    assert server_memory.peak([sample(1, server_bytes=5), sample(2, server_bytes=9)]) == 9
    peak = {"parameters": 1000, "workers": 2, "peak_bytes": 2_036_000, "budget": 36}
    made = {
        **content([], {}),
        "peaks": [{**peak, "bytes_per_parameter": 36.0}, {**peak, "bytes_per_parameter": 36.5}],
        "growth": {
            "parameters": 10,
            "workers": 2,
            "updates": 1000,
            "bytes_per_update": 101.0,
            "early_bytes": 1e6,
            "late_bytes": 2e6,
        },
    }
    assert [row[-3:] for row in server_memory.peak_rows(made)[1:]] == [("36.0", "36", "yes"), ("36.5", "36", "no")]
    assert (
        "1,000 updates at D = 10, K = 2: growth,\n101.0 bytes per update (1.0 MB early, 2.0 MB in the end)"
        in server_memory.as_text(made)
    )
