"""Facts about this machine and checkout that decide about the bits of a run."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Commit, versions, processor and threads of this process, as the header of a trace records them."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **arithmetic(),
        "threads": torch.get_num_threads(),
    }


def arithmetic() -> dict[str, Any]:
    """Torch, the processor, and the instructions that torch takes of it: they decide how a random draw is rounded."""
    return {"torch": torch.__version__, "cpu": _cpu(), "capability": torch.backends.cpu.get_cpu_capability()}


def _commit() -> str | None:
    """Return the commit of the checkout of this package, with ``+changes`` where files differ; None outside of a checkout."""
    package = Path(__file__).parents[1]
    try:
        head = _git(package, "rev-parse", "HEAD")
        return head + ("+changes" if _git(package, "status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True)  # noqa: S607 - whichever git the user has
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
