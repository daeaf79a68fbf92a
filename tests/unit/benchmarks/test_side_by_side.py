"""The comparison of systems: turns, ratios, reports."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from benchmarks import before_after, in_turns, side_by_side, side_by_side_report, systems
from benchmarks.measuring import ROOT, rotated
from benchmarks.peers.measurement import Job, measurement
from benchmarks.systems import SYSTEMS, System
from tests.unit.benchmarks.made_up import content, measured


def fake(rates: dict[str, float], calls: list[tuple[str, int, int]]) -> side_by_side.Measure:
    """A measurement that looks up the rate of a system, divides it by D / 1000, and fails if there is none."""

    def measure(system: System, parameters: int, workers: int, seconds: float) -> dict[str, Any] | str:
        calls.append((system.name, parameters, workers))
        if system.name not in rates or (system.name == "gloo" and parameters == 2000):
            return "broken"
        rate = rates[system.name] * 1000 / parameters
        job = Job(parameters=parameters, workers=workers, seconds=seconds)
        return measurement(system.name, job, [workers / rate] * 10, 0.1, 1_000_000, [2_000_000])

    return measure


def test_systems_take_turns_and_one_that_fails_at_a_size_is_left_out_there(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    names = ("ormo_rpc", "raw_sockets", "gloo", "ray")
    measure_one = fake({"ormo_rpc": 40, "raw_sockets": 10, "gloo": 5}, calls)
    seen = list(side_by_side.measure(names, (1000, 2000), (2, 4), 1.0, 2, measure_one))
    assert [(each["workers"], each["rounds"]) for each in seen] == [(2, 1), (4, 1), (2, 2), (4, 2)]
    first = [name for name, parameters, workers in calls if (parameters, workers) == (1000, 2)]
    assert first == ["ormo_rpc", "raw_sockets", "gloo", "ray", "raw_sockets", "gloo", "ormo_rpc"]  # ray has failed
    assert [call for call in calls if call == ("gloo", 2000, 4)] == [("gloo", 2000, 4)]
    last = seen[-1]
    assert last["failures"] == {"ray, D = 1,000": "broken", "gloo, D = 2,000": "broken", "ray, D = 2,000": "broken"}
    assert side_by_side_report.failures(last) == ["ray: broken", "gloo at D = 2,000: broken"]
    assert {(each["system"], each["parameters"]) for each in last["measurements"]} == {
        *(("ormo_rpc", 1000), ("ormo_rpc", 2000), ("raw_sockets", 1000), ("raw_sockets", 2000), ("gloo", 1000)),
    }
    for each in seen:
        side_by_side_report.write(each, tmp_path, draw=lambda _, path: path.touch())
    assert sorted(path.name.partition("-K")[2] for path in tmp_path.iterdir()) == [
        *("2.json", "2.md", "2.png"),
        *("4.json", "4.md", "4.png"),
    ]


def test_an_interrupted_comparison_goes_on_with_the_measurements_of_the_same_commit(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    measure_one = fake({"ormo_rpc": 40, "raw_sockets": 10}, calls)
    about: dict[str, Any] = {"namespaces": True, "versions": {"torch": "2", "commit": "abc"}}
    *_, first = side_by_side.measure(("ormo_rpc", "raw_sockets"), (1000,), (2,), 1.0, 1, measure_one, **about)
    side_by_side_report.write(first, tmp_path, draw=lambda _, path: path.touch())
    kept = side_by_side.kept(first, (2,), 1.0, tmp_path)
    assert side_by_side.kept({**first, "namespaces": False}, (2,), 1.0, tmp_path) == []
    assert side_by_side.kept({**first, "versions": {"commit": "another"}}, (2,), 1.0, tmp_path) == []
    *_, last = side_by_side.measure(("ormo_rpc", "raw_sockets"), (1000,), (2,), 1.0, 2, measure_one, kept, **about)
    assert (len(calls), len(last["measurements"])) == (4, 4)
    assert "K = 2, between two network namespaces" in side_by_side_report.as_text(last)
    changed = {**first, "versions": {"commit": "abc+changes"}}  # it may have changed again
    side_by_side_report.write(changed, tmp_path, draw=lambda _, path: path.touch())
    assert side_by_side.kept(changed, (2,), 1.0, tmp_path) == []


def test_every_system_comes_first_and_last_in_some_round() -> None:
    names = ["a", "b", "c", "d"]
    orders = [rotated(names, number) for number in range(4)]
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == {order[-1] for order in orders} == set(names)
    assert orders[0] == names


def test_the_estimate_counts_what_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = System(name="installed", module="installed", overhead_seconds=4.0)
    missing = System(name="missing", module="missing", environment=tmp_path, overhead_seconds=100.0)
    monkeypatch.setattr(side_by_side, "SYSTEMS", {"installed": installed, "missing": missing})
    # 3 rounds of 2 sizes and 2 numbers of workers, each 1 + 4 s, and 0.3 s for each million of parameters: 6 * 0.3 * 30 = 54.
    found = side_by_side.estimated_seconds(["installed", "missing"], (10_000_000, 20_000_000), (2, 4), 1.0, 3)
    assert found == pytest.approx(60 + 54)


@pytest.mark.slow  # draws with matplotlib
def test_ratios_are_taken_within_a_round_and_files_are_written(tmp_path: Path) -> None:
    # The machine was twice as slow in the second round: 2 and 1 of raw sockets' 1, not 20 and 5 of their median 7.5.
    lock_times = {"step_part_of_lock": 0.9, "lock_held_seconds_per_update": 1e-4, "delay_mean": 1.0}
    measurements = [
        *(measured("raw_sockets", 0, 10), measured("ormo_rpc", 0, 20, **lock_times), measured("rpc_tensors", 0, 4)),
        *(measured("raw_sockets", 1, 5), measured("ormo_rpc", 1, 5, **lock_times)),
    ]
    made = content(measurements, {"ray, D = 1,000": "not installed: make bench-ray"})
    header, best, sockets, tensors = side_by_side_report.rows(made)
    assert len(header) == len(best) == len(sockets) == len(tensors)
    assert best[:7] == ("1,000", "ormo_rpc", "12.5", "5.0 - 20.0", "0", "1.50 (1.00 - 2.00)", "5.00 (5.00 - 5.00)")
    assert sockets[:6] == ("1,000", "raw_sockets", "7.5", "5.0 - 10.0", "0", "1.00 (1.00 - 1.00)")
    assert tensors[5:7] == ("0.40 (0.40 - 0.40)", "1.00 (1.00 - 1.00)")
    assert side_by_side_report.lock_rows(made)[1:] == [("1,000", "ormo_rpc", "-", "100", "90%", "1.00", "-", "-")]
    stem = side_by_side_report.write(made, tmp_path)
    assert stem.name == "throughput-2026-01-02-K1"
    text = stem.with_suffix(".md").read_text()
    assert "* ray: not installed: make bench-ray" in text
    assert "cores 2, caches L1 32K L2 1024K, torch 2, commit abc+changes, load at start 0.5 1.0 1.5, load at end 2.5" in text
    assert json.loads(stem.with_suffix(".json").read_text()) == made
    assert stem.with_suffix(".png").stat().st_size > 1000


def test_a_result_without_measurements_says_what_is_left_out(tmp_path: Path) -> None:
    stem = side_by_side_report.write(content([], {"gloo, D = 1,000": "broken"}), tmp_path)
    assert "* gloo: broken" in stem.with_suffix(".md").read_text()
    assert not stem.with_suffix(".png").exists()


def test_the_default_systems_exist_and_every_system_has_its_module() -> None:
    root = Path(systems.__file__).parents[1]
    assert set(systems.DEFAULT) <= set(SYSTEMS)
    assert {systems.RAW_SOCKETS, systems.RPC_TENSORS} <= set(systems.DEFAULT)
    for each in SYSTEMS.values():
        assert (root / each.module.replace(".", "/")).with_suffix(".py").is_file()


def test_two_checkouts_are_compared_within_rounds_and_take_turns_in_order(tmp_path: Path) -> None:
    order: list[tuple[str, int]] = []

    class Fake(before_after.Checkout):
        @override
        def measure(self, parameters: int, workers: int, seconds: float) -> dict[str, Any]:
            order.append((self.name, parameters))
            more = {"workers_cpu_seconds_per_update": 0.003}
            slower = 1 + order.count((self.name, parameters))  # the machine is slower from round to round
            job = Job(parameters=parameters, workers=workers, seconds=seconds)
            return measurement("ormo_rpc", job, [slower * (0.1 if self.name == "before" else 0.2)], 0.1, 1, [1]) | more

    checkouts = [Fake(name=name, folder=Path(), python=Path()) for name in ("before", "after")]
    *_, made = before_after.measure(checkouts, (10, 20), 1, 1.0, 2)
    assert order == [
        *(("before", 10), ("after", 10), ("before", 20), ("after", 20)),
        *(("after", 10), ("before", 10), ("after", 20), ("before", 20)),
    ]
    assert before_after.values(made, "before", 20, before_after.updates_per_second) == pytest.approx([5.0, 10 / 3])
    # 0.1 s of the server in all, for one update, and 3 ms of the workers.
    assert before_after.values(made, "after", 10, before_after.cpu_milliseconds) == pytest.approx([103.0, 103.0])
    assert before_after.ratios(made, 10) == pytest.approx([0.5, 0.5])
    options = {"before": list[str](), "after": ["--transport", "gloo"]}
    results = {**content([], {}), "measurements": made, "before": "abc", "after": "def", "options": options}
    assert "| 10 | 4 (3 - 5) | 2 (2 - 2) | 0.500 (0.500 - 0.500) |" in before_after.as_text(results)
    # The same again does nothing but the further round, unless a commit, an option or the machine is another one.
    before_after.write(results, tmp_path / "made")
    kept = before_after.earlier(results, tmp_path / "made")
    *_, longer = before_after.measure(checkouts, (10, 20), 1, 1.0, 3, kept)
    assert (len(order), len(longer)) == (12, 12)
    for other in ({"after": "ghi"}, {"options": {**options, "before": ["--transport", "shm"]}}, {"machine": {"cores": 4}}):
        assert before_after.earlier({**results, **other}, tmp_path / "made") == []
    changed = {**results, "after": "def+changes"}
    before_after.write(changed, tmp_path / "made")
    assert before_after.earlier(changed, tmp_path / "made") == []


def test_a_checkout_has_changes_where_its_code_does_and_not_where_results_are_written(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    checkout = before_after.Checkout(name="before", folder=tmp_path, python=Path())
    for file in ("ormo_rpc/a.py", "benchmarks/b.py", "results/c.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "--short=10", "HEAD").strip()
    (tmp_path / "results/c.json").write_text("{}")
    assert checkout.commit() == commit
    (tmp_path / "benchmarks/b.py").write_text("b = 1\n")
    assert checkout.commit() == f"{commit}+changes"


def test_systems_in_turns_have_a_name_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = in_turns.named([Path(), Path("b/former")], ["raw_sockets"])
    assert [(name, folder) for name, _, folder in found] == [
        *((tmp_path.name, tmp_path), ("former", tmp_path / "b" / "former")),
        ("raw_sockets", ROOT),
    ]
    with pytest.raises(ValueError, match=r"^got ormo, ormo, gloo, expected a name for each: rename the folder of a checkout"):
        in_turns.named([Path("a/ormo"), Path("b/ormo")], ["gloo"])
