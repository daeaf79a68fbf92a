"""Compare start, recovery and end of live runs of two checkouts, interleaved: ``make bench-startup ARGS="BEFORE"``.

BEFORE is the folder of a checkout, such as ``git worktree add BEFORE COMMIT`` makes; AFTER is this one. In each round each part
is measured for both, one directly after the other, and the order alternates. What takes long is measured in fewer rounds
(``--few``). Figures are medians with the lowest and the highest. Writes ``results/startup.json`` and ``.md`` after each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.before_after import Checkout
from benchmarks.machine import in_words, load
from benchmarks.measuring import RESULTS, ROOT, conditions, exit_on_sigterm, spread
from benchmarks.startup_parts import PARTS, figures_of
from ormo_rpc.report.table import as_markdown


def measure(checkouts: Sequence[Checkout], parts: Sequence[str], rounds: int, few: int) -> Iterator[list[dict[str, Any]]]:
    """Measure the parts for each checkout in turn, in each round in the opposite order; yield all after each round."""
    found: list[dict[str, Any]] = []
    turns = [(number, name) for number in range(rounds) for name in parts if number < few or not PARTS[name].dear]
    with tqdm(total=len(turns) * len(checkouts), unit="measurement") as bar:
        for number in range(rounds):
            for name in [name for turn, name in turns if turn == number]:
                for checkout in checkouts if number % 2 == 0 else [*reversed(checkouts)]:
                    bar.set_description(f"round {number + 1} of {rounds}, {name}, {checkout.name}")
                    about = {"checkout": checkout.name, "round": number, "load": load()[0]}
                    try:
                        found.append({**about, "figures": figures_of(PARTS[name], checkout)})
                    except RuntimeError as error:  # the others are measured all the same
                        found.append({**about, "figures": {}, "failure": f"{name}: {error}"})
                    bar.update()
            yield found


def values(measurements: Sequence[Mapping[str, Any]], name: str, figure: str) -> list[float]:
    """A figure of a checkout, round by round."""
    return [each["figures"][figure] for each in measurements if each["checkout"] == name and figure in each["figures"]]


def as_text(content: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    measurements = content["measurements"]
    table = [("", "before", "after", "before to after", "rounds")]
    for figure in dict.fromkeys(figure for each in measurements for figure in each["figures"]):
        before, after = (values(measurements, name, figure) for name in ("before", "after"))
        form = ",.0f" if max(before, default=0.0) >= 1000 else ".2f"
        times = f"{statistics.median(before) / statistics.median(after):.1f}" if before and after else "-"
        table.append((figure, spread(before, form), spread(after, form), times, str(len(after))))
    loads = {"load at start": content["load_at_start"], "load at end": content["load_at_end"]}
    text = [
        *(f"# Start, recovery and end of live runs, before and after, {content['date'][:10]}", ""),
        *(f"Before: {content['before']}. After: {content['after']}.", ""),
        *(in_words({**content["machine"], "torch": content["versions"]["torch"], **loads}), ""),
        "Seconds where nothing else is said, on the default data set (digits); of commands from their start to their end.",
        *("Interleaved: medians, with the lowest and the highest.", "", as_markdown(table)),
        *(f"\nNot measured: {each['failure']}" for each in measurements if "failure" in each),
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of the checkout before the change")
    parser.add_argument("--after", type=Path, default=ROOT, metavar="FOLDER", help="checkout after it; by default this one")
    parser.add_argument("--python", type=Path, default=sys.executable, metavar="FILE", help="the interpreter of both")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--few", type=int, default=3, help="rounds of what takes long (%(default)s)")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    a = parser.parse_args()
    exit_on_sigterm()
    checkouts = [Checkout(name=name, folder=getattr(a, name).resolve(), python=a.python) for name in ("before", "after")]
    content: dict[str, Any] = {**conditions(), **{checkout.name: checkout.commit() for checkout in checkouts}}
    try:
        for checkout in checkouts:
            checkout.check()
        for measurements in measure(checkouts, a.parts, a.rounds, a.few):
            content |= {"measurements": measurements, "load_at_end": load()}
            a.into.mkdir(parents=True, exist_ok=True)
            (a.into / "startup.json").write_text(json.dumps(content, indent=1) + "\n")
            (a.into / "startup.md").write_text(as_text(content))
    except RuntimeError as error:
        sys.exit(f"startup: {error}")
    print(as_text(content))


if __name__ == "__main__":
    main()
