"""A run of one worker is plain PyTorch: models with unusual state end with the same weights, buffers, loss and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from ormo_rpc import train
from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import load_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.job import Job
from ormo_rpc.seeding import generator, seed_for
from ormo_rpc.storage import checkpoint
from tests.support.plain_rounds import plain_rounds

MODELS = "tests.support.odd_models"
ITERATIONS = 30
LR, MOMENTUM = 0.05, 0.9
CASES = {
    name: {"model": {"_target_": f"{MODELS}.{name}"}}
    for name in (
        *("FrozenNorm", "SwitchedNorm", "SometimesFrozenNorm", "StochasticDepth", "UnusedNorm", "NormCalledTwice"),
        *("NormCalledInBothModes", "CumulativeNorm", "SharedNorm", "CheckpointedNorm", "OldSpectralNorm"),
        *("SpectralNorm", "InstanceNorm", "AverageInPlace", "AverageByData", "AverageReassigned", "Counters", "BatchRenorm"),
        *("FrozenRandomLayer", "RandomBuffer", "Differentiating", "DropoutNet", "ZeroedInside", "GradientReplaced"),
    )
} | {
    "Segmentation": {"model": {"_target_": f"{MODELS}.Segmentation"}, "dataset": {"_target_": f"{MODELS}.pixels"}},
    "NextToken": {"model": {"_target_": f"{MODELS}.NextToken"}, "dataset": {"_target_": f"{MODELS}.tokens"}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_one_worker_is_plain_pytorch(case: str, tmp_path: Path) -> None:
    summary = train(
        {
            "workers": 1,
            "algorithm": "ormo",
            "runtime": "sim",
            "logger": "none",
            "train": {"max_iterations": ITERATIONS, "batch_size": 32, "lr": LR, "momentum": MOMENTUM},
            **CASES[case],
        },
        run_dir=tmp_path / "run",
    )
    module, loss, accuracy = plain_pytorch(Job(load_config(tmp_path / "run" / "config.yaml")))
    exported: dict[str, Tensor] = checkpoint.read(checkpoint.locate(tmp_path / "run"), "model.pt")
    expected = module.state_dict()
    assert list(exported) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert summary["test_loss"] == pytest.approx(loss, rel=1e-3)
    assert summary["test_accuracy"] == pytest.approx(accuracy, abs=0.005)


@pytest.mark.parametrize("algorithm", ["rennala", "fedbuff"])
@pytest.mark.parametrize("model", ["BatchRenorm", "CumulativeNorm", "SpectralNorm"])
def test_collected_gradients_are_those_of_a_plain_loop(algorithm: str, model: str, tmp_path: Path) -> None:
    shared = (f"model._target_={MODELS}.{model}", "train.max_iterations=24", "train.momentum=0", "train.weight_decay=0.01")
    collect = {"rennala": "algorithm.batch=4", "fedbuff": "algorithm.buffer=4"}[algorithm]
    run = ("runtime=sim", "workers=1", "logger=none", f"algorithm={algorithm}", collect)
    train([*shared, *run], run_dir=tmp_path / "run")
    exported: dict[str, Tensor] = checkpoint.read(checkpoint.locate(tmp_path / "run"), "model.pt")
    expected = plain_rounds(Job(compose([*shared, "runtime=ddp", "workers=4"])), 4).state_dict()
    assert list(exported) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("algorithm", "optimizer"),
    [("asgd", "SGD"), ("adamw", "AdamW"), ("adamw_da", "AdamW"), ("ormo_adamw", "AdamW")],
)
def test_parameter_groups_are_those_of_torchs_optimizer(algorithm: str, optimizer: str, tmp_path: Path) -> None:
    # Biases do not decay, nor does the first weight, which learns at half the rate, the last bias at a quarter.
    names = ["layers.1.weight", "layers.1.bias", "layers.4.weight", "layers.4.bias"]
    decays, factors = (0.0, 0.0, 0.1, 0.0), (0.5, 1.0, 1.0, 0.25)
    groups = {"weight_decay": 0.1, "decay_1d": False, "no_decay": ["layers.1.*"]}
    rates = {"lr_factors": {"*.weight": 0.5, "layers.4.weight": 2.0, "layers.4.bias": 0.25}}
    train(
        {
            "workers": 1,
            "algorithm": algorithm,
            "runtime": "sim",
            "logger": "none",
            "train": {"max_iterations": ITERATIONS, "batch_size": 32, "lr": 0.01, "momentum": MOMENTUM, **groups, **rates},
        },
        run_dir=tmp_path / "run",
    )
    job = Job(load_config(tmp_path / "run" / "config.yaml"))
    exported: dict[str, Tensor] = checkpoint.read(checkpoint.locate(tmp_path / "run"), "model.pt")

    def made(module: nn.Module) -> torch.optim.Optimizer:
        parameters = dict(module.named_parameters())
        assert list(parameters) == names
        each = zip(names, decays, factors, strict=True)
        own = [{"params": [parameters[name]], "weight_decay": decay, "lr": 0.01 * factor} for name, decay, factor in each]
        return torch.optim.AdamW(own, betas=(MOMENTUM, 0.999)) if optimizer == "AdamW" else torch.optim.SGD(own)

    module, _, _ = plain_pytorch(job, made)
    for name, value in module.state_dict().items():
        assert torch.equal(exported[name], value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": {"no_decay": ["*.gamma"]}},
            r"train\.no_decay: got '\*\.gamma', which matches no trainable parameter, expected a pattern of names such as "
            r"layers\.1\.weight, layers\.1\.bias, .*",
        ),
        (
            {"train": {"lr_factors": {"*.bias": 2.0}}, "algorithm": "dc_asgd"},
            r"train\.lr_factors: got \{'\*\.bias': 2\.0\}, expected none with algorithm=dc_asgd: its compensation .*",
        ),
        (
            {"train": {"lr_factors": {"*": 2.0}, "max_iterations": 3}, "runtime": {"name": "sim", "gradient": "quadratic"}},
            r"train\.lr_factors: got \{'\*': 2\.0\}, expected none: the quadratic has no named parameters",
        ),
    ],
    ids=["matches none", "not linear", "no names"],
)
def test_groups_that_cannot_be_are_refused_before_anything_starts(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"\A{message}\Z"):
        train({"runtime": "sim", "logger": "none", **options}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_norm_whose_statistics_are_changed_outside_of_its_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"norm: its statistics were changed outside of its calls"):
        train({"runtime": "sim", "model": {"_target_": f"{MODELS}.FunctionalNorm"}}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def heavy_ball(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=LR, momentum=MOMENTUM)


def plain_pytorch(job: Job, make: Callable[[nn.Module], torch.optim.Optimizer] = heavy_ball) -> tuple[nn.Module, float, float]:
    """Train with an optimizer of torch on the batches of a job; return the model, and its loss and accuracy on the test set."""
    module, seed = job.model().module, job.config.seed
    module.train()
    optimizer = make(module)
    for ticket in range(ITERATIONS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, "forward", ticket))
            inputs, targets = job.data.train.batch(job.epochs.indices(ticket), generator(seed, "augment", ticket))
            optimizer.zero_grad(set_to_none=False)  # a layer that a pass skips has the gradient zero, and its momentum goes on
            F.cross_entropy(module(inputs), targets).backward()
        optimizer.step()
    module.eval()
    inputs, targets = job.data.test.batch(torch.arange(len(job.data.test)), None)
    logits: Any = module(inputs).detach()
    counted = targets != -100
    correct = (logits.argmax(1) == targets)[counted]
    return module, F.cross_entropy(logits, targets).item(), correct.float().mean().item()
