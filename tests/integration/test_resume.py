"""Resumed simulations end with the bits of uninterrupted ones."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc import ConfigError, RunFailed, train
from ormo_rpc.algorithms._momentum import StepMomentum
from ormo_rpc.options import parts
from ormo_rpc.runtimes.session import Session
from ormo_rpc.schedulers import incompatibility
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.checkpoint import complete
from ormo_rpc.storage.run_directory import read_trace

QUADRATIC: dict[str, Any] = {
    "runtime": {"name": "sim", "gradient": "quadratic", "dimension": 6},
    "logger": {"name": "none", "progress": False},
    "heterogeneity": {"name": "gamma"},
    "train": {"lr": 0.001, "max_iterations": 70},
    "workers": 4,
}


def changed(base: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a configuration with more values in its sections."""
    return {
        **base,
        **{key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in more.items()},
    }


ALLOWED = {
    algorithm: [name for name, scheduler in parts("scheduler").items() if incompatibility(part, scheduler) is None]
    for algorithm, part in parts("algorithm").items()
}
PAIRS = [(algorithm, allowed[number % len(allowed)]) for number, (algorithm, allowed) in enumerate(ALLOWED.items())]
"""Each algorithm with one of its schedulers, in turn: the contract of algorithms continues a saved state under all of them."""
EVERY = {"every": 7, "keep": 100}
OF_THIS_MACHINE = set(
    "wall_seconds start_seconds end_seconds step_seconds evaluation_seconds checkpoint updates_per_second".split()
)
"""Entries of a summary that depend on the machine."""


def changes_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of a trace without checkpoints."""
    return [event for event in read_trace(run_dir)[1] if event["event"] != "checkpoint"]


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in OF_THIS_MACHINE}


def check_resumed(run_dir: Path, whole: dict[str, Any], config: dict[str, Any], source: Path, again: Path) -> int:
    """Resume from a checkpoint, compare with the uninterrupted run, and return the iteration of the checkpoint."""
    resumed = train(changed(config, checkpoint={"resume": str(source)}), run_dir=again)
    at = checkpoint.iteration_of(source)
    rest, all_events = changes_of(again), changes_of(run_dir)
    assert rest == all_events[len(all_events) - len(rest) :]
    assert [event["iteration"] for event in rest if event["event"] == "apply"] == list(range(at, whole["iterations"]))
    assert figures(resumed) == figures(whole)
    return at


@pytest.mark.parametrize(("algorithm", "scheduler"), PAIRS)
def test_an_interrupted_and_resumed_simulation_ends_with_the_same_bits(algorithm: str, scheduler: str, tmp_path: Path) -> None:
    config = changed(QUADRATIC, algorithm={"name": algorithm}, scheduler={"name": scheduler}, checkpoint=EVERY)
    whole = train(config, run_dir=tmp_path / "whole")
    *sources, last = complete(tmp_path / "whole")
    assert checkpoint.iteration_of(last) == whole["iterations"]
    assert len(sources) >= 2
    for number, source in enumerate((sources[0], sources[-1])):
        check_resumed(tmp_path / "whole", whole, config, source, tmp_path / str(number))


@pytest.mark.parametrize("algorithm", [name for name, part in parts("algorithm").items() if issubclass(part, StepMomentum)])
def test_a_corrected_momentum_is_resumed_and_replayed_in_the_midst_of_a_schedule(algorithm: str, tmp_path: Path) -> None:
    corrected = {"name": algorithm, "momentum_correction": True}
    train_options = {"lr_schedule": "cosine", "warmup_epochs": 0.1}
    config = changed(QUADRATIC, algorithm=corrected, train=train_options, checkpoint=EVERY)
    whole = train(config, run_dir=tmp_path / "whole")
    source = complete(tmp_path / "whole")[3]
    check_resumed(tmp_path / "whole", whole, config, source, tmp_path / "again")
    again = train(["runtime=replay", f"replay.run={tmp_path / 'again'}", "logger=none"], run_dir=tmp_path / "replayed")
    assert (again["identical"], again["final_params_sha256"]) == (True, whole["final_params_sha256"])
    other = train({**config, "algorithm": {"name": algorithm}}, run_dir=tmp_path / "other")
    assert other["final_params_sha256"] != whole["final_params_sha256"]


def test_a_schedule_of_the_users_goes_on_where_it_was_and_is_replayed(tmp_path: Path) -> None:
    schedule = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", "T_0": 13}
    config = changed(QUADRATIC, train={"lr_schedule": schedule}, checkpoint=EVERY)
    whole = train(config, run_dir=tmp_path / "whole")
    rates = {event["iteration"]: event["eta"] for event in changes_of(tmp_path / "whole") if event["event"] == "apply"}
    # Half a cosine over 13 iterations, again and again; at the seventh of one it is (1 + cos(7 pi / 13)) / 2 of the base.
    base = rates[0]
    assert [rates[t] / base for t in (13, 26, 7, 20)] == pytest.approx([1, 1, *[(1 + math.cos(7 * math.pi / 13)) / 2] * 2])
    check_resumed(tmp_path / "whole", whole, config, complete(tmp_path / "whole")[3], tmp_path / "again")
    again = train(["runtime=replay", f"replay.run={tmp_path / 'again'}", "logger=none"], run_dir=tmp_path / "replayed")
    assert (again["identical"], again["final_params_sha256"]) == (True, whole["final_params_sha256"])


def test_a_schedule_that_is_too_short_is_refused_before_anything_starts(tmp_path: Path) -> None:
    schedule = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.01, "total_steps": 20, "cycle_momentum": False}
    with pytest.raises(
        ConfigError, match=r"^train\.lr_schedule: .*OneCycleLR, iteration 21 of 70: ValueError: Tried to step 21 "
    ):
        train(changed(QUADRATIC, train={"lr_schedule": schedule}), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_joins_leaves_links_and_real_gradients_resume_exactly(tmp_path: Path) -> None:
    config = {
        "runtime": {
            "name": "sim",
            "joins": {7: 0.9, 8: 2.5},
            "leaves": {1: 1.7},
            "latency_seconds": [0.01, 0.2],
            "service_seconds": 0.02,
        },
        "logger": QUADRATIC["logger"],
        "heterogeneity": {"name": "gamma"},
        "model": {"hidden": 4, "dropout": 0.3},
        "train": {"max_iterations": 80},
        "workers": 3,
        "algorithm": {"name": "dc_asgd"},
        "checkpoint": {"every": 9, "keep": 100},
    }
    whole = train(config, run_dir=tmp_path / "whole")
    assert {event["event"] for event in changes_of(tmp_path / "whole")} >= {"join", "leave", "reissue"}
    *sources, _ = complete(tmp_path / "whole")
    places = [check_resumed(tmp_path / "whole", whole, config, s, tmp_path / s.name) for s in sources]
    assert len(places) >= 3
    again = train(["runtime=replay", f"replay.run={tmp_path / sources[1].name}", "logger=none"], run_dir=tmp_path / "replayed")
    assert again["identical"] is True


def test_resuming_twice_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = changed(QUADRATIC, checkpoint=EVERY)
    whole = train(config, run_dir=tmp_path / "whole")
    first = complete(tmp_path / "whole")[0]
    train(changed(config, checkpoint={"resume": str(first)}), run_dir=tmp_path / "second")
    check_resumed(tmp_path / "whole", whole, config, complete(tmp_path / "second")[0], tmp_path / "third")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"workers": 6}, "workers: got 6, expected 4"),
        ({"worker": {"prefetch": 1}}, r"worker\.prefetch: got 1, expected 0"),
        ({"runtime": {"joins": {9: 1.0}}}, r"runtime\.joins: got \{9: 1\.0\}, expected \{\}"),
        ({"runtime": {"leaves": {1: 1.0}}}, r"runtime\.leaves: got \{1: 1\.0\}, expected \{\}"),
    ],
    ids=str,
)
def test_other_workers_are_refused_in_the_middle_of_a_simulation_and_not_at_its_end(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = changed(QUADRATIC, checkpoint=EVERY)
    train(config, run_dir=tmp_path / "whole")
    middle, *_, end = complete(tmp_path / "whole")
    with pytest.raises(ConfigError, match=rf"^checkpoint\.resume: {message}, as .*: a simulation goes on exactly "):
        train(changed(config, **more, checkpoint={"resume": str(middle)}), run_dir=tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    longer = changed(config, **more, train={"max_iterations": 90}, checkpoint={"resume": str(end)})
    assert train(longer, run_dir=tmp_path / "longer")["iterations"] == 90


@pytest.mark.parametrize("before", [None, 3.0])
def test_a_resumed_simulation_ends_at_the_seconds_that_are_configured_now(before: float | None, tmp_path: Path) -> None:
    config = changed(QUADRATIC, checkpoint=EVERY, train={"max_seconds": before})
    whole = train(config, run_dir=tmp_path / "whole")
    middle = complete(tmp_path / "whole")[1]
    sooner = changed(config, train={"max_seconds": 1.0}, checkpoint={"resume": str(middle)})
    assert train(sooner, run_dir=tmp_path / "sooner")["iterations"] < whole["iterations"]
    ends = train(changed(config, train={"max_seconds": None}, checkpoint={"resume": str(middle)}), run_dir=tmp_path / "ends")
    assert (ends["iterations"], ends["reason"]) == (70, None)


def test_a_simulation_resumed_behind_its_deadline_hands_out_no_ticket_any_more(tmp_path: Path) -> None:
    equal = changed(QUADRATIC, heterogeneity={"name": "none"}, train={"max_seconds": 2.2, "max_iterations": 400})
    config = {**equal, "workers": 2, "checkpoint": {"every": 1, "keep": 100}}
    whole = train(config, run_dir=tmp_path / "whole")
    assert whole["iterations"] == 44
    *_, last_but_one, _ = complete(tmp_path / "whole")  # one of the last two pushes is still to come
    again = train(changed(config, checkpoint={"resume": str(last_but_one)}), run_dir=tmp_path / "again")
    assert (again["iterations"], again["final_params_sha256"]) == (44, whole["final_params_sha256"])


REAL: dict[str, Any] = {
    "runtime": {"name": "sim"},
    "logger": QUADRATIC["logger"],
    "model": {"hidden": 4},
    "train": {"epochs": 1, "batch_size": 400},
    "workers": 2,
}
"""Four gradients on the handwritten digits."""


@pytest.mark.parametrize(("config", "done"), [(QUADRATIC, 70), (REAL, 4)], ids=["iterations", "epochs"])
def test_a_run_without_anything_left_to_do_is_not_resumed(config: dict[str, Any], done: int, tmp_path: Path) -> None:
    whole = train(config, run_dir=tmp_path / "whole")
    assert whole["iterations"] == done
    more = rf"iteration {done} of {done} is done; raise train\.epochs \(or train\.max_iterations\)"
    with pytest.raises(ConfigError, match=rf"^checkpoint\.resume: {more}$"):
        train(changed(config, checkpoint={"resume": str(tmp_path / "whole")}), run_dir=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_checkpoint_without_the_keys_of_prefetch_and_compression_is_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read, without = changed(QUADRATIC, checkpoint=EVERY), checkpoint.read, list[str]()
    whole = train(config, run_dir=tmp_path / "whole")

    def read_older(source: Path, name: str) -> dict[str, Any]:
        state = read(source, name)
        for key in ("work", "source"):
            del state["cluster"][key]
            without.append(key)
        return state

    monkeypatch.setattr(checkpoint, "read", read_older)
    check_resumed(tmp_path / "whole", whole, config, complete(tmp_path / "whole")[0], tmp_path / "again")
    assert without == ["work", "source"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint_of_a_simulation(number: signal.Signals, tmp_path: Path) -> None:
    """SIGUSR1 without an end."""
    config = changed(QUADRATIC, train={"max_iterations": 400})
    whole = train(config, run_dir=tmp_path / "whole")
    started = threading.Event()
    count = 0
    compute = Session.observe

    def observe(self: Session, server: Any) -> None:
        nonlocal count
        count += 1
        if count == 60:
            os.kill(os.getpid(), signal.SIGUSR1)
        if count == 123:
            started.set()
            os.kill(os.getpid(), number)
        compute(self, server)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "observe", observe)
        with pytest.raises(
            RunFailed, match=rf"\Ainterrupted by {number.name}; iteration 123 is kept: resume with .*"
        ) as caught:
            train(config, run_dir=tmp_path / "first")
    assert caught.value.exit_status == 128 + number
    assert started.is_set()
    assert json.loads((tmp_path / "first" / "summary.json").read_text())["reason"] == number.name
    asked, last = complete(tmp_path / "first")
    assert checkpoint.iteration_of(asked) == 60
    assert check_resumed(tmp_path / "whole", whole, config, asked, tmp_path / "second") == 60
    assert check_resumed(tmp_path / "whole", whole, config, last, tmp_path / "third") == 123
