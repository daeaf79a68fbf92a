"""The processes of benchmarks: none is left, and a live server releases the memory of a push."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from benchmarks import server_memory, systems
from benchmarks.systems import System
from tests.support.processes import wait_until


def system(folder: Path, source: str) -> System:
    (folder / "made_up.py").write_text(source)
    return System(name="some", module="made_up", variables=(("PYTHONPATH", str(folder)),))


def test_a_system_gets_the_job_as_arguments_and_its_last_line_is_the_measurement(tmp_path: Path) -> None:
    some = system(tmp_path, "import json, sys\nprint('chatter')\nprint(json.dumps({'arguments': sys.argv[1:]}))")
    arguments = ["--parameters", "1000", "--workers", "2", "--seconds", "1.5"]
    assert systems.run(some, 1000, 2, 1.5) == {"arguments": arguments}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ValueError('got 1, expected 2')", "ValueError: got 1, expected 2 (exit status 1)"),
        ("import os; os._exit(3)", "no output (exit status 3)"),
        ("print('done')", "got 'done', expected a measurement as JSON"),
    ],
)
def test_a_system_that_fails_says_why(tmp_path: Path, source: str, reason: str) -> None:
    assert systems.run(system(tmp_path, source), 1000, 1, 1.0) == reason


def test_a_system_that_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    missing = System(name="ray", module="benchmarks.peers.ray_server", environment=tmp_path)
    assert systems.run(missing, 1000, 1, 1.0) == "not installed: make bench-ray"


DAEMON = """
import os, pathlib, subprocess, sys, time
daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
pathlib.Path(__file__).with_name("pid").write_text(str(daemon.pid))
print("{}", flush=True)
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_no_process_that_a_system_starts_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    monkeypatch.setattr(systems, "TIMEOUT_SECONDS", 3.0 if hangs else 60.0)
    found = systems.run(system(tmp_path, DAEMON + ("time.sleep(600)" if hangs else "")), 1000, 1, 1.0)
    assert found == ("no answer within 3 seconds" if hangs else {})
    pid = int((tmp_path / "pid").read_text())

    def gone() -> bool:
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    wait_until(gone, "the end of the daemon")


@pytest.mark.live
@pytest.mark.timeout(180)
def test_a_live_server_releases_the_memory_of_a_push() -> None:
    # A vector of 10,000 that is kept would be 40,000 bytes per update; torch's agents take some hundred.
    samples = server_memory.samples_of(10_000, 2, 9_000, "auto")
    assert samples[-1].updates > 4_500  # the last sample of a short run; the growth is that up to it
    assert server_memory.growth(samples)["bytes_per_update"] < 4_000
