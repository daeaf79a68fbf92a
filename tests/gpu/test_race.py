"""Runs of the race on the GPU, as the experiment on look-aheads of nets makes them: where they are on the CPU."""

from __future__ import annotations

import pytest
import torch

from experiments.on_device import ON_DEVICE
from experiments.race.runs import simulate

RUN = ("dataset=digits", "dataset.validation=0.2", "workers=4", "algorithm=ormo_la", "train.batch_size=64", "train.lr=0.01")


@pytest.mark.parametrize(
    ("net", "split"), [(("model=cnn",), "test"), (("model=resnet20", "worker.autocast=bf16"), "validation")]
)
def test_a_run_has_the_times_and_about_the_accuracies_of_the_cpu(net: tuple[str, ...], split: str, gpu: torch.device) -> None:
    del gpu
    options = (*RUN, *net, "heterogeneity=exponential", "train.max_iterations=24", "evaluate.every=8")
    there = simulate((*options, *ON_DEVICE["cuda"]), split, 100)
    here = simulate((*options, "worker.device=cpu"), split, 100)
    assert (there.status, there.iterations, there.seconds) == (here.status, here.iterations, here.seconds)
    assert there.accuracy == pytest.approx(here.accuracy, abs=0.1)
