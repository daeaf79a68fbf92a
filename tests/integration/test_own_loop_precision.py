"""Loops of one's own in lower precision: `GradScaler` to the bit, several dtypes, compiled models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

import ormo_rpc
from ormo_rpc.errors import ConfigError, LoopMisused
from ormo_rpc.own_loop.loop import JoinedWorker
from ormo_rpc.seeding import seed_for
from ormo_rpc.storage import checkpoint
from tests.support.dtypes import Homogeneous, Masters
from tests.support.own_fp16 import batch, model, run

TOTAL = 30
LR, MOMENTUM, HUGE, INTERVAL = 2**-4, 0.5, 2.0**30, 5
SGD = ("algorithm=naive", f"train.lr={LR}", f"train.momentum={MOMENTUM}", "workers=1", "logger=none")
FP16 = ("worker.autocast=fp16", f"worker.loss_scale={HUGE}", f"worker.loss_scale_interval={INTERVAL}")


def by_norm(net: nn.Module) -> None:
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)


def by_value(net: nn.Module) -> None:
    nn.utils.clip_grad_value_(net.parameters(), 0.001)  # of an overflow it makes a finite number


@pytest.mark.parametrize("clip", [None, by_norm, by_value])
def test_a_loop_in_float16_is_grad_scaler_to_the_bit(clip: Callable[[nn.Module], None] | None, tmp_path: Path) -> None:
    found, summary = run(*SGD, *FP16, run_dir=str(tmp_path / "run"), total=TOTAL, clip=clip)
    assert summary["status"] == "completed"
    expected = model()
    optimizer = torch.optim.SGD(expected.parameters(), lr=LR, momentum=MOMENTUM)
    scaler = torch.amp.GradScaler("cpu", init_scale=HUGE, growth_interval=INTERVAL)
    ticket = skipped = 0
    while ticket < TOTAL:
        torch.manual_seed(seed_for(0, "forward", ticket))
        inputs, targets = batch(ticket)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(expected(inputs), targets)
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            clip(expected)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        overflowed = scaler.get_scale() < before
        skipped += overflowed
        ticket += not overflowed
    assert summary["discarded"] == skipped > 10
    for name, parameter in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name


def test_a_loss_that_was_not_scaled_is_refused_with_the_users_line(tmp_path: Path) -> None:
    message = (
        r"^.*own_fp16\.py:\d+: got gradients of a loss that was not scaled, expected worker\.scaled\(loss\)\.backward\(\), .*"
    )
    with pytest.raises(LoopMisused, match=message):
        run(*SGD, *FP16, run_dir=str(tmp_path / "run"), total=TOTAL, scales=False)


def test_a_round_without_a_gradient_needs_no_scaled_loss(tmp_path: Path) -> None:
    net, decay, total = model(), 0.5, 3
    worker = ormo_rpc.join(
        net,
        *SGD,
        "worker.autocast=fp16",
        f"train.weight_decay={decay}",
        "train.momentum=0",
        total_tickets=total,
        run_dir=tmp_path / "run",
    )
    for _ in worker:
        worker.push()
    for name, parameter in model().named_parameters():
        torch.testing.assert_close(net.get_parameter(name), parameter * (1 - LR * decay) ** total)


def twice(worker: JoinedWorker, loss: torch.Tensor) -> None:
    worker.scaled(loss).backward()
    worker.unscale()
    worker.unscale()


def before_a_pass(worker: JoinedWorker, loss: torch.Tensor) -> None:
    worker.unscale()
    worker.scaled(loss).backward()


def not_scaled(worker: JoinedWorker, loss: torch.Tensor) -> None:
    loss.backward()
    worker.unscale()


def behind_push(worker: JoinedWorker, loss: torch.Tensor) -> None:
    worker.scaled(loss).backward()
    worker.push()
    worker.unscale()


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (twice, r"unscale\(\) is called again, expected once, behind the last backward\(\) of a round"),
        (before_a_pass, r"scaled\(\) is called behind unscale\(\), expected before it: .*"),
        (not_scaled, r"got gradients of a loss that was not scaled, expected worker\.scaled\(loss\)\.backward\(\), .*"),
        (behind_push, r"unscale\(\) is called without a ticket to be pushed, expected between backward\(\) and push\(\)"),
    ],
)
def test_gradients_that_cannot_be_unscaled_are_refused_with_the_users_line(
    misuse: Callable[[JoinedWorker, torch.Tensor], None], message: str, tmp_path: Path
) -> None:
    def train() -> None:
        net = model()
        worker = ormo_rpc.join(net, *SGD, "worker.autocast=fp16", total_tickets=2, run_dir=tmp_path / "run")
        for work in worker:
            inputs, targets = batch(work.ticket)
            misuse(worker, F.cross_entropy(net(inputs), targets))

    with pytest.raises(LoopMisused, match=rf"^.*test_own_loop_precision\.py:\d+: {message}$"):
        train()


def test_gradients_of_float16_itself_are_not_unscaled(tmp_path: Path) -> None:
    net = nn.Linear(64, 10).half()
    worker = ormo_rpc.join(net, *SGD, "worker.autocast=fp16", total_tickets=2, run_dir=tmp_path / "run")
    rounds = iter(worker)  # which end where nobody holds them
    inputs, targets = batch(next(rounds).ticket)
    worker.scaled(F.cross_entropy(net(inputs.half()).float(), targets)).backward()
    with pytest.raises(
        LoopMisused, match=r"^.*: unscale\(\): the gradient of weight is float16, .*, expected float32; train\.clip_norm .*$"
    ):
        worker.unscale()


def test_a_key_that_a_script_does_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^worker\.autocast: got bf16 in a loop of your own, expected none, or fp16 .*$"):
        run(*SGD, "worker.autocast=bf16", run_dir=str(tmp_path / "run"), total=TOTAL)


def test_a_loop_with_parameters_of_16_bits_has_masters_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Homogeneous()
    torch.manual_seed(0)
    twin = Homogeneous()
    worker = ormo_rpc.join(net, *SGD, total_tickets=TOTAL, run_dir=tmp_path / "run")
    masters = Masters(twin, LR, MOMENTUM)
    for work in worker:
        inputs, targets = batch(work.ticket)
        loss = F.cross_entropy(net(inputs), targets)
        loss.backward()
        torch.manual_seed(work.seed)
        masters.step(masters.gradients(lambda: F.cross_entropy(twin(inputs), targets).backward()))  # noqa: B023 - called at once
        worker.push(loss)
    params = checkpoint.read(checkpoint.locate(tmp_path / "run"), "server.pt")["params"]
    assert torch.equal(params, torch.cat([each.flatten() for each in masters.values.values()]))
    for name, parameter in net.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, masters.values[name].bfloat16())


def test_a_compiled_model_is_trained_under_its_own_names(tmp_path: Path) -> None:
    def train(*, compiled: bool, run_dir: Path) -> nn.Module:
        net = model()
        forward: Any = torch.compile(net, backend="eager") if compiled else net
        worker = ormo_rpc.join(forward, *SGD, total_tickets=5, run_dir=run_dir)
        for work in worker:
            inputs, targets = batch(work.ticket)
            loss = F.cross_entropy(forward(inputs), targets)
            loss.backward()
            worker.push(loss)
        return net

    plain, found = train(compiled=False, run_dir=tmp_path / "plain"), train(compiled=True, run_dir=tmp_path / "compiled")
    exported = checkpoint.read(checkpoint.locate(tmp_path / "compiled"), "model.pt")
    assert list(exported) == list(model().state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
        assert torch.equal(exported[name], value)
