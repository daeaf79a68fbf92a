"""Synthetic gradients against their formula."""

from __future__ import annotations

import pytest
import torch

from ormo_rpc.composing import compose
from ormo_rpc.messages import Reply
from ormo_rpc.runtimes.simulator.jobs import SyntheticJob

QUADRATIC = ("runtime=sim", "runtime.gradient=quadratic", "runtime.dimension=5", "runtime.noise=0", "train.max_iterations=9")


@pytest.mark.parametrize("algorithm", ["ormo", "adamw"])
def test_a_gradient_is_clipped_and_then_decayed_unless_the_rule_decays_itself(algorithm: str) -> None:
    job = SyntheticJob(compose([*QUADRATIC, f"algorithm={algorithm}", "train.clip_norm=0.5", "train.weight_decay=0.1"]))
    source, params = job.source(), torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    reply = Reply(worker=0, ticket=0, stamp=0, params=params, lr=0.1, steps=1, incarnation=0)
    expected = source.curvature * params
    expected *= 0.5 / expected.norm()
    if algorithm == "ormo":
        expected += 0.1 * params
    torch.testing.assert_close(source.compute(reply).grad, expected)
