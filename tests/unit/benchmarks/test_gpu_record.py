"""The record of a GPU machine: the outcome of its tests, its parts, their time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu, gpu_sanitizer, gpu_tests
from benchmarks.gpu_process import call
from tests.conftest import selects_gpu

OUTPUT = """\
collecting ... collected 5 items

tests/gpu/test_steps.py::test_bits[ormo, 7] PASSED                     [ 20%]
tests/gpu/test_steps.py::test_streams
-- what it printed --
FAILED                                                                 [ 40%]
tests/gpu/test_ipc.py::test_ipc SKIPPED (refused here)                 [ 60%]
tests/gpu/test_ipc.py::test_broken ERROR                               [ 80%]
tests/gpu/test_ipc.py::test_that_hangs """
SUMMARY = """
=========================== short test summary info ============================
SKIPPED [1] tests/gpu/test_ipc.py:8: cudaIpcOpenMemHandle is refused here
FAILED tests/gpu/test_steps.py::test_streams - AssertionError: got 1, expected 2
ERROR tests/gpu/test_ipc.py::test_broken - RuntimeError: CUDA error
"""
ABOUT: dict[str, Any] = {
    **dict.fromkeys(("driver", "torch", "cuda", "cudnn", "nccl", "triton", "python", "cpu"), "1.2"),
    "date": "2026-01-02T03:04:05+00:00",
    "card": "A card",
    "cards": 1,
    "cores": 16,
    "commit": "abcdef0123",
}


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("", False),
        ("not slow and not live", False),
        ("not gpu", False),
        ("gpus", False),
    ],
)
def test_only_an_expression_that_names_them_shows_gpus_to_tests(expression: str, shown: bool) -> None:
    config: Any = SimpleNamespace(getoption=lambda name: {"markexpr": expression}[name])
    assert selects_gpu(config) == shown


def test_the_outcome_of_tests_is_read_also_where_the_run_was_ended() -> None:
    found = gpu_tests.outcome(OUTPUT + SUMMARY)
    assert found.passed == ["tests/gpu/test_steps.py::test_bits[ormo, 7]"]
    assert found.failed == {
        "tests/gpu/test_steps.py::test_streams": "AssertionError: got 1, expected 2",
        "tests/gpu/test_ipc.py::test_broken": "RuntimeError: CUDA error",
    }
    assert found.skipped == ["tests/gpu/test_ipc.py::test_ipc"]
    assert found.skip_reasons == ["cudaIpcOpenMemHandle is refused here"]
    assert found.unfinished == ["tests/gpu/test_ipc.py::test_that_hangs"]
    text = gpu_tests.as_markdown(found.to_dict())
    assert text.startswith(
        "1 passed, 2 failed, 1 skipped.\n\nEnded from outside during `tests/gpu/test_ipc.py::test_that_hangs`."
    )
    assert "* failed: `tests/gpu/test_ipc.py::test_broken`: RuntimeError: CUDA error" in text


def test_the_outcome_of_several_processes_is_read() -> None:
    found = gpu_tests.outcome(
        "scheduling tests via LoadScheduling\n\n"
        "tests/gpu/test_a.py::test_one[a b] \n"
        "tests/gpu/test_a.py::test_two \n"
        "[gw1] [ 33%] PASSED tests/gpu/test_a.py::test_two \n"
        "tests/gpu/test_a.py::test_three \n"
        "[gw1] [ 66%] SKIPPED tests/gpu/test_a.py::test_three \n"
    )
    assert (found.passed, found.skipped) == (["tests/gpu/test_a.py::test_two"], ["tests/gpu/test_a.py::test_three"])
    assert found.unfinished == ["tests/gpu/test_a.py::test_one[a b]"]


def test_a_command_has_a_status_or_is_ended_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert call([sys.executable, "-c", "print('said'); raise SystemExit(3)"], log, 20) == 3
    assert log.read_text() == "said\n"
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('started'); time.sleep(60)"
    assert call([sys.executable, "-c", child], log, 0.6) is None
    assert "KeyboardInterrupt" in log.read_text()


def test_a_page_names_cards_failures_and_results_that_it_cannot_draw() -> None:
    outcome = gpu_tests.outcome(SUMMARY).to_dict()
    parts = {
        "tests": {"about": ABOUT, "status": "exit status 1", "reason": "1 failed", "seconds": 3.2, "result": outcome},
        "sanitizer": {
            "about": {**ABOUT, "card": "Another"},
            "status": "ok",
            "reason": None,
            "seconds": 1,
            "result": {},
            "note": "Beside",
        },
    }
    page = gpu.as_markdown({"parts": parts})
    assert "* Tests: 2026-01-02, 1 x A card, driver 1.2, torch 1.2" in page
    assert "* compute-sanitizer: 2026-01-02, 1 x Another" in page
    assert "**exit status 1**: 1 failed" in page
    assert "## compute-sanitizer\n\n**Beside**" in page
    assert "The result is in the JSON file only: KeyError: 'missing'" in page
    assert gpu_sanitizer.as_markdown({"missing": True, "tools": {}}) == "compute-sanitizer is not installed."


def test_parts_that_are_not_run_stay_in_the_record_and_are_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.gpu_machine, "about", lambda commit: {**ABOUT, "commit": commit})
    kept = {"about": ABOUT, "status": "timed out", "reason": "former", "seconds": 1.0, "result": None}
    (tmp_path / "gpu.json").write_text(json.dumps({"parts": {"paths": kept}}))

    def run(name: str, log: Path, seconds: float) -> dict[str, Any]:
        assert seconds <= gpu.PARTS[name].limit
        assert log.parent.is_dir()
        return {"status": "ok", "reason": None, "seconds": 2.0, "result": None}

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main(["--only", "server", "--into", str(tmp_path), "--commit", "1234567"]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert record["paths"] == kept
    assert record["server"]["about"]["commit"] == "1234567"
    capsys.readouterr()
    assert gpu.main(["--only", "paths", "--into", str(tmp_path), "--seconds", "0"]) == 1, "nothing was run"
    told = capsys.readouterr().out
    assert "paths: left out, the time is up" in told
    assert "timed out" not in told
    monkeypatch.setattr(gpu.gpu_machine, "about", lambda commit: {**ABOUT, "card": None, "commit": commit})
    assert gpu.main(["--into", str(tmp_path)]) == 2
