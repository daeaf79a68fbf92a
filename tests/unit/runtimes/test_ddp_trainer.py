"""A single rank of ``runtime=ddp``, in this process, is a loop in plain PyTorch, to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset
from typing_extensions import override

from ormo_rpc.composing import compose
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.ddp.trainer import Trainer
from ormo_rpc.runtimes.job import Job
from tests.support.plain_rounds import plain_rounds

ALL = ["runtime=ddp", "workers=1", "logger=none", "train.max_iterations=12", "model.dropout=0.3"]


class HalfUsed(torch.nn.Linear):
    """A model one of whose parameters is never used."""

    def __init__(self) -> None:
        super().__init__(64, 10)
        self.idle = torch.nn.Parameter(torch.ones(3))

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.flatten(1))


@pytest.fixture(scope="module")
def group() -> Generator[None]:
    """This process as the only rank of torch's default process group."""
    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "words",
    [
        ["train.weight_decay=0.01", "train.warmup_epochs=0.1"],
        ["runtime.nesterov=true", "train.lr_schedule=cosine", "train.clip_norm=0.5"],
        ["runtime.shares=proportional"],
        ["heterogeneity=one_slow", "heterogeneity.factor=2"],
    ],
    ids=["decay", "nesterov, clipped", "by the hook", "hook, heterogeneity"],
)
def test_one_rank_is_plain_pytorch(words: list[str]) -> None:
    job = Job(compose([*ALL, *words]))
    trainer = Trainer(job, 0, 1)
    trainer.warm_up()
    for number in range(trainer.rounds.count):
        trainer.round(number)
    expected = plain_rounds(job, 1).state_dict()
    assert list(expected) == list(trainer.model.module.state_dict())
    for name, value in trainer.model.module.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.usefixtures("group")
def test_parameter_groups_and_parts_of_a_batch_are_those_of_the_worker() -> None:
    words = ["train.weight_decay=0.01", "train.decay_1d=false", "train.lr_factors={layers.1.*: 0.5}", "worker.accumulate=3"]
    job = Job(compose([*ALL, *words]))
    trainer = Trainer(job, 0, 1)
    for number in range(trainer.rounds.count):
        trainer.round(number)
    worker, server = job.worker(), job.server(lambda _: None, lambda: 0.0)
    (reply,) = server.start()
    while reply.ticket is not None:
        (reply,) = server.receive(worker.compute(reply))
    # The factor and the decay are in the gradient there, and of the optimizer here; ormo with one worker is heavy ball.
    torch.testing.assert_close(trainer.model.flat_params(), server.params, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("group")
def test_parameters_that_a_pass_does_not_use_are_named_with_the_key_that_allows_them() -> None:
    words = [word for word in ALL if not word.startswith("model.")]
    model = ["model=custom", f"model._target_={__name__}.HalfUsed"]
    for option in ("false", "true"):
        trainer = Trainer(Job(compose([*words, *model, f"runtime.find_unused_parameters={option}"])), 0, 1)
        trainer.round(0)
        refused = pytest.raises(ConfigError, match=r"model: got parameters that .* needs runtime\.find_unused")
        with contextlib.nullcontext() if option == "true" else refused:
            trainer.round(1)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("complete", [True, False], ids=["by DistributedDataParallel", "after the passes"])
def test_a_parameter_that_no_rank_uses_is_not_decayed_in_any_round(complete: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in ALL if not word.startswith("model.")]
    model = ["model=custom", f"model._target_={__name__}.HalfUsed", "runtime.find_unused_parameters=true"]
    trainer = Trainer(Job(compose([*words, *model, "train.weight_decay=0.1", "train.lr=0.1"])), 0, 1)
    part = trainer.rounds.part
    monkeypatch.setattr(trainer.rounds, "part", lambda number, rank: dataclasses.replace(part(number, rank), complete=complete))
    before = trainer.model.trainable["weight"].clone()
    trainer.round(0)
    assert trainer.model.trainable["idle"].tolist() == [1.0, 1.0, 1.0]
    assert not torch.equal(trainer.model.trainable["weight"], before)


class Alternating(HalfUsed):
    """Uses its further parameter in every other pass, the first one among them."""

    passes = 0

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        logits = super().forward(input)
        return logits + self.idle.sum() * torch.arange(10) if self.passes % 2 else logits


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("first", ["warm-up", "a round after the passes"])
def test_what_a_pass_of_its_own_uses_is_not_expected_next(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that DistributedDataParallel does not reduce leaves no mark on it."""
    words = [word for word in ALL if not word.startswith("model.")]
    model = ["model=custom", f"model._target_={__name__}.Alternating", "runtime.find_unused_parameters=true"]
    trainer = Trainer(Job(compose([*words, *model, "train.lr=0.1"])), 0, 1)
    part, rounds = trainer.rounds.part, 0
    if first == "warm-up":
        trainer.warm_up()
    else:
        monkeypatch.setattr(
            trainer.rounds, "part", lambda number, rank: dataclasses.replace(part(number, rank), complete=number != 0)
        )
        trainer.round(0)
        rounds = 1
    idle = trainer.model.trainable["idle"].clone()
    assert (idle.tolist() == [1.0] * 3) is (first == "warm-up"), "the step of a round that used it"
    trainer.round(rounds)
    assert torch.equal(trainer.model.trainable["idle"], idle), "no gradient, so no step"
    trainer.round(rounds + 1)
    assert not torch.equal(trainer.model.trainable["idle"], idle)


def without_targets() -> tuple[TensorDataset, TensorDataset]:
    half = TensorDataset(torch.ones(8, 1, 8, 8), torch.full((8,), -100))
    return half, half


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("complete", [True, False], ids=["by DistributedDataParallel", "after the passes"])
def test_a_rank_without_a_target_that_counts_is_refused_in_any_round(complete: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [f"dataset._target_={__name__}.without_targets"]
    trainer = Trainer(Job(compose([*ALL, *data])), 0, 1)
    part = trainer.rounds.part
    monkeypatch.setattr(trainer.rounds, "part", lambda number, rank: dataclasses.replace(part(number, rank), complete=complete))
    with pytest.raises(ValueError, match=r"^dataset: got ticket 0 without a target that counts, expected some in each: .*$"):
        trainer.round(0)
