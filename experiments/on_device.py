"""Device and precision of the runs of an experiment: their overrides, and the machine in words."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import gpu_machine
from ormo_rpc.storage.environment import environment

MACHINE = "machine.json"
"""The GPU and its machine, in the folder of the runs."""
ON_DEVICE = {
    "cpu": ("worker.channels_last=true",),
    "cuda": (
        *("worker.device=cuda", "server.device=cuda", "worker.cuda_graph=true", "worker.channels_last=true"),
        "worker.data_on_device=true",
    ),
}
"""Further overrides of the runs, by device."""
PRECISIONS = {
    "bf16": {"cpu": ("worker.autocast=bf16",), "cuda": ("worker.autocast=bf16",)},
    "float32": {"cpu": ("worker.compile=inductor",), "cuda": ()},
}
"""Overrides of the runs, by precision of the passes and device."""


def note_machine(work: Path, about: Mapping[str, Any]) -> None:
    """Keep what a GPU and its machine are beside the runs, as results may be written elsewhere.

    Whoever knows more, such as what else has run on the GPU, may add an entry ``note``, which is kept.
    """
    file = work / MACHINE
    former = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    note = {"note": former["note"]} if "note" in former else {}
    file.write_text(json.dumps({**about, **note}, indent=1) + "\n", encoding="utf-8")


def machine_of(a: Namespace) -> dict[str, Any]:
    """The machine of the runs: with a GPU the one that was kept beside them; else this one."""
    kept = a.work / MACHINE
    return json.loads(kept.read_text("utf-8")) if a.device != "cpu" and kept.is_file() else environment()


def machine_in_words(machine: Mapping[str, Any]) -> str:
    """Device, precision and versions in a sentence."""
    if "card" not in machine:
        return f"torch {machine['torch']}, {machine['cpu']}, 1 thread, channels last"
    at_once = "one run at a time" if machine["jobs"] == 1 else f"{machine['jobs']} runs at once"
    note = f" {machine['note']}." if "note" in machine else ""
    return (
        f"Data, workers and server on a GPU, each gradient one captured graph, channels last, {at_once}.{note} "
        f"{gpu_machine.in_words({**machine})}"
    )
