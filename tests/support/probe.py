"""A callback of hydra that writes down what the launcher of a sweep holds after each of its jobs."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from typing_extensions import override


class Probe(Callback):
    """Named by ``+hydra.callbacks.probe._target_``; writes a file for each job into the folder of the sweep."""

    @override
    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        file = Path(config.hydra.sweep.dir, f"held_after_{config.hydra.job.num}.json")
        file.write_text(json.dumps(held()))


def held() -> dict[str, Any]:
    """Everything of this process that a job might leave behind."""
    descriptors: list[str] = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:  # of the list itself
            continue
        descriptors.append(re.sub(r"\[\d+\]", "", target))  # the numbers of pipes and sockets
    numbers = [n for file in Path("/proc/self/task").glob("*/children") for n in file.read_text().split()]
    return {
        "descriptors": sorted(descriptors),
        "children": sorted(Path(f"/proc/{number}/comm").read_text().strip() for number in numbers),  # also of zombies
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "handlers": {name: str(signal.getsignal(getattr(signal, name))) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")},
        "variables": dict(os.environ),
        "directory": str(Path.cwd()),
        "umask": Path("/proc/self/status").read_text().partition("Umask:")[2].split()[0],
    }
