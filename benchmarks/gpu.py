"""Run all that needs a GPU on this machine and record it: ``python -m benchmarks.gpu``.

First the tests (``pytest -m gpu``), then the benchmarks, each in a process of its own with a limit of time; one that fails
stops none of the others. Writes ``gpu.json`` and ``gpu.md``. Each part keeps the date, card and versions that it ran with, and
parts that are not run stay as they were, so that ``--only server`` replaces one of them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_machine, gpu_tests
from benchmarks.gpu_process import call
from benchmarks.measuring import RESULTS, exit_on_sigterm


@dataclass(frozen=True)
class Part:
    """One part of the record.

    Attributes:
        title: Its heading.
        module: The benchmark, in `benchmarks`; of the tests and the sanitizer, their own module.
        limit: Seconds after which it is ended.
    """

    title: str
    module: str
    limit: float


PARTS: Mapping[str, Part] = {
    "tests": Part("Tests", "gpu_tests", 120.0),
    "server": Part("The server's step", "gpu_server_step", 90.0),
    "simulator": Part("The simulator against a plain loop", "gpu_simulator", 90.0),
    "workers": Part("Workers that share the GPU", "gpu_workers", 120.0),
    "paths": Part("The way of a push", "gpu_paths", 60.0),
    "sanitizer": Part("compute-sanitizer", "gpu_sanitizer", 120.0),
}


def words(name: str, into: Path) -> list[str]:
    """The command of a part, without the interpreter; a benchmark writes its result into the file."""
    if name == "tests":
        folder = into.with_name("tests")  # pytest cleans up its own one at the end, which can take long
        return ["-m", *gpu_tests.COMMAND, *gpu_tests.PARALLEL, f"--basetemp={folder}", gpu_tests.TESTS]
    return ["-m", f"benchmarks.{PARTS[name].module}", "--into", str(into)]


def run(name: str, log: Path, seconds: float) -> dict[str, Any]:
    """Run a part: its status, its result where it has one, and the seconds that it took."""
    with tempfile.TemporaryDirectory(prefix="gpu_part_") as folder:
        into, began = Path(folder) / "result.json", time.monotonic()
        code = call([sys.executable, *words(name, into)], log, seconds)
        took, output = time.monotonic() - began, log.read_text("utf-8", errors="replace")
        result = json.loads(into.read_text("utf-8")) if into.is_file() else None
    if name == "tests":
        result = gpu_tests.outcome(output).to_dict()
    status = "timed out" if code is None else "ok" if code == 0 else f"exit status {code}"
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
    return {"status": status, "reason": None if code == 0 else last[:500], "seconds": round(took, 1), "result": result}


def as_markdown(record: Mapping[str, Any]) -> str:
    """The page of a record."""
    measured = {name: record["parts"][name] for name in PARTS if name in record["parts"]}
    where: dict[str, list[str]] = {}
    for name, found in measured.items():
        where.setdefault(gpu_machine.in_words(found["about"]), []).append(PARTS[name].title)
    page = ["# On a GPU", "`make gpu` (`python -m benchmarks.gpu`) wrote this page; docs/gpu.md says what its parts are."]
    page.append("\n".join(f"* {', '.join(titles)}: {words}." for words, titles in where.items()))
    for name, found in measured.items():
        page += [f"## {PARTS[name].title}"]
        if found.get("note"):
            page.append(f"**{found['note']}**")
        if found["status"] != "ok":
            page.append(f"**{found['status']}**: {found['reason']}")
        if found["result"] is not None:
            page.append(_result(name, found["result"]))
        page.append(f"({found['seconds']:.0f} s)")
    return "\n\n".join(page) + "\n"


def _result(name: str, result: dict[str, Any]) -> str:
    try:
        text: str = importlib.import_module(f"benchmarks.{PARTS[name].module}").as_markdown(result)
    except Exception as error:  # a page that cannot be drawn must not lose what was measured
        return f"The result is in the JSON file only: {type(error).__name__}: {error}"
    return text.strip()


def former(file: Path) -> dict[str, Any]:
    """The record that a file has; an empty one where there is none."""
    return json.loads(file.read_text("utf-8")) if file.is_file() else {"parts": {}}


def write(record: Mapping[str, Any], folder: Path) -> None:
    """Write ``gpu.json`` and ``gpu.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(as_markdown(record), encoding="utf-8")


def arguments(argv: Sequence[str] | None) -> Namespace:
    """The arguments of the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"parts to run: {', '.join(PARTS)}")
    parser.add_argument("--sanitize", action="store_true", help="also the kernels' tests under compute-sanitizer (minutes)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for all parts together")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the results")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="folder for the output of each part; by default none")
    parser.add_argument("--note", help="circumstances of these figures, for the page, such as what else runs on the GPU")
    parser.add_argument("--commit", help="commit, where this is a copy with another history, or none")
    parser.add_argument("--anyway", action="store_true", help="run also without a GPU, where all is skipped: tries the command")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; the exit status is 1 where one of them failed."""
    a = arguments(argv)
    exit_on_sigterm()
    began, about = time.monotonic(), gpu_machine.about(a.commit)
    if about["card"] is None and not a.anyway:
        print("benchmarks.gpu: torch sees no GPU here, expected one; run this on a machine that has one", file=sys.stderr)
        return 2
    print(gpu_machine.in_words(about), flush=True)
    names = a.only or [name for name in PARTS if name != "sanitizer" or a.sanitize]
    record, ran = former(a.into / "gpu.json"), dict[str, Any]()
    with contextlib.ExitStack() as stack:
        logs = a.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_logs_")))
        logs.mkdir(parents=True, exist_ok=True)
        for name in names:
            left = a.seconds - (time.monotonic() - began)
            if left < 1:
                print(f"{name}: left out, the time is up", flush=True)
                continue
            found = run(name, logs / f"{name}.log", min(PARTS[name].limit, left))
            ran[name] = record["parts"][name] = {"about": about, "note": a.note, **found}
            write(record, a.into)  # at once: whoever ends this command keeps what is done
            print(f"{name}: {found['status']}, {found['seconds']:.0f} s", flush=True)
    print(as_markdown({"parts": ran}))
    return int(not ran or any(found["status"] != "ok" for found in ran.values()))


if __name__ == "__main__":
    sys.exit(main())
