"""Write the outcome of a run with faults, for machines and for people."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from ormo_rpc.report.table import as_markdown
from ormo_rpc.storage.environment import environment
from tests.chaos import recovery_times
from tests.chaos.harness import TIMEOUT_SECONDS, Options, Result

SUMMARY_KEYS = ("status", "iterations", "incarnations", "rolled_back", "gradients_computed", "repeated", "discarded")


def write(result: Result, options: Options, folder: Path) -> None:
    """Write ``chaos-TRANSPORT.json`` and ``chaos-TRANSPORT.md``, or ``chaos-TRANSPORT-journal.*``."""
    name = f"chaos-{options.transport}{'-journal' if options.journal else ''}"
    folder.mkdir(exist_ok=True)
    machine = environment()
    content = {
        "options": asdict(options),
        "environment": {**machine, "cores": os.cpu_count()},
        "network": result.network,
        "seconds": round(result.seconds, 1),
        "checks": [asdict(check) for check in result.checks],
        "faults": [asdict(fault) for fault in result.faults],
        "times": {each: [round(value, 3) for value in values] for each, values in result.times.items()},
        "summary": {key: result.summary.get(key) for key in SUMMARY_KEYS},
    }
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    counted = Counter(fault.kind for fault in result.faults)
    faults = [("fault", "times"), *((kind, str(count)) for kind, count in sorted(counted.items()))]
    checks = [("check", "found", "holds"), *((c.name, c.figure, "yes" if c.holds else "**no**") for c in result.checks)]
    order = [("second", "iteration", "fault", "target", "outcome")]
    order += [(f"{f.seconds:.0f}", str(f.at_iteration), f.kind, f.target, f.outcome) for f in result.faults]
    head = (
        f"# Faults injected into a live run over {options.transport}{', with the journal' if options.journal else ''}\n\n"
        f"`python -m tests.chaos --transport {options.transport} --seed {options.seed} --faults {options.faults}"
        f"{' --journal' if options.journal else ''}`: "
        f"digits, MLP, OrMo, 3 workers, {result.summary.get('iterations')} iterations in {result.seconds:.0f} s, time-out "
        f"{TIMEOUT_SECONDS:g} s, a checkpoint every 2 s. Commit {machine['commit']}, torch {machine['torch']}, Python "
        f"{machine['python']}, {machine['cpu']}, {os.cpu_count()} cores. Network: {result.network}. 1 run.\n"
    )
    times = as_markdown(recovery_times.as_rows(result.times))
    parts = [head, as_markdown(checks), times, as_markdown(faults), as_markdown(order)]
    (folder / f"{name}.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")
