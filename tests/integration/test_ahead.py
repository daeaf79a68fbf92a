"""A source of gradients that begins them before they are asked for: what a simulation records and trains is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typing_extensions import override

from ormo_rpc import train
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.simulator import jobs
from ormo_rpc.runtimes.simulator.synthetic import Quadratic

SIM = (
    "runtime=sim",
    "runtime.gradient=quadratic",
    "runtime.dimension=8",
    "logger=none",
    "workers=5",
    "train.lr=0.05",
    "train.max_iterations=80",
    "heterogeneity=gamma",
)
LEVELS = ("algorithm=halos", "workers=2", "algorithm.region_workers=3", "algorithm.exchange=4")
CHANGES = ("runtime.leaves={1: 1.0, 3: 2.2}", "runtime.joins={1: 1.5, 7: 0.7}")
RUNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "links": ("runtime.latency_seconds=[0.3,0.01]", "runtime.service_seconds=0.05"),
    "members": (*CHANGES, "runtime.latency_seconds=[0.2]"),
    "cancelled": ("algorithm=m_sync", "algorithm.m=3", "algorithm.cancel=true"),
    "prefetch": ("worker.prefetch=2", "runtime.latency_seconds=[0.3]"),
    "regions": (*LEVELS, "train.max_iterations=20", "runtime.leaves={1: 1.5}", "runtime.joins={2: 2.0}"),
}


class Ahead(Quadratic):
    """Computes what it is to begin at once, and keeps it until it is asked for."""

    AHEAD: ClassVar[int] = 2
    sources: ClassVar[list[Ahead]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept: dict[tuple[int, int | None, int, int], Push] = {}
        self.begun = self.in_advance = self.computed = 0
        self.sources.append(self)

    @override
    def begin(self, *replies: Reply) -> None:
        assert 1 <= len(replies) <= 1 + self.AHEAD
        self.in_advance += _key(replies[0]) in self.kept
        for reply in replies:
            if _key(reply) not in self.kept:
                push = super().compute(reply)
                self.kept[_key(reply)] = replace(push, grad=push.grad.clone())
                self.begun += 1

    @override
    def compute(self, reply: Reply) -> Push:
        self.computed += 1
        return self.kept.pop(_key(reply))


def _key(reply: Reply) -> tuple[int, int | None, int, int]:
    return (reply.worker, reply.ticket, reply.stamp, reply.params.data_ptr())


@pytest.mark.parametrize("name", RUNS)
def test_what_is_begun_ahead_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*SIM, *RUNS[name]]
    plain = train(options, run_dir=tmp_path / "plain")
    Ahead.sources.clear()
    monkeypatch.setattr(jobs, "Quadratic", Ahead)
    ahead = train(options, run_dir=tmp_path / "ahead")
    assert ahead["final_params_sha256"] == plain["final_params_sha256"]
    assert _trace(tmp_path / "ahead") == _trace(tmp_path / "plain")
    source = max(Ahead.sources, key=lambda each: each.computed)
    assert source.in_advance > 0.4 * source.computed
    # Each one that is cancelled, or whose worker has left, may have been begun.
    lost = plain["cancelled"] + plain["gradients_computed"] - plain["iterations"]
    assert source.begun - source.computed <= lost + source.AHEAD + 8 * (name in ("members", "regions"))


def _trace(run_dir: Path) -> list[str]:
    return (run_dir / "trace.jsonl").read_text().splitlines()[1:]
