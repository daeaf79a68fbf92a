"""Arguments of `build_server`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ormo_rpc.options import parts
from tests.support.trial import begin, tensor


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"algorithm": "sgd"}, r"algorithm: got 'sgd', expected one of adamw, .*ormo.*"),
        ({"algorithm": "base"}, r"algorithm: got 'base', expected one of adamw, .*ormo.*"),
        ({"scheduler": "random"}, f"scheduler: got 'random', expected one of {', '.join(parts('scheduler'))}"),
        ({"lr": -0.1}, r"lr: got -0\.1, expected a finite number >= 0 or a function of the iteration"),
        ({"lr": math.nan}, r"lr: got nan, expected a finite number >= 0 or a function of the iteration"),
        ({"momentum": 1.0}, r"momentum: got 1\.0, expected a number in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum: got -0\.1, expected a number in \[0, 1\)"),
        ({"momentum": math.nan}, r"momentum: got nan, expected a number in \[0, 1\)"),
        ({"num_workers": 0}, r"num_workers: got 0, expected at least 1"),
        ({"tickets": 0}, r"total_tickets: got 0, expected at least 1, or None for no end"),
        (
            {"params": torch.zeros(2, 2)},
            r"params: got shape \(2, 2\) of torch\.float32, expected one dimension of float32 or float64",
        ),
        ({"params": torch.zeros(0)}, r"params: got shape \(0,\) of torch\.float32, expected one dimension of .*"),
        ({"params": torch.zeros(2).half()}, r"params: got shape \(2,\) of torch\.float16, expected one dimension of .*"),
        ({"params": tensor(0, math.inf)}, r"params: got NaN or infinity, expected finite numbers"),
        (
            {"treshold": 3},
            r"build_server: got the unknown option 'treshold', expected one of \['momentum_correction'\] for ormo, async",
        ),
        ({"name": "x"}, r"build_server: got the unknown option 'name', expected one of .*"),
        ({"algorithm": "asgd", "momentum_correction": True}, r"build_server: got the unknown option 'momentum_correction', .*"),
        ({"algorithm": "ormo_da", "threshold": -1}, r"algorithm\.threshold: got -1, expected a whole number >= 0, and .*"),
        ({"algorithm": "ormo_da", "threshold": 2.5}, r"algorithm\.threshold: got 2\.5, expected a whole number >= 0, and .*"),
        ({"algorithm": "ormo_da", "smoothness": 0.0}, r"algorithm\.smoothness: got 0\.0, expected a number > 0"),
        (
            {"algorithm": "ormo_da", "rule": "drip"},
            r"algorithm\.rule: got 'drip', expected one of ormo, mishchenko, koloskova, drop",
        ),
    ],
    ids=str,
)
def test_build_server_refuses_invalid_arguments(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        begin(**settings)


def test_an_enum_option_may_be_given_by_name() -> None:
    # Threshold 0: the gradient of worker 1 has the delay 1, which "drop" refuses and the default algorithm would not.
    trial = begin(algorithm="ormo_da", rule="drop", threshold=0)
    trial.push(0)
    trial.push(1)
    assert (trial.server.iteration, trial.kinds[-2:]) == (1, ["discard", "reissue"])
