"""The limit to the norm of a push: clipped to it or refused, in the core, in a run, and in its replay."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError, GradientTooLarge
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.validation import NormLimit, NormPolicy
from ormo_rpc.training import train
from tests.support.schedule import answer

CLIP, REFUSE = NormLimit(5.0), NormLimit(5.0, NormPolicy.refuse)
SIM = (
    *("runtime=sim", "logger=none", "model.hidden=8", "workers=3", "train.batch_size=128", "train.max_iterations=30"),
    "train.grad_norm_limit=0.5",
)


def server(guard: NormLimit | None, events: list[Event], dtype: torch.dtype = torch.float64) -> ParameterServer:
    start = torch.zeros(2, dtype=dtype)
    return build_server(
        params=start, num_workers=2, algorithm="asgd", lr=1.0, total_tickets=9, record=events.append, norm_limit=guard
    )


def pushed(guard: NormLimit | None, grad: Tensor) -> tuple[list[float], Event]:
    """``-w`` after one push, which is what was applied, and the event of it."""
    events: list[Event] = []
    made = server(guard, events, grad.dtype)
    before = grad.clone()
    made.receive(answer(made.start()[0], grad))
    assert torch.equal(grad, before), "the caller's tensor was changed"
    (event,) = [event for event in events if event.kind is Kind.apply]
    return (-made.params).tolist(), event


def test_a_larger_gradient_is_scaled_to_the_limit_and_the_event_says_so() -> None:
    applied, event = pushed(CLIP, torch.tensor([6.0, -8.0], dtype=torch.float64))
    assert applied == pytest.approx([3.0, -4.0], rel=1e-15)  # norm 10, limit 5: half of it
    assert float.fromhex(event.data["clipped_norm"]) == 10.0
    assert event.data["grad_sum"] == (-2.0).hex(), "the sum is evidence of what the worker computed"


@pytest.mark.parametrize("guard", [CLIP, REFUSE, NormLimit(5.0000001), None])
def test_a_gradient_within_the_limit_is_applied_unchanged(guard: NormLimit | None) -> None:
    applied, event = pushed(guard, torch.tensor([3.0, -4.0], dtype=torch.float64))
    assert applied == [3.0, -4.0]
    assert "clipped_norm" not in event.data


@pytest.mark.parametrize(("dtype", "huge"), [(torch.float32, 3e38), (torch.float64, 1e308)])
def test_a_norm_that_overflows_is_clipped(dtype: torch.dtype, huge: float) -> None:
    applied, event = pushed(CLIP, torch.tensor([huge, huge], dtype=dtype))
    assert applied == pytest.approx([5 / math.sqrt(2)] * 2, rel=1e-6)
    assert float.fromhex(event.data["clipped_norm"]) == pytest.approx(huge * math.sqrt(2), rel=1e-6)


def test_a_gradient_that_is_refused_is_settled_like_one_that_is_not_finite() -> None:
    events: list[Event] = []
    made = server(REFUSE, events)
    first, second = made.start()
    push = answer(first, torch.tensor([6.0, -8.0], dtype=torch.float64))
    text = (
        r"^push of worker 0 for ticket 0: gradient: got the norm 10, expected at most train\.grad_norm_limit=5; "
        r"lower the learning rate$"
    )
    rejected = made.validate(push).rejected
    assert type(rejected) is GradientTooLarge
    assert re.match(text, str(rejected))
    (reply,) = made.receive(push)
    assert reply.ticket == 2, "the sender gets other work"
    (reply,) = made.receive(answer(second, torch.zeros(2, dtype=torch.float64)))
    assert (reply.worker, reply.ticket) == (1, 0), "the ticket goes to the other one"
    (event,) = [event for event in events if event.kind is Kind.discard]
    assert event.data["reason"] == "not finite or too large"


def test_a_clipped_run_is_replayed_to_the_bit_and_is_another_run(tmp_path: Path) -> None:
    clipped = train(SIM, run_dir=tmp_path / "clipped")
    free = train(SIM[:-1], run_dir=tmp_path / "free")
    trace = (tmp_path / "clipped" / "trace.jsonl").read_text()
    assert trace.count("clipped_norm") > 0
    assert clipped["final_params_sha256"] != free["final_params_sha256"]
    again = train(["runtime=replay", f"replay.run={tmp_path / 'clipped'}"], run_dir=tmp_path / "again")
    assert again["identical"] is True
    assert again["final_params_sha256"] == clipped["final_params_sha256"]


def test_a_limit_that_every_gradient_exceeds_ends_a_refusing_run_as_diverged_which_replays(tmp_path: Path) -> None:
    options = (*SIM[:-1], "train.grad_norm_limit=1e-6", "train.grad_norm_policy=refuse")
    recorded = train(options, run_dir=tmp_path / "run")
    assert (recorded["status"], recorded["iterations"]) == ("diverged", 0)
    again = train(["runtime=replay", f"replay.run={tmp_path / 'run'}"], run_dir=tmp_path / "again")
    assert again["identical"] is True


def test_the_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"^train\.grad_norm_limit: got 0\.0, expected a finite number > 0$"):
        parse_config({"train": {"grad_norm_limit": 0}})
    with pytest.raises(ConfigError, match=r"^train\.grad_norm_policy: got 'ignore', expected one of clip, refuse$"):
        parse_config({"train": {"grad_norm_policy": "ignore"}})
    with pytest.raises(ValueError, match=r"^norm_limit: got the limit nan, expected a finite number > 0$"):
        server(NormLimit(math.nan), [])
    assert parse_config({}).train.norm_limit is None
    assert parse_config({"train": {"grad_norm_limit": 5, "grad_norm_policy": "refuse"}}).train.norm_limit == REFUSE
