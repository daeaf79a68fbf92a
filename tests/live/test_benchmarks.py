"""What the throughput benchmarks compute from their measurements, with measurements that are made up."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import contenders, live_scale, machine, server_memory, side_by_side, side_by_side_report, throughput
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.peers.common import shapes
from benchmarks.peers.line import Job, result
from ormo_rpc.models.resnet20 import ResNet20, Shortcut
from tests.support.processes import wait_until


def test_the_many_tensors_are_those_of_resnet20_and_keep_their_proportions() -> None:
    model = ResNet20(3, 10, Shortcut.projection)
    assert sorted(shapes(272_474)) == sorted(parameter.numel() for parameter in model.parameters())
    larger = shapes(2 * 272_474)
    assert sum(larger) == 2 * 272_474
    assert larger == [2 * size for size in shapes(272_474)]
    assert sum(shapes(1_000_003)) == 1_000_003


# -- one measurement ---------------------------------------------------------------------------------------------------


def test_the_line_of_a_contender() -> None:
    # Two workers; 6 round trips that took 3 s together, so the clock ran for 1.5 s: 4 updates/s, each 8 * 1000 bytes both ways.
    job = Job(parameters=1000, workers=2, seconds=1.0)
    line = result("some", job, [0.25, 0.25, 0.5, 0.5, 0.5, 1.0], 0.6, 10, [20, 30])
    assert line["updates_per_second"] == pytest.approx(4.0)
    assert line["megabytes_per_second"] == pytest.approx(0.032)
    assert line["round_trip_median_seconds"] == 0.5
    assert line["round_trip_99_percent_seconds"] == 1.0
    assert line["server_cpu_seconds_per_update"] == pytest.approx(0.1)
    assert (line["server_peak_bytes"], line["worker_peak_bytes"]) == (10, 30)


def apply(iteration: int, worker: int, seconds: float, delay: int = 1) -> dict[str, Any]:
    return {"event": "apply", "iteration": iteration, "worker": worker, "seconds": seconds, "delay": delay}


def look(updates: int, **seen: Any) -> throughput.Look:
    nothing: dict[str, Any] = dict.fromkeys(
        ("cpu_seconds", "workers_cpu_seconds", "server_bytes", "server_bytes_now", "worker_bytes"), 0
    )
    return throughput.Look(updates=updates, **{**nothing, **seen})


def test_our_own_line_is_read_from_the_trace_and_the_looks(tmp_path: Path) -> None:
    # The clock runs from 1 s to 3 s. Worker 0 pushes at 0.5 and then every half second to 3.5, worker 1 at 1.25 and 2.25: five
    # round trips that begin in time, 4 of half a second and one of a whole; 3 s of two workers, so 5 / 1.5 updates/s.
    times = sorted([(0.5 * n, 0) for n in range(1, 8)] + [(1.25, 1), (2.25, 1), (3.3, 1)])
    applied = [apply(n, worker, seconds) for n, (seconds, worker) in enumerate(times)]
    job = Job(parameters=1000, workers=2, seconds=2.0)
    watch = throughput.Watch(tmp_path)
    looks = ((0, 9.0, 1), (2, 10.0, 2), (4, 10.2, 3), (6, 10.4, 4), (9, 99.0, 99))  # updates, CPU, bytes; the first applied in
    watch.looks = [  # time is number 1, the last is number 6
        look(n, cpu_seconds=cpu, workers_cpu_seconds=3 * cpu, server_bytes=size, worker_bytes=10 * size)
        for n, cpu, size in looks
    ]
    summary = {"lock_wait_seconds": 0.1, "lock_held_seconds": 2.0, "step_seconds": 1.8}
    line = throughput.line_of(job, applied, watch, summary)
    assert [event["seconds"] for event in applied[1:7]] == [1.0, 1.25, 1.5, 2.0, 2.25, 2.5]
    assert line["updates_per_second"] == pytest.approx(6 / ((4 * 0.5 + 1.0 + 1.05) / 2))
    assert line["round_trip_median_seconds"] == pytest.approx(0.5)
    assert line["server_cpu_seconds_per_update"] == pytest.approx(0.1)  # 0.4 s for 4 updates
    assert line["workers_cpu_seconds_per_update"] == pytest.approx(0.3)
    assert (line["server_peak_bytes"], line["worker_peak_bytes"]) == (4, 40)  # what the end of the run needs is left out
    assert line["lock_held_seconds_per_update"] == pytest.approx(0.2)  # 10 updates in all
    assert line["step_part_of_lock"] == pytest.approx(0.9)
    assert line["spread_of_workers"] == pytest.approx(1 / 3)  # 4 and 2: 1 off their mean of 3
    assert (line["delay_mean"], line["delay_99_percent"]) == (1, 1)


def test_too_short_a_measurement_says_so(tmp_path: Path) -> None:
    job = Job(parameters=1000, workers=2, seconds=2.0)
    with pytest.raises(ValueError, match=r"^got 1 updates in 2 s, expected two of a worker; measure for longer$"):
        throughput.line_of(job, [apply(0, 0, 1.5)], throughput.Watch(tmp_path), {})


def test_only_options_that_differ_from_their_defaults_are_given() -> None:
    job = Job(parameters=1000, workers=2, seconds=1.0)
    assert not [option for option in throughput.overrides(job) if option.startswith("wire.")]
    assert [option for option in throughput.overrides(job, "uv", "bf16") if option.startswith("wire.")] == [
        "wire.transport=uv",
        "wire.dtype=bf16",
        "wire.params=bf16",
    ]


# -- processes ---------------------------------------------------------------------------------------------------------


def contender(folder: Path, source: str) -> Contender:
    (folder / "made_up.py").write_text(source)
    return Contender(name="some", module="made_up", variables=(("PYTHONPATH", str(folder)),))


def test_a_contender_is_told_what_to_measure_and_its_last_line_counts(tmp_path: Path) -> None:
    some = contender(tmp_path, "import json, sys\nprint('chatter')\nprint(json.dumps({'told': sys.argv[1:]}))")
    told = ["--parameters", "1000", "--workers", "2", "--seconds", "1.5"]
    assert contenders.run(some, 1000, 2, 1.5) == {"told": told}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ValueError('got 1, expected 2')", "ValueError: got 1, expected 2 (exit status 1)"),
        ("import os; os._exit(3)", "no output (exit status 3)"),
        ("print('done')", "got 'done', expected a line of JSON"),
    ],
)
def test_a_contender_that_fails_says_why(tmp_path: Path, source: str, reason: str) -> None:
    assert contenders.run(contender(tmp_path, source), 1000, 1, 1.0) == reason


def test_a_contender_that_is_not_installed_says_how_to(tmp_path: Path) -> None:
    missing = Contender(name="ray", module="benchmarks.peers.ray_server", environment=tmp_path)
    assert contenders.run(missing, 1000, 1, 1.0) == "not installed: make bench-ray"


DAEMON = """
import os, pathlib, subprocess, sys, time
daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
pathlib.Path(__file__).with_name("pid").write_text(str(daemon.pid))
print("{}", flush=True)
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_nothing_that_a_contender_starts_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    monkeypatch.setattr(contenders, "TIMEOUT_SECONDS", 3.0 if hangs else 60.0)
    found = contenders.run(contender(tmp_path, DAEMON + ("time.sleep(600)" if hangs else "")), 1000, 1, 1.0)
    assert found == ("no answer within 3 seconds" if hangs else {})
    pid = int((tmp_path / "pid").read_text())

    def gone() -> bool:
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    wait_until(gone, "the end of the daemon")


# -- side by side ------------------------------------------------------------------------------------------------------


def fake(rates: dict[str, float], calls: list[tuple[str, int, int]]) -> side_by_side.Measure:
    """A measurement that looks up the rate of a contender, divides it by D / 1000, and fails where there is none."""

    def measure(contender: Contender, parameters: int, workers: int, seconds: float) -> dict[str, Any] | str:
        calls.append((contender.name, parameters, workers))
        if contender.name not in rates or (contender.name == "gloo" and parameters == 2000):
            return "broken"
        rate = rates[contender.name] * 1000 / parameters
        job = Job(parameters=parameters, workers=workers, seconds=seconds)
        return result(contender.name, job, [workers / rate] * 10, 0.1, 1_000_000, [2_000_000])

    return measure


def test_contenders_take_turns_and_one_that_fails_is_left_out_where_it_does(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    names = ("ormo_rpc", "raw_sockets", "gloo", "ray")
    measure_one = fake({"ormo_rpc": 40, "raw_sockets": 10, "gloo": 5}, calls)
    seen = list(side_by_side.measure(names, (1000, 2000), (2, 4), 1.0, 2, measure_one))
    assert [(content["workers"], content["rounds"]) for content in seen] == [(2, 1), (4, 1), (2, 2), (4, 2)]
    first = [name for name, parameters, workers in calls if (parameters, workers) == (1000, 2)]
    assert first == ["ormo_rpc", "raw_sockets", "gloo", "ray", "raw_sockets", "gloo", "ormo_rpc"]  # ray has failed
    assert [call for call in calls if call == ("gloo", 2000, 4)] == [("gloo", 2000, 4)]
    last = seen[-1]
    assert last["failures"] == {"ray, D = 1,000": "broken", "gloo, D = 2,000": "broken", "ray, D = 2,000": "broken"}
    assert side_by_side_report.failures(last) == ["ray: broken", "gloo at D = 2,000: broken"]
    assert {(line["contender"], line["parameters"]) for line in last["lines"]} == {
        *(("ormo_rpc", 1000), ("ormo_rpc", 2000), ("raw_sockets", 1000), ("raw_sockets", 2000), ("gloo", 1000)),
    }
    for content in seen:
        side_by_side_report.write(content, tmp_path)
    assert sorted(path.name.partition("-K")[2] for path in tmp_path.iterdir()) == [
        *("2.json", "2.md", "2.png"),
        *("4.json", "4.md", "4.png"),
    ]


def test_every_contender_is_first_and_last_at_times() -> None:
    names = ["a", "b", "c", "d"]
    orders = [side_by_side.rotated(names, number) for number in range(4)]
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == {order[-1] for order in orders} == set(names)
    assert orders[0] == names


def test_the_estimate_counts_what_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = Contender(name="there", module="there", overhead_seconds=4.0)
    missing = Contender(name="missing", module="missing", environment=tmp_path, overhead_seconds=100.0)
    monkeypatch.setattr(side_by_side, "CONTENDERS", {"there": there, "missing": missing})
    # 3 rounds of 2 sizes and 2 numbers of workers, each 1 + 4 s, and 0.3 s for each million of parameters: 6 * 0.3 * 30 = 54.
    found = side_by_side.estimated_seconds(["there", "missing"], (10_000_000, 20_000_000), (2, 4), 1.0, 3)
    assert found == pytest.approx(60 + 54)


def line(name: str, number: int, rate: float, **more: Any) -> dict[str, Any]:
    job = Job(parameters=1000, workers=1, seconds=1.0)
    return {**result(name, job, [1 / rate], 0.0, 2_000_000, [3_000_000]), "contender": name, "round": number, **more}


def content(lines: list[dict[str, Any]], failed: dict[str, str]) -> dict[str, Any]:
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cores": 2, "caches": {"L1": "32K", "L2": "1024K"}},
        "versions": {"torch": "2", "commit": "abc+changes"},
        "load_at_start": [0.5, 1.0, 1.5],
        "load_at_end": [2.5, 3.0, 3.5],
        "workers": 1,
        "seconds": 1.0,
        "rounds": 2,
        "lines": lines,
        "failures": failed,
    }


def test_ratios_are_taken_within_a_round_and_files_are_written(tmp_path: Path) -> None:
    # The machine was twice as slow in the second round: 2 and 1 of raw sockets' 1, not 20 and 5 of their median 7.5.
    ours = {"step_part_of_lock": 0.9, "lock_held_seconds_per_update": 1e-4, "delay_mean": 1.0}
    lines = [
        *(line("raw_sockets", 0, 10), line("ormo_rpc", 0, 20, **ours), line("rpc_tensors", 0, 4)),
        *(line("raw_sockets", 1, 5), line("ormo_rpc", 1, 5, **ours)),
    ]
    made = content(lines, {"ray, D = 1,000": "not installed: make bench-ray"})
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


def test_a_result_without_any_line_says_who_is_left_out(tmp_path: Path) -> None:
    stem = side_by_side_report.write(content([], {"gloo, D = 1,000": "broken"}), tmp_path)
    assert "* gloo: broken" in stem.with_suffix(".md").read_text()
    assert not stem.with_suffix(".png").exists()


def test_the_default_contenders_are_known_and_have_modules() -> None:
    root = Path(contenders.__file__).parents[1]
    assert set(contenders.DEFAULT) <= set(CONTENDERS)
    assert {contenders.FLOOR, contenders.REFERENCE} <= set(contenders.DEFAULT)
    for each in CONTENDERS.values():
        assert (root / each.module.replace(".", "/")).with_suffix(".py").is_file()


def test_the_machine_is_described(tmp_path: Path) -> None:
    for number, (kind, level, size) in enumerate((("Data", "1", "32K"), ("Instruction", "1", "64K"), ("Unified", "2", "1M"))):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(value + "\n")
    assert machine.caches(tmp_path) == {"L1": "32K", "L2": "1M"}
    assert machine.machine()["cores"] == os.cpu_count()
    package = tmp_path / "lib" / "python3" / "site-packages" / "ray-2.1.0.dist-info"
    package.mkdir(parents=True)
    found = machine.versions({"ray": tmp_path, "tensorflow": tmp_path / "nowhere"})
    assert found["ray"] == "2.1.0"
    assert "tensorflow" not in found


# -- the live server against K -----------------------------------------------------------------------------------------


def live_line(parameters: int, workers: int, rate: float, server: float, of_workers: float, held: float) -> dict[str, Any]:
    job = Job(parameters=parameters, workers=workers, seconds=1.0)
    return {
        **result("ormo_rpc", job, [workers / rate] * 10, 10 * server, 1, [1]),
        "workers_cpu_seconds_per_update": of_workers,
        "lock_held_seconds_per_update": held,
        "lock_wait_seconds_per_update": 1e-6,
        "delay_mean": workers - 1.0,
        "delay_99_percent": workers,
        "spread_of_workers": 0.0,
    }


def test_the_knee_is_where_more_workers_are_not_worth_it_and_says_what_is_in_use(tmp_path: Path) -> None:
    # The best rate is 1,000; K = 4 reaches 950 of it. There the server takes 0.95 cores and the workers 0.95: 1.9 of 2.
    rates = {1: 400.0, 2: 800.0, 4: 950.0, 8: 1000.0}
    lines = [live_line(1000, workers, rate, 1e-3, 1e-3, 5e-4) for workers, rate in reversed(rates.items())]
    made = {**content([*lines, live_line(50, 1, 100.0, 1e-3, 0.0, 9.9e-3)], {}), "lines": lines}
    (found,) = live_scale.groups(made).values()
    assert [each["workers"] for each in found] == [1, 2, 4, 8]
    at = live_scale.knee(found)
    assert at["workers"] == 4
    assert live_scale.in_use(at) == pytest.approx({"lock": 0.475, "server": 0.95, "all": 1.9})
    assert live_scale.reason(at, 2).startswith("the cores of this machine (lock held 48% of the time, server 0.95 and all 1.90")
    assert live_scale.reason(at, 8).startswith("the server's one interpreter")
    assert live_scale.reason(live_line(50, 1, 100.0, 1e-3, 0.0, 9.9e-3), 2).startswith("the server's lock (lock held 99%")
    assert live_scale.reason(live_line(50, 1, 100.0, 1e-3, 0.0, 1e-3), 2).startswith("nothing is in use all the time")
    live_scale.write(made, tmp_path)
    assert (
        "* D = 1,000: the knee is at K = 4 with 950 updates/s, bound by the cores" in (tmp_path / "live_scale.md").read_text()
    )
    assert (tmp_path / "live_scale.png").stat().st_size > 1000


# -- the server's memory -----------------------------------------------------------------------------------------------


def test_growth_is_told_from_going_up_and_down() -> None:
    # A start that fills caches, then 7 bytes for each update, and 50 bytes more at every other look.
    looks = [look(n, server_bytes_now=1000 + min(n, 50) * 10 + 7 * n + 50 * (n // 10 % 2)) for n in range(0, 1001, 10)]
    assert server_memory.growth(looks) == pytest.approx(7, rel=0.02)
    with pytest.raises(ValueError, match=r"^got 1 looks at 5 updates, expected some in the second tenth and some in the last$"):
        server_memory.growth([look(5)])


def test_the_memory_of_a_server_is_put_beside_its_budget() -> None:
    # 16 + 4 * 3 snapshots + 4 * 2 workers = 36
    assert server_memory.budget(2) == 36
    assert server_memory.peak([look(1, server_bytes=5), look(2, server_bytes=9)]) == 9
    line = {"parameters": 1000, "workers": 2, "peak_bytes": 2_036_000, "budget": 36}
    made = {
        **content([], {}),
        "peaks": [{**line, "bytes_per_parameter": 36.0}, {**line, "bytes_per_parameter": 36.5}],
        "growth": {
            "parameters": 10,
            "workers": 2,
            "updates": 1000,
            "bytes_per_update": 101.0,
            "first_bytes": 1e6,
            "last_bytes": 2e6,
        },
    }
    assert [row[-3:] for row in server_memory.peak_rows(made)[1:]] == [("36.0", "36", "yes"), ("36.5", "36", "no")]
    assert "1,000 updates at D = 10, K = 2: growth,\n101.0 bytes for each update" in server_memory.as_text(made)


@pytest.mark.live
@pytest.mark.timeout(180)
def test_a_live_server_keeps_nothing_of_a_push() -> None:
    # A vector of 10,000 that is kept would be 40,000 bytes for each update; torch's agents take some hundred.
    looks = server_memory.looks_at(10_000, 2, 3_000, "auto")
    assert looks[-1].updates > 1_500  # when the last look is taken, and the run is short; the growth is that up to it
    assert server_memory.growth(looks) < 4_000
