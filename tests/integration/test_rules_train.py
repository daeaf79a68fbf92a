"""Every algorithm of the newer ones trains the digits to 95% in seconds, simulated, at a learning rate that suits it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ormo_rpc import train

pytestmark = pytest.mark.slow

SETTINGS: dict[str, tuple[str, ...]] = {
    "m_sync": ("train.lr=0.1",),
    "local_sgd": ("train.lr=0.1",),
    "ormo_la": ("train.lr=0.01",),
    "ormo_la_da": ("train.lr=0.01",),
    "mla": ("train.lr=0.1",),
    "heloco": ("train.lr=0.1",),
    "halos": ("train.lr=0.1",),
    "hiermo": ("train.lr=0.05",),
    "ringleader": ("train.lr=0.2", "heterogeneity=none"),  # a cycle waits for the slowest
    "ringmaster_lmo": ("train.lr=0.01",),
}


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_it_trains(algorithm: str, tmp_path: Path) -> None:
    summary = train(
        [
            "dataset=digits",
            "runtime=sim",
            "logger=none",
            f"algorithm={algorithm}",
            "workers=4",
            "heterogeneity=one_slow",
            "train.epochs=8",
            "train.batch_size=16",
            *SETTINGS[algorithm],
        ],
        run_dir=tmp_path / "run",
    )
    assert summary["status"] == "completed"
    assert summary["test_accuracy"] >= 0.95
