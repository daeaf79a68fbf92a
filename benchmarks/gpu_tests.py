"""Run the tests that need a GPU, and read what became of each, also where the run itself was ended."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

COMMAND = ("pytest", "-m", "gpu", "-v", "-W", "default", "-p", "no:cacheprovider", "--timeout=40", "tests/gpu")
"""Warnings are no errors, also while tests are collected: other versions of PyTorch warn of other things."""
_OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
_TEST = re.compile(r"^(tests/\S+?\.py::.*?) (?:(PASSED|FAILED|ERROR|SKIPPED)\b.*)?$")
_RESULT = re.compile(r"^(PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\]$")
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
        unfinished: The test that ran when the run was ended from outside; None where none did.
    """

    passed: list[str] = field(default_factory=list[str])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    skipped: list[str] = field(default_factory=list[str])
    skip_reasons: list[str] = field(default_factory=list[str])
    unfinished: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def outcome(output: str) -> Outcome:
    """Read the output of ``pytest -v``."""
    found, running = Outcome(), None
    for line in output.splitlines():
        if (test := _TEST.match(line)) is not None:
            running = test[1] if test[2] is None else None
            _count(found, test[1], test[2])
        elif running is not None and (result := _RESULT.match(line)) is not None:
            _count(found, running, result[1])  # what a test printed to its terminal came between
            running = None
        elif (reason := _REASON.match(line)) is not None:
            found.failed[reason[1]] = reason[2] or "see the log"
        elif (skips := _SKIPS.match(line)) is not None and skips[1] not in found.skip_reasons:
            found.skip_reasons.append(skips[1])
    found.passed = [name for name in found.passed if name not in found.failed]
    found.unfinished = running
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The numbers, and the names of what did not pass."""
    lines = [f"{len(result['passed'])} passed, {len(result['failed'])} failed, {len(result['skipped'])} skipped."]
    if result["unfinished"]:
        lines.append(f"Ended from outside during `{result['unfinished']}`.")
    rows = [f"* failed: `{name}`: {reason}" for name, reason in result["failed"].items()]
    rows += [f"* skipped: {reason}" for reason in result["skip_reasons"]]
    return "\n\n".join([*lines, *(["\n".join(rows)] if rows else [])])


def _count(found: Outcome, name: str, result: str | None) -> None:
    kind = _OUTCOMES.get(result or "")
    if kind == "passed":
        found.passed.append(name)
    elif kind == "skipped":
        found.skipped.append(name)
    elif kind == "failed":
        found.failed.setdefault(name, "see the log")
