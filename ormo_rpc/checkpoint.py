"""Checkpoints: folders that appear whole or not at all, and that plain PyTorch can read.

``checkpoints/iteration_000001350/`` holds ``model.pt`` (the model's ``state_dict``: ``torch.load(..., weights_only=True)``),
``server.pt`` (all that the run depends on) and ``config.yaml``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.config import Config, ConfigError, save_config

FOLDER = "checkpoints"
_PREFIX = "iteration_"


def write(run_dir: Path, server: Mapping[str, Any], model: Mapping[str, Tensor], config: Config, *, keep: int) -> Path:
    """Write a checkpoint of a run, then remove all but the newest ``keep``.

    The folder is written under a temporary name, forced to disk, and renamed.

    Raises:
        OSError: the disk is full, or not to be written; what was there is untouched.
    """
    folder = run_dir / FOLDER
    target = folder / f"{_PREFIX}{server['iteration']:09d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    former = temporary.with_name(f"{temporary.name}.former")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, content in (("server.pt", server), ("model.pt", model)):
            with (temporary / name).open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        save_config(config, temporary / "config.yaml")
        if target.exists():  # of the same iteration: it goes only when the new one is in its place
            target.rename(former)
        temporary.rename(target)
        _sync_folder(folder)
    finally:
        if former.exists() and not target.exists():
            former.rename(target)
        for folder_left in (temporary, former):
            shutil.rmtree(folder_left, ignore_errors=True)
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def find(path: Path) -> Path:
    """The checkpoint that a path means: the path itself, or the newest one of a run directory.

    Raises:
        ConfigError: there is none.
    """
    if (path / "server.pt").is_file() or (path / "model.pt").is_file():
        return path
    complete = _complete(path / FOLDER)
    if not complete:
        raise ConfigError(
            f"{path}: got a path without a checkpoint, expected a run directory or one of its {FOLDER}/{_PREFIX}*"
        )
    return complete[-1]


def read(checkpoint: Path, name: str) -> dict[str, Any]:
    """Read ``server.pt`` or ``model.pt`` of a checkpoint; nothing but tensors and plain values is unpickled.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        return torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{checkpoint / name}: cannot be read: {reason}; take an older checkpoint") from None


def iteration_of(checkpoint: Path) -> int:
    """The iteration at which a checkpoint of a run directory was taken."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _complete(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def _sync_folder(folder: Path) -> None:
    """Force the rename to disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
