"""Run the tests of the kernels under NVIDIA's compute-sanitizer: ``python -m benchmarks.gpu_sanitizer``.

``memcheck`` looks for accesses outside of what was allocated, ``racecheck`` for threads of a kernel that race for its shared
memory. Neither sees a race between two streams: for that the tests repeat themselves and compare with the CPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_tests
from benchmarks.gpu_process import call
from ormo_rpc.report.table import as_markdown as table

TOOLS = ("memcheck", "racecheck")
TESTS = ("tests/gpu/test_server_steps.py",)
"""The tests whose kernels are ours."""
SOME = "triton and (dtypes0 or dtypes1)"
"""The part of them that is run: kernels take much longer under a tool."""
_SUMMARY = re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)


def executable() -> str | None:
    """The path of compute-sanitizer; None where it is not installed."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:{toolkit}")


def measure(seconds: float, tools: Sequence[str] = TOOLS, only: str = SOME) -> dict[str, Any]:
    """Run the tests under each tool: what it says last, and the outcome of the tests.

    Args:
        seconds: Time for each tool.
        tools: Those of `TOOLS` to run.
        only: An expression of ``-k`` for the tests.
    """
    program = executable()
    if program is None:
        return {"missing": True, "tools": {}}
    command = [sys.executable, "-m", *gpu_tests.COMMAND, "--timeout=0", "-k", only, *TESTS]
    return {"missing": False, "tools": {tool: _under(program, tool, command, seconds) for tool in tools}}


def _under(program: str, tool: str, command: Sequence[str], seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sanitizer_") as folder:
        log = Path(folder) / "log"
        # Without its cache PyTorch allocates each tensor by itself, so that a step past the end of one is seen.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code = call(
            [program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "9", *command],
            log,
            seconds,
            uncached,
        )
        output = log.read_text("utf-8", errors="replace")
    print(output[-4000:], flush=True)
    said = _SUMMARY.findall(output)
    return {
        "status": "timed out" if code is None else "ok" if code == 0 else f"exit status {code}",
        "summary": said[-1] if said else None,
        "seconds": round(time.monotonic() - began, 1),
        "tests": gpu_tests.outcome(output).to_dict(),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """A row for each tool."""
    if result["missing"]:
        return "compute-sanitizer is not installed."
    rows: list[tuple[str, ...]] = [("tool", "status", "its summary", "tests passed", "failed", "seconds")]
    for tool, found in result["tools"].items():
        tests = found["tests"]
        passed, failed = str(len(tests["passed"])), str(len(tests["failed"]))
        rows.append((tool, found["status"], found["summary"] or "-", passed, failed, f"{found['seconds']:.0f}"))
    return f"Tests: {', '.join(f'`{each}`' for each in TESTS)}.\n\n{table(rows)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 where a tool found something, or did not end."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--only", default=SOME, metavar="EXPRESSION", help=f"tests to run, as pytest -k; by default {SOME!r}")
    parser.add_argument("--seconds", type=float, default=50.0, help="time for each tool")
    parser.add_argument("--into", type=Path, metavar="FILE", help="file for the result as JSON")
    a = parser.parse_args(argv)
    result = measure(a.seconds, a.tools, a.only)
    if a.into is not None:
        a.into.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(as_markdown(result))
    return int(any(found["status"] != "ok" for found in result["tools"].values()))


if __name__ == "__main__":
    sys.exit(main())
