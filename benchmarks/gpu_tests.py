"""Run the tests that need a GPU, and read what became of each, also where the run itself was ended."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

COMMAND = ("pytest", "-m", "gpu", "-v", "-W", "default", "--tb=short", "-p", "no:cacheprovider", "--timeout=40")
"""Warnings are no errors, also while tests are collected: other versions of PyTorch warn of other things."""
PARALLEL = ("-n", "6", "--maxschedchunk", "1")
"""Most of the time is the processor's: imports, kernels that are compiled. What one process does to its context stays there."""
TESTS = "tests/gpu"
_OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
_WORDS = "|".join(_OUTCOMES)
_TEST = re.compile(rf"^(tests/\S+?\.py::.*?) (?:({_WORDS})\b.*)?$")
_OF_PROCESS = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({_WORDS}) (tests/\S+?\.py::.*?) *$")
_RESULT = re.compile(rf"^({_WORDS})\b.*\[ *\d+%\]$")
_REASON = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::.*?)?)(?: - (.*))?$")
_SKIPS = re.compile(r"^SKIPPED \[\d+\] \S+: (.*)$")


@dataclass
class Outcome:
    """The outcome of the tests.

    Attributes:
        passed: Names of tests that passed.
        failed: By name, the reason of each failure in a line.
        skipped: Names of tests that were skipped.
        skip_reasons: The different reasons of these.
        unfinished: Names of tests that ran when the run was ended from outside.
    """

    passed: list[str] = field(default_factory=list[str])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    skipped: list[str] = field(default_factory=list[str])
    skip_reasons: list[str] = field(default_factory=list[str])
    unfinished: list[str] = field(default_factory=list[str])

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def outcome(output: str) -> Outcome:
    """Read the output of ``pytest -v``, in one process or several."""
    found, running = Outcome(), dict[str, None]()
    for line in output.splitlines():
        if (test := _TEST.match(line)) is not None:
            running[test[1]] = None
            _count(found, running, test[1], test[2])
        elif (test := _OF_PROCESS.match(line)) is not None:
            _count(found, running, test[2], test[1])
        elif running and (result := _RESULT.match(line)) is not None:
            _count(found, running, [*running][-1], result[1])  # what a test printed to its terminal came between
        elif (reason := _REASON.match(line)) is not None:
            found.failed[reason[1]] = reason[2] or "see the log"
        elif (skips := _SKIPS.match(line)) is not None and skips[1] not in found.skip_reasons:
            found.skip_reasons.append(skips[1])
    found.passed = [name for name in found.passed if name not in found.failed]
    found.unfinished = [*running]
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The numbers, and the names of what did not pass."""
    lines = [f"{len(result['passed'])} passed, {len(result['failed'])} failed, {len(result['skipped'])} skipped."]
    if result["unfinished"]:
        lines.append(f"Ended from outside during {', '.join(f'`{name}`' for name in result['unfinished'])}.")
    rows = [f"* failed: `{name}`: {reason}" for name, reason in result["failed"].items()]
    rows += [f"* skipped: {reason}" for reason in result["skip_reasons"]]
    return "\n\n".join([*lines, *(["\n".join(rows)] if rows else [])])


def _count(found: Outcome, running: dict[str, None], name: str, result: str | None) -> None:
    kind = _OUTCOMES.get(result or "")
    if kind is None:
        return
    running.pop(name, None)
    if kind == "failed":
        found.failed.setdefault(name, "see the log")
    else:
        (found.passed if kind == "passed" else found.skipped).append(name)
