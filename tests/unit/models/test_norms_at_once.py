"""The statistics of all batch norms, looked at together, as where a GPU would be waited for at each."""

from __future__ import annotations

import pytest
import torch

from ormo_rpc.messages import no_buffers
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.models.norm_calls import NormCalls, are_expected
from ormo_rpc.models.passes import Passes


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


def passed(module: torch.nn.Sequential) -> list[NormCalls]:
    """The norms' calls after one pass."""
    model = FlatModel(module)
    passes = Passes(model)
    passes.begin(no_buffers())
    passes.begin_pass()
    module(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    return passes._norms  # pyright: ignore[reportPrivateUsage] # what is tested looks at several of them


def test_statistics_of_calls_are_expected() -> None:
    norms = passed(net())
    assert are_expected(norms)
    assert [len(norm.report(checked=True)) for norm in norms] == [3, 3]
    assert not are_expected([]), "there is nothing to save"


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_those_that_were_changed_otherwise_are_not(name: str) -> None:
    module = net()
    norms = passed(module)
    getattr(module[3], name).add_(1)
    assert not are_expected(norms)
    setattr(module[3], name, None)
    assert not are_expected(norms)
