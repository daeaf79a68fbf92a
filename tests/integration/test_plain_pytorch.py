"""A run of one worker is plain PyTorch: models with unusual state end with the same weights, buffers, loss and accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from ormo_rpc import train
from ormo_rpc.config.parsing import load_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.job import Job
from ormo_rpc.seeding import generator, seed_for
from ormo_rpc.storage import checkpoint

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


def test_a_norm_whose_statistics_are_changed_outside_of_its_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"norm: its statistics were changed outside of its calls"):
        train({"runtime": "sim", "model": {"_target_": f"{MODELS}.FunctionalNorm"}}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def plain_pytorch(job: Job) -> tuple[nn.Module, float, float]:
    """Train with `torch.optim.SGD` on the batches of a job; return the model, and its loss and accuracy over the test set."""
    module, seed = job.model().module, job.config.seed
    module.train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=LR, momentum=MOMENTUM)
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
