"""The simulator against closed forms of its schedule, its determinism, and exact replays of its runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc import ConfigError, RunFailed, train
from ormo_rpc.kernels import compiled
from ormo_rpc.kernels.compiled import compiled_steps
from ormo_rpc.options import parts
from ormo_rpc.storage.run_directory import read_trace
from tests.support.processes import launch

QUADRATIC = ("runtime=sim", "logger=none", "runtime.gradient=quadratic", "runtime.dimension=20", "train.lr=0.001")
DIGITS = ("runtime=sim", "logger=none", "model.hidden=8", "train.max_iterations=60", "workers=5")


def simulate(run_dir: Path, *overrides: str) -> dict[str, Any]:
    return train([*QUADRATIC, *overrides], run_dir=run_dir)


def replay(run_dir: Path, source: Path) -> dict[str, Any]:
    return train(["runtime=replay", f"replay.run={source}", "logger=none"], run_dir=run_dir)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_trace(run_dir)[1] if event["event"] == kind]


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_k_equal_workers_take_a_kth_of_the_time(tmp_path: Path) -> None:
    summary = simulate(tmp_path, "workers=4", "train.max_iterations=40", "runtime.compute_seconds=0.5")
    # 40 tickets over 4 workers of 0.5 s a ticket: 10 * 0.5 s. All delays but the first ones are K - 1 = 3: (0+1+2+3*37)/40.
    assert summary["virtual_seconds"] == pytest.approx(5.0)
    assert summary["delay_mean"] == pytest.approx(114 / 40)
    assert summary["pushes_per_worker"] == dict.fromkeys("0123", 10)
    assert summary["utilisation_per_worker"] == dict.fromkeys("0123", 1.0)


def test_a_synchronous_round_takes_as_long_as_its_slowest_worker(tmp_path: Path) -> None:
    slow = ("heterogeneity=one_slow", "heterogeneity.factor=10", "runtime.compute_seconds=0.5")
    waiting = simulate(tmp_path / "sync", "workers=4", "train.max_iterations=40", *slow, "scheduler=sync")
    # 10 rounds of 4, each as long as the slow worker's 10 * 0.5 s; the others compute for a tenth of it.
    assert waiting["virtual_seconds"] == pytest.approx(50.0)
    assert waiting["utilisation_per_worker"] == pytest.approx({"0": 0.1, "1": 0.1, "2": 0.1, "3": 1.0})
    going = simulate(tmp_path / "async", "workers=4", "train.max_iterations=40", *slow)
    # Three workers make 6 a second, the slow one 0.2: of 40 it makes one, at 5 s, or is at its second when the rest is done.
    assert going["virtual_seconds"] < 11
    assert going["pushes_per_worker"]["3"] <= 2


def test_latency_and_bandwidth_add_to_the_time_of_a_ticket(tmp_path: Path) -> None:
    links = ("runtime.latency_seconds=[0.25]", "runtime.bandwidth=[160]", "runtime.compute_seconds=1.0")
    summary = simulate(tmp_path, "workers=1", "train.max_iterations=3", *links)
    # A message: 20 values of 4 bytes / 160 bytes a second + 0.25 s = 0.75 s. A ticket: there, 1 s, back: 2.5 s. Three of them.
    assert summary["virtual_seconds"] == pytest.approx(7.5)
    assert summary["utilisation_per_worker"]["0"] == pytest.approx(3 / 7.5)


def test_a_message_of_two_vectors_takes_twice_the_time(tmp_path: Path) -> None:
    links = ("runtime.bandwidth=[160]", "runtime.compute_seconds=1.0", "algorithm=hiermo", "algorithm.local_steps=1")
    summary = simulate(tmp_path, "workers=1", "train.max_iterations=3", *links)
    # There and back 2 * 20 values of 4 bytes at 160 bytes a second, and 1 s between: three times 1 + 1 + 1 s.
    assert summary["virtual_seconds"] == pytest.approx(9.0)


def test_pushes_queue_at_a_slow_server(tmp_path: Path) -> None:
    summary = simulate(
        tmp_path, "workers=8", "train.max_iterations=80", "runtime.service_seconds=0.1", "runtime.compute_seconds=0.1"
    )
    # The first push is served from 0.1 s on; from then on the server is never idle: 0.1 + 80 * 0.1 s.
    assert summary["virtual_seconds"] == pytest.approx(8.1)
    assert summary["server_load"] == pytest.approx(8.0 / 8.1)
    assert summary["server_queue_seconds"] > 0


def test_workers_join_and_leave_at_the_configured_times(tmp_path: Path) -> None:
    simulate(
        tmp_path,
        *("workers=2", "train.max_iterations=40", "runtime.compute_seconds=1.0"),
        *("runtime.joins={7: 3.5}", "runtime.leaves={0: 5.5}"),
    )
    assert [(event["worker"], event["seconds"]) for event in events(tmp_path, "join")] == [(7, 3.5)]
    assert [(event["worker"], event["seconds"]) for event in events(tmp_path, "leave")] == [(0, 5.5)]
    applied = events(tmp_path, "apply")
    assert sorted(event["ticket"] for event in applied) == list(range(40))
    assert {event["worker"] for event in applied if event["seconds"] > 5.5} == {1, 7}


def test_a_worker_that_leaves_has_computed_until_then(tmp_path: Path) -> None:
    options = ("workers=2", "train.max_iterations=40", "runtime.compute_seconds=1", "runtime.latency_seconds=[0.0, 4.0]")
    summary = simulate(tmp_path, *options, "runtime.leaves={1: 4.5}")
    # The reply reaches worker 1 at 4 s, so that it has computed for 0.5 of its 4.5 s.
    assert summary["utilisation_per_worker"] == {"0": 1.0, "1": pytest.approx(0.5 / 4.5)}


def test_a_worker_that_computes_when_a_run_ends_has_computed_until_then(tmp_path: Path) -> None:
    options = ("workers=3", "train.max_iterations=40", "runtime.compute_seconds=1", "runtime.latency_seconds=[0.0, 0.0, 1.5]")
    summary = simulate(tmp_path, *options, "heterogeneity=one_slow", "heterogeneity.factor=100", "train.lr=1e30")
    end = summary["virtual_seconds"]
    assert (summary["status"], 1.5 < end < 100) == ("diverged", True)
    # Worker 2 is at its first ticket from 1.5 s on.
    assert summary["utilisation_per_worker"] == {"0": 1.0, "1": 1.0, "2": pytest.approx((end - 1.5) / end)}


def test_what_a_worker_has_not_sent_when_it_leaves_takes_no_time_of_the_server(tmp_path: Path) -> None:
    options = ("workers=2", "train.max_iterations=3", "runtime.compute_seconds=1", "runtime.service_seconds=1")
    summary = simulate(tmp_path, *options, "runtime.leaves={0: 0.5}")
    # Worker 1 alone: a second of its own, and one of the server, for each of three tickets.
    assert (summary["virtual_seconds"], summary["server_queue_seconds"], summary["server_load"]) == (6.0, 0.0, 0.5)


def test_max_seconds_limits_virtual_time(tmp_path: Path) -> None:
    limits = ("train.max_iterations=1000", "train.max_seconds=2.2")
    summary = simulate(tmp_path, "workers=2", *limits, "runtime.compute_seconds=0.5")
    # Tickets end at 0.5, 1.0, ...; those that are out at 2.2 s are finished, at 2.5 s: 5 for each of 2 workers.
    assert (summary["status"], summary["iterations"], summary["virtual_seconds"]) == ("completed", 10, 2.5)


def test_noise_gradients_need_no_model_and_have_delays(tmp_path: Path) -> None:
    summary = simulate(tmp_path, "workers=2", "train.max_iterations=5", "runtime.gradient=noise", "runtime.noise=0")
    assert (summary["train_loss"], summary["model"], summary["delay_median"]) == (0.0, "noise", 1)
    # Delays 0, 1, 1, 1, 1: at least 99% are at most 1, and half of them too.
    assert summary["delay_99_percent"] == 1


def test_a_thousand_workers_are_simulated(tmp_path: Path) -> None:
    summary = simulate(tmp_path, "workers=1000", "train.max_iterations=3000", "heterogeneity=exponential")
    assert summary["status"] == "completed"
    # Conservation of delay: the mean is K - 1 but for the start and for what is still out at the end.
    assert 0.8 * 999 < summary["delay_mean"] <= 999


# -- determinism and replay --------------------------------------------------------------------------------------------


def test_two_runs_of_a_seed_are_identical_and_another_seed_differs(tmp_path: Path) -> None:
    runs = {"one": "seed=3", "two": "seed=3", "other": "seed=4"}
    found = {name: train([*DIGITS, "heterogeneity=gamma", seed], run_dir=tmp_path / name) for name, seed in runs.items()}
    assert found["one"]["final_params_sha256"] == found["two"]["final_params_sha256"] != found["other"]["final_params_sha256"]
    for file in ("trace.jsonl", "metrics.jsonl"):
        one, two, other = ((tmp_path / name / file).read_text() for name in runs)
        assert one == two != other


@pytest.mark.parametrize("algorithm", parts("algorithm"))
def test_every_algorithm_is_replayed_bit_for_bit(algorithm: str, tmp_path: Path) -> None:
    decay = ("train.weight_decay=0.01", "train.decay_1d=false")
    options = ("model.dropout=0.3", "heterogeneity=one_slow", "train.lr=0.01", "logger.elastic_iterations=7", *decay)
    recorded = train([*DIGITS, f"algorithm={algorithm}", *options], run_dir=tmp_path / "run")
    assert (recorded["status"], recorded["iterations"], recorded["algorithm"]) == ("completed", 60, algorithm)
    again = replay(tmp_path / "again", tmp_path / "run")
    assert again["identical"] is True
    assert again["final_params_sha256"] == recorded["final_params_sha256"]
    assert (again["elastic_mean"], again["elastic_max"]) == (recorded["elastic_mean"], recorded["elastic_max"])
    assert 0 <= recorded["elastic_mean"] <= recorded["elastic_max"]  # 0 where gradients are taken at the present parameters


@pytest.mark.parametrize("algorithm", ["ormo", "asgd", "naive", "shifted"])
def test_compiled_and_torch_steps_replay_each_other(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled_steps() is None:
        pytest.skip("no C compiler, or not one whose bits are torch's")
    lengths = {"torch": sys.maxsize, "compiled": 0}
    for steps, other in (("torch", "compiled"), ("compiled", "torch")):
        monkeypatch.setattr(compiled, "WORTH_COMPILING", lengths[steps])
        recorded = train([*DIGITS, f"algorithm={algorithm}", "heterogeneity=gamma"], run_dir=tmp_path / steps)
        assert read_trace(tmp_path / steps)[0]["steps"] == steps
        monkeypatch.setattr(compiled, "WORTH_COMPILING", lengths[other])
        again = replay(tmp_path / f"{steps} again", tmp_path / steps)
        assert (recorded["status"], again["identical"]) == ("completed", True)


@pytest.mark.parametrize("scheduler", ["sync", "partial", "ssp"])
def test_every_scheduler_is_replayed_with_joins_and_leaves(scheduler: str, tmp_path: Path) -> None:
    membership = ("runtime.joins={9: 0.35}", "runtime.leaves={1: 0.55}", "heterogeneity=exponential")
    train([*DIGITS, f"scheduler={scheduler}", *membership], run_dir=tmp_path / "run")
    assert {"join", "leave"} <= {event["event"] for event in read_trace(tmp_path / "run")[1]}
    assert replay(tmp_path / "again", tmp_path / "run")["identical"] is True


def test_discards_and_an_early_end_are_replayed(tmp_path: Path) -> None:
    options = ("algorithm=ringmaster", "algorithm.delay_threshold=3", "heterogeneity=one_slow", "train.max_seconds=3")
    train([*DIGITS, *options], run_dir=tmp_path / "run")
    assert len(events(tmp_path / "run", "discard")) > 0
    assert replay(tmp_path / "again", tmp_path / "run")["identical"] is True


def test_a_resumed_run_is_replayed_from_its_checkpoint(tmp_path: Path) -> None:
    train(DIGITS, run_dir=tmp_path / "first")
    more = [option.replace("=60", "=100") for option in DIGITS]
    resumed = train([*more, f"checkpoint.resume={tmp_path / 'first'}"], run_dir=tmp_path / "second")
    assert [event["iteration"] for event in events(tmp_path / "second", "apply")] == list(range(60, 100))
    again = replay(tmp_path / "again", tmp_path / "second")
    assert again["final_params_sha256"] == resumed["final_params_sha256"]


def test_a_replay_of_an_exactly_resumed_run_has_its_elastic_consistency_from_the_beginning(tmp_path: Path) -> None:
    options = ("workers=3", "algorithm=ormo", "train.lr=0.01", "heterogeneity=exponential", "logger.elastic_iterations=1")
    whole = simulate(tmp_path / "whole", *options, "train.max_iterations=80", "checkpoint.every=40", "checkpoint.keep=9")
    (half,) = [each for each in (tmp_path / "whole" / "checkpoints").iterdir() if each.name.endswith("0040")]
    simulate(tmp_path / "rest", *options, "train.max_iterations=80", f"checkpoint.resume={half}")
    again = replay(tmp_path / "again", tmp_path / "rest")
    assert again["identical"] is True
    assert (again["elastic_mean"], again["elastic_max"]) == (whole["elastic_mean"], whole["elastic_max"])


def test_a_differing_replay_fails_with_the_first_differing_event(tmp_path: Path) -> None:
    train(DIGITS, run_dir=tmp_path / "run")
    trace = tmp_path / "run" / "trace.jsonl"
    lines = trace.read_text().splitlines()
    number, event = next((n, json.loads(line)) for n, line in enumerate(lines) if '"iteration": 17,' in line)
    lines[number] = json.dumps({**event, "grad_sum": (1.0).hex()})
    trace.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunFailed) as caught:
        replay(tmp_path / "again", tmp_path / "run")
    said = str(caught.value)
    assert re.match(
        rf"replay of \S+ differs: event {number - 1} of the trace, \{{\"event\": \"apply\", \"iteration\": 17, ", said
    )
    assert caught.value.exit_status == 1
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["identical"] is False


@pytest.mark.slow
def test_the_command_says_that_a_replay_is_identical_to_its_source(tmp_path: Path) -> None:
    simulate(tmp_path / "run", "workers=2", "train.max_iterations=5")
    status, out, _ = launch(tmp_path / "again", "runtime=replay", f"replay.run={tmp_path / 'run'}")
    assert status == 0
    same = f"identical to {tmp_path / 'run'}: every event, and each bit of the final parameters"
    assert out.splitlines()[1:] == [same, f"run directory: {tmp_path / 'again'}"]


def test_a_replay_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    nothing = r"^replay\.run: got None, expected the run to compute again: replay\.run=RUN_DIRECTORY$"
    with pytest.raises(ConfigError, match=nothing):
        train(["runtime=replay"], run_dir=tmp_path / "a")
    with pytest.raises(ConfigError, match=r"^replay\.run: got \S+, expected the directory of a run that has ended$"):
        replay(tmp_path / "b", tmp_path)
    never = tmp_path / "never"  # that of a run that was interrupted before it began
    never.mkdir()
    (never / "summary.json").write_text(json.dumps({"status": "interrupted", "final_params_sha256": None}))
    (never / "trace.jsonl").touch()
    with pytest.raises(ConfigError, match=r"^replay\.run: got \S+never, expected the directory of a run that has ended$"):
        train(["runtime=replay", f"replay.run={never}"], run_dir=tmp_path / "c")


@pytest.mark.parametrize("scheduler", ["sync", "partial", "ssp"])
def test_an_algorithm_under_a_scheduler_that_it_refuses_starts_nothing(scheduler: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^scheduler: got '{scheduler}', which rennala (refuses|does not run under): .+"):
        train([*DIGITS, "algorithm=rennala", f"scheduler={scheduler}"], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
