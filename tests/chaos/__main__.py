"""Inject random faults into a live run and check the guarantees of ``docs/guarantees.md``: ``python -m tests.chaos``.

Kills, stops and disconnects processes of a run at random moments, checks the guarantees from what the run has recorded, and
measures how long it takes to evict and to replace a worker. Where network namespaces can be made (Linux, root), the run lives
in one of its own, and an elastic worker in another one works for it over a network that fails, too. Writes
``results/chaos-TRANSPORT.json`` and ``.md`` (``chaos-TRANSPORT-journal.*`` with ``--journal``); exits with status 1 if a
guarantee is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

from tests.chaos import recovery_times, results
from tests.chaos.faults import KINDS, OWN_FAULTS
from tests.chaos.harness import Options, run_with_faults
from tests.chaos.plan import CYCLE, SHORT
from tests.chaos.run import ROOT, ChaosError


def main() -> None:
    """Run the command line."""
    options, run_dir, into = _parse()
    with contextlib.ExitStack() as stack:
        if run_dir is None:
            run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos_"))) / "run"
        try:
            result = run_with_faults(options, run_dir, bar=True)
        except ChaosError as error:
            sys.exit(f"chaos: {error}\nchaos: the seed is {options.seed}; keep the run directory with --run-dir DIRECTORY")
    for line in (*result.checks, *("  ".join(row) for row in recovery_times.as_rows(result.times))):
        print(line)
    results.write(result, options, into)
    if not all(check.holds for check in result.checks):
        sys.exit(1)


def _parse() -> tuple[Options, Path | None, Path]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Inject random faults into a live run.")
    default = Options()
    add = parser.add_argument
    add("--faults", type=int, default=default.faults, help="number of faults injected from outside (%(default)s)")
    add("--seed", type=int, default=default.seed, help="of their order, iterations and victims (%(default)s)")
    add("--gradients", type=int, default=default.gradients, help="for each fault (%(default)s)")
    add("--seconds", type=float, default=default.seconds, help="longest time between two faults (%(default)s)")
    add("--transport", default=default.transport, help="of the run: auto, shm, gloo, rpc or tcp (%(default)s)")
    add("--journal", action="store_true", help="make gradients durable before they are acknowledged")
    add("--short", action="store_true", help=f"{', '.join(SHORT)}, in about a minute")
    add("--only", nargs="+", choices=sorted(KINDS), default=CYCLE, metavar="KIND", help=f"of {', '.join(KINDS)}")
    add("--no-network", action="store_true", help="without network namespaces, even where they can be made")
    add("--run-dir", type=Path, help="keep the run directory here (it must not exist)")
    add("--into", type=Path, default=ROOT / "results", metavar="FOLDER", help="folder of the results")
    given = parser.parse_args()
    faults = len(SHORT) if given.short else given.faults
    options = Options(
        faults=faults,
        seed=given.seed,
        gradients=given.gradients,
        seconds=given.seconds,
        journal=given.journal,
        transport=given.transport,
        kinds=SHORT if given.short else tuple(given.only),
        least=min(30, faults + len(OWN_FAULTS)),
        namespaces=not given.no_network,
    )
    return options, given.run_dir, given.into


if __name__ == "__main__":
    main()
