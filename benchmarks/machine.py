"""Describe what figures depend on: the machine, the versions, and the load."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from ormo_rpc.storage.environment import environment

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def machine() -> dict[str, Any]:
    """The hardware and the operating system."""
    return {
        "cpu": environment()["cpu"],
        "cores": os.cpu_count(),
        "caches": caches(),
        "memory_gigabytes": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "huge_pages": _chosen(HUGE_PAGES / "enabled"),
        "huge_pages_of_shared_memory": _chosen(HUGE_PAGES / "shmem_enabled"),
    }


def versions(packages: Mapping[str, Path]) -> dict[str, Any]:
    """The commit and versions, also of packages in environments of their own.

    Args:
        packages: The folder of the environment by the package's name; one that does not exist is left out.
    """
    own = environment()
    found = {key: own[key] for key in ("commit", "python", "torch", "capability")}
    for name, folder in packages.items():
        for path in folder.glob(f"lib/python*/site-packages/{name}-*.dist-info"):
            found[name] = path.name.removeprefix(f"{name}-").removesuffix(".dist-info")
    return found


def load() -> list[float]:
    """The load averages of the last one, five and fifteen minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def caches(folder: Path = CACHES) -> dict[str, str]:
    """Sizes of the data caches of a core by level; empty if the system does not report them."""
    found: dict[str, str] = {}
    for index in sorted(folder.glob("index*")):
        kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def in_words(about: Mapping[str, Any]) -> str:
    """All of it on one line."""
    parts: list[str] = []
    for key, value in about.items():
        plain = value
        if isinstance(value, Mapping):
            plain = " ".join(f"{name} {each}" for name, each in value.items())
        elif isinstance(value, list):
            plain = " ".join(str(each) for each in value)
        parts.append(f"{key.replace('_', ' ')} {plain}")
    return ", ".join(parts)


def _chosen(file: Path) -> str | None:
    """The word in brackets, which is how Linux marks the active choice."""
    found = re.search(r"\[(\w+)\]", file.read_text()) if file.is_file() else None
    return found[1] if found else None
