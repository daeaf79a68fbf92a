"""A scheduler from outside of the package: it may draw and keep state, and its capabilities decide what it runs with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from ormo_rpc import build_server, train
from ormo_rpc.algorithms.ormo import OrMo
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.messages import Push
from ormo_rpc.options import option, parts, register
from ormo_rpc.schedulers import Scheduler, incompatibility
from ormo_rpc.schedulers.ssp import SSP
from tests.support.contract import same
from tests.support.registry import temporary_parts


@dataclass(kw_only=True)
class RandomRelease(Scheduler):
    """Each blocked worker is released with probability p, all of them where nobody holds a ticket."""

    p: float = option(0.5, "probability of a release", valid=lambda v: 0 < v <= 1, expected="a number in (0, 1]")

    @override
    def init(self, generator: torch.Generator) -> None:
        super().init(generator)
        self.released: list[int] = []

    @override
    def due(self, blocked: Collection[int], holding: Collection[int]) -> list[int]:
        draws = torch.rand(len(blocked), generator=self.generator).tolist()
        # Its state matters too: every third release in a row is refused.
        due = [worker for worker, draw in zip(blocked, draws, strict=True) if draw < self.p and len(self.released) % 3 < 2]
        self.released += due or [-1]
        return due if holding else list(blocked)

    @override
    def state_dict(self) -> Mapping[str, Any]:
        return {"released": list(self.released)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.released = list(state["released"])


@dataclass(kw_only=True)
class Pairs(Scheduler):
    """Workers are answered in pairs."""

    BARRIER = True

    @override
    def due(self, blocked: Collection[int], holding: Collection[int]) -> list[int]:
        return list(blocked) if len(blocked) >= 2 or not holding else []


def config(**changes: Any) -> dict[str, Any]:
    return {
        "workers": 4,
        "runtime": {"name": "sim"},
        "heterogeneity": {"name": "exponential"},
        "scheduler": RandomRelease(p=0.4),
        "dataset": {"name": "digits"},
        "model": {"hidden": 4},
        "train": {"max_iterations": 60},
        "logger": "none",
        **changes,
    }


@pytest.mark.slow
def test_a_random_scheduler_simulates_resumes_and_replays_to_the_bit(tmp_path: Path) -> None:
    saving = {"every": 17, "keep": 100}
    whole = train(config(checkpoint=saving), run_dir=tmp_path / "whole")
    again = train(config(), run_dir=tmp_path / "again")
    assert again["final_params_sha256"] == whole["final_params_sha256"]
    assert train(config(seed=1), run_dir=tmp_path / "other")["final_params_sha256"] != whole["final_params_sha256"]
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(checkpoints) >= 3
    for number, path in enumerate(checkpoints[:-1]):
        resumed = train(config(checkpoint={"resume": str(path)}), run_dir=tmp_path / f"resumed{number}")
        assert resumed["final_params_sha256"] == whole["final_params_sha256"]
    for run in ("whole", "resumed0"):
        replay = {"runtime": {"name": "replay"}, "replay": {"run": str(tmp_path / run)}, "logger": "none"}
        assert train(replay, run_dir=tmp_path / f"{run} replayed")["identical"] is True


def test_the_draws_of_a_scheduler_are_part_of_the_state() -> None:
    def server(seed: int) -> Any:
        return build_server(scheduler=RandomRelease(), params=torch.zeros(2), num_workers=3, seed=seed)

    first, second = server(1), server(2)
    held = list(first.start())
    for _ in range(7):
        reply = held.pop(0)
        held += first.receive(Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=torch.ones(2)))
    second.load_state_dict(first.state_dict(replies=True))
    while held:
        reply = held.pop(0)
        push = Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=torch.ones(2))
        replies, copied = first.receive(push), second.receive(push)
        assert [(each.worker, each.ticket) for each in replies] == [(each.worker, each.ticket) for each in copied]
        assert same(first.state_dict(), second.state_dict())
        held += replies
        if first.iteration > 40:
            break


@pytest.mark.parametrize("algorithm", ["rennala", "ringmaster", "staleness_aware"])
def test_a_new_barrier_is_refused_by_capability_and_not_by_name(algorithm: str) -> None:
    expected = f"scheduler: got 'Pairs', which {algorithm} does not run under: "
    with pytest.raises(ValueError, match=f"^{expected}"):
        build_server(algorithm=algorithm, scheduler=Pairs(), params=torch.zeros(2), num_workers=2)
    with pytest.raises(ConfigError, match=f"^{expected}"):
        parse_config({"algorithm": algorithm, "scheduler": Pairs})


def test_a_scheduler_that_claims_nothing_holds_workers_back_but_is_no_barrier() -> None:
    algorithms = parts("algorithm")
    refused = [name for name, algorithm in algorithms.items() if incompatibility(algorithm, RandomRelease) is not None]
    assert sorted(refused) == ["hiermo", "local_sgd", "m_sync", "rennala", "ringmaster", "ringmaster_lmo"]


def test_build_server_takes_objects_and_does_not_change_them() -> None:
    algorithm, scheduler = OrMo(momentum_correction=True), SSP(s=2)
    server = build_server(algorithm=algorithm, scheduler=scheduler, params=torch.ones(2), num_workers=2)
    assert (server.algorithm, server.scheduler) == (algorithm, scheduler)
    assert server.algorithm is not algorithm
    assert server.scheduler is not scheduler
    server.start()
    assert vars(algorithm) == {"momentum_correction": True}
    assert vars(scheduler) == {"s": 2}
    by_name = build_server(scheduler="ssp", momentum_correction=True, s=2, params=torch.ones(2), num_workers=2)
    by_name.start()
    assert same(by_name.state_dict(), server.state_dict())


def test_options_beside_an_object_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^build_server: got the unknown option 's', expected one of \['momentum_correction'\]"
    ):
        build_server(scheduler=SSP(), s=2, params=torch.ones(2), num_workers=2)
    with pytest.raises(ValueError, match=r"^algorithm: got a SSP, expected a name or an object of a subclass of Algorithm$"):
        build_server(algorithm=SSP(), params=torch.ones(2), num_workers=2)  # pyright: ignore[reportArgumentType] # the wrong kind


@dataclass(kw_only=True)
class Fixed(Scheduler):
    """The same answer always."""

    answer: list[int] = option([], "the workers")

    @override
    def due(self, blocked: Collection[int], holding: Collection[int]) -> list[int]:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], r"due returned nobody although no worker computes, expected at least one of \[0, 1\]"),
        ([7], r"due returned \[7\], expected workers of \[0, 1\], each once"),
        ([0, 0], r"due returned \[0, 0\], expected workers of \[0, 1\], each once"),
    ],
)
def test_a_scheduler_that_breaks_its_contract_ends_the_run_with_the_reason(answer: list[int], message: str) -> None:
    server = build_server(
        algorithm="asgd", scheduler=Fixed(answer=answer), params=torch.zeros(1), num_workers=2, lr=0.1, momentum=0.9
    )
    with pytest.raises(RunFailed, match=f"^scheduler Fixed: {message}$"):
        server.start()


def test_a_part_that_a_test_registers_is_removed_afterwards() -> None:
    with temporary_parts("scheduler"):

        @register("pairs")
        @dataclass(kw_only=True)
        class Registered(Pairs):
            """Registered for this test."""

        assert parts("scheduler")["pairs"] is Registered
        assert build_server(scheduler="pairs", params=torch.ones(2), num_workers=2).scheduler.name == "pairs"
    assert "pairs" not in parts("scheduler")
