"""Snapshots that wait on disk for their evaluation, with ``evaluate.when=after``."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ormo_rpc.kernels.host_copies import on_host

_FOLDER = "snapshots"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Parameters at one moment of a run.

    Attributes:
        iteration: Gradients applied.
        seconds: The run's clock.
        params: The parameters, or their moving average, shape (D,).
        buffers: The buffers by name.
    """

    iteration: int
    seconds: float
    params: torch.Tensor
    buffers: Mapping[str, torch.Tensor]


class LaterSnapshots:
    """The folder ``snapshots`` of a run directory, with one file for each snapshot: 4 D bytes in float32, and the buffers.

    A server that takes over goes on with those that are there.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / _FOLDER
        self._taken: list[Path] = []

    def begin(self, iteration: int) -> None:
        """Remove the snapshots of later iterations, which a crash has undone."""
        for file in self._files():
            if int(file.stem) > iteration:
                file.unlink()

    def last(self, iteration: int) -> int:
        """Return the iteration of the newest snapshot that is not later than an iteration; 0 where there is none."""
        return max((at for file in self._files() if (at := int(file.stem)) <= iteration), default=0)

    def write(self, snapshot: Snapshot) -> None:
        """Write a snapshot, in one step.

        Raises:
            OSError: the disk is full or read-only.
        """
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"{snapshot.iteration:012}.pt"
        temporary = file.with_suffix(".tmp")
        content = on_host({"seconds": snapshot.seconds, "params": snapshot.params, "buffers": dict(snapshot.buffers)})
        try:
            torch.save(content, temporary)
            temporary.replace(file)
        except RuntimeError as error:  # torch's own for a disk that is full
            raise OSError(f"{file}: cannot be written: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def taken(self) -> Generator[Snapshot]:
        """Yield the snapshots in order; those for which the next one was asked for are removed by `forget_taken`."""
        for file in self._files():
            content: dict[str, Any] = torch.load(file, weights_only=True)
            yield Snapshot(iteration=int(file.stem), **content)
            self._taken.append(file)

    def forget_taken(self) -> None:
        """Remove the snapshots that were taken, once what they gave is in a checkpoint; until then a server may start again."""
        for file in self._taken:
            file.unlink(missing_ok=True)
        self._taken.clear()
        if not self._files():
            with contextlib.suppress(OSError):  # what a killed process left
                shutil.rmtree(self._folder)

    def __len__(self) -> int:
        """The number of snapshots."""
        return len(self._files())

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.pt"))
