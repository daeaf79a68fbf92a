"""Benchmarks of the server's step, at the smallest size."""

from __future__ import annotations

import pytest
import torch

from benchmarks import memory_bandwidth, server_step
from ormo_rpc.options import parts


def test_the_step_of_every_algorithm_is_measured() -> None:
    rows = server_step.measure(10, 1, list(parts("algorithm")))
    assert [row["algorithm"] for row in rows] == list(parts("algorithm"))
    assert all(row["copies"] > 0 for row in rows)


@pytest.mark.slow
def test_the_fused_step_is_measured_beside_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_bandwidth, "SECONDS", 1e-4)
    rates = memory_bandwidth.measure(1000, 2, torch.get_num_threads())
    assert {"copy", "axpy", "sum", "OrMo step, torch"} <= rates.keys()
    assert all(len(each) == 2 and min(each) > 0 for each in rates.values())
