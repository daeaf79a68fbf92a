"""Algorithms and schedulers from outside of the package that forget a part of their state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from ormo_rpc import Algorithm, ConfigError, PushContext, Scheduler, train
from ormo_rpc.options import parts
from ormo_rpc.schedulers import incompatibility
from ormo_rpc.schedulers.async_ import Async
from ormo_rpc.server.build import build_server, check_resumable


@dataclass(kw_only=True)
class HeavyBall(Algorithm):
    """Has attributes of every kind; those in ``SAVED`` are in its state."""

    SAVED: ClassVar[tuple[str, ...]] = ("u", "count", "of")

    @override
    def init(self, params: Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.u = self.zeros()
        self.scratch = self.zeros()
        self.mask = torch.ones_like(params)
        self.count = 0
        self.of: dict[int, Tensor] = {}

    @override
    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:
        self.count += 1
        torch.mul(grad, self.mask, out=self.scratch)
        self.u.mul_(self.momentum).add_(self.scratch, alpha=lr / self.count)
        self.of[context.worker] = grad + self.of.get(context.worker, 0)
        self.params.sub_(self.u).sub_(self.of[context.worker], alpha=0.1 * lr)

    @override
    def state_dict(self) -> Mapping[str, Tensor | int | float]:
        saved: dict[str, Any] = {name: getattr(self, name) for name in self.SAVED if name != "of"}
        return {**saved, **(self.by_worker("of", self.of) if "of" in self.SAVED else {})}


class ForgetsTensor(HeavyBall):
    """Lacks the momentum."""

    SAVED = ("count", "of")


class ForgetsNumber(HeavyBall):
    """Lacks the count."""

    SAVED = ("u", "of")


class ForgetsWorkers(HeavyBall):
    """Lacks what is kept for each worker."""

    SAVED = ("u", "count")


class ForgetsAll(HeavyBall):
    """Lacks everything."""

    SAVED = ()


class LateTensor(HeavyBall):
    """Sets a tensor in a step only."""

    @override
    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:
        super().step(grad + getattr(self, "last", 0), lr, context)
        self.last = grad


class Draws(HeavyBall):
    """Draws from a generator of its own."""

    @override
    def init(self, params: Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.chance = torch.Generator().manual_seed(0)

    @override
    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:
        super().step(grad + torch.rand(grad.shape, generator=self.chance), lr, context)


class OtherName(HeavyBall):
    """Saves under a name that is no attribute, and loads nothing of it."""

    @override
    def state_dict(self) -> Mapping[str, Tensor | int | float]:
        return {"doubled": 2 * self.u, "count": self.count, **self.by_worker("of", self.of)}


class LoadsAnother(HeavyBall):
    """Loads a name that it does not save."""

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.u.copy_(state["velocity"])


class NeedsItsDimension(ForgetsTensor):
    """Cannot be tried on a small vector."""

    @override
    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:
        assert grad.numel() == 1000
        super().step(grad, lr, context)


class EverySecond(Scheduler):
    """Holds every second worker back for one event."""

    def __init__(self) -> None:
        self.turn = 0

    @override
    def due(self, blocked: Collection[int], holding: Collection[int]) -> list[int]:
        self.turn += 1
        return list(blocked) if self.turn % 2 or not holding else []


FORGETFUL = [
    (ForgetsTensor, "leaves out u"),
    (ForgetsNumber, "leaves out count"),
    (ForgetsWorkers, "leaves out of"),
    (ForgetsAll, "leaves out u, count, of"),
    (LateTensor, "leaves out last"),
    (Draws, "leaves out chance"),
    (OtherName, "leaves out u"),
    (LoadsAnother, "cannot be loaded: KeyError: 'velocity'"),
]


def message(part: type[Any], fault: str) -> str:
    return (
        rf"^{part.PATH}: the state_dict of {part.__name__} {fault}; expected all that its next steps depend on, "
        "as a run that is resumed would go on with other numbers$"
    )


@pytest.mark.parametrize(("algorithm", "fault"), FORGETFUL, ids=lambda each: getattr(each, "__name__", ""))
def test_a_forgetful_algorithm_is_refused_before_it_is_first_saved(algorithm: type[Algorithm], fault: str) -> None:
    server = build_server(algorithm=algorithm(), params=torch.zeros(3), num_workers=2)
    server.start()
    for _ in range(2):
        with pytest.raises(ValueError, match=message(algorithm, fault)):
            server.state_dict()


@pytest.mark.parametrize("algorithm", [HeavyBall, NeedsItsDimension])
def test_constants_scratch_memory_and_what_cannot_be_tried_are_no_fault(algorithm: type[Algorithm]) -> None:
    server = build_server(algorithm=algorithm(), params=torch.zeros(1000), num_workers=2)
    server.start()
    assert server.state_dict()["algorithm"] == algorithm.__name__


def test_a_forgetful_scheduler_is_refused() -> None:
    server = build_server(algorithm="asgd", scheduler=EverySecond(), params=torch.zeros(3), num_workers=2)
    server.start()
    with pytest.raises(ValueError, match=message(EverySecond, "leaves out turn")):
        server.state_dict()


@pytest.mark.parametrize("name", parts("algorithm"))
def test_the_algorithms_of_the_package_pass_the_trial(name: str) -> None:
    check_resumable(parts("algorithm")[name](), Async())


@pytest.mark.parametrize("name", parts("scheduler"))
def test_the_schedulers_of_the_package_pass_the_trial(name: str) -> None:
    scheduler = parts("scheduler")[name]
    assert incompatibility(parts("algorithm")["ormo"], scheduler) is None
    check_resumable(parts("algorithm")["ormo"](), scheduler())


@pytest.mark.parametrize("runtime", ["sim", "rpc"])
def test_a_run_with_a_forgetful_algorithm_is_refused_before_anything_starts(runtime: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message(ForgetsTensor, "leaves out u")):
        train({"algorithm": ForgetsTensor(), "runtime": {"name": runtime}}, run_dir=tmp_path / "run")
