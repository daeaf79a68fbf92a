"""Checkpoints: folders that appear whole or not at all, and that plain PyTorch can read.

``checkpoints/iteration_000001350/`` holds ``model.pt`` (the model's ``state_dict``: ``torch.load(..., weights_only=True)``),
``server.pt`` (all that the run depends on), ``config.yaml``, and ``manifest.json`` with the SHA-256 of the others, so that one
that is torn or damaged is recognised before anything of it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.config.parsing import save_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError

FOLDER = "checkpoints"
FORMAT = 2
"""Of the folder; another one is refused."""
_MANIFEST = "manifest.json"
_PREFIX = "iteration_"
_log = logging.getLogger(__name__)


def write(
    run_dir: Path, server: Mapping[str, Any], model: Mapping[str, Tensor], config: Config, *, keep: int, segment: int = 0
) -> Path:
    """Write a checkpoint of a run, then remove all but the newest ``keep``.

    The folder is written under a temporary name, forced to disk, and renamed.

    Args:
        run_dir: The run directory.
        server: Content of ``server.pt``, with the key ``iteration``.
        model: Content of ``model.pt``.
        config: The run's configuration.
        keep: How many checkpoints are kept.
        segment: The number of the journal's segment that begins with this state.

    Raises:
        OSError: the disk is full, or not to be written; what was there is untouched.
    """
    folder = run_dir / FOLDER
    target = folder / f"{_PREFIX}{server['iteration']:09d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    former = temporary.with_name(f"{temporary.name}.former")
    _tidy(folder)
    temporary.mkdir(parents=True)
    try:
        for name, content in (("server.pt", server), ("model.pt", model)):
            with (temporary / name).open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        save_config(config, temporary / "config.yaml")
        _write_manifest(temporary, server["iteration"], segment)
        if target.exists():  # of the same iteration: it goes only when the new one is in its place
            target.rename(former)
        temporary.rename(target)
        _sync_folder(folder)
    finally:
        if former.exists() and not target.exists():
            former.rename(target)
        for folder_left in (temporary, former):
            shutil.rmtree(folder_left, ignore_errors=True)
    # A damaged newer one, which this run had to pass over, does not count.
    for old in [each for each in complete(run_dir) if iteration_of(each) <= iteration_of(target)][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def find(path: Path) -> Path:
    """The checkpoint that a path means: the path itself, or the newest good one of a run directory.

    Of a run directory, those that are damaged are passed over with a warning.

    Raises:
        ConfigError: there is none, or the one that the path names is damaged.
    """
    if (path / "server.pt").exists() or (path / _MANIFEST).exists():
        fault = damage(path)
        if fault is not None:
            raise ConfigError(f"{fault}; take another checkpoint")
        return path
    found = newest(path)
    if found is not None:
        return found
    raise ConfigError(
        f"{path}: got a path without a good checkpoint, expected a run directory or one of its {FOLDER}/{_PREFIX}*"
    )


def newest(run_dir: Path) -> Path | None:
    """The newest good checkpoint of a run directory; None where there is none. Damaged ones are named in a warning."""
    for candidate in reversed(complete(run_dir)):
        fault = damage(candidate)
        if fault is None:
            return candidate
        _log.warning("%s; it is passed over for an older one", fault)
    return None


def segment_of(checkpoint: Path) -> int:
    """The number of the journal's segment that begins with a good checkpoint."""
    return json.loads((checkpoint / _MANIFEST).read_bytes())["segment"]


def first_segment(run_dir: Path) -> int:
    """The first segment of the journal that any checkpoint of a run directory needs; one without a manifest needs none."""
    found: list[int] = []
    for candidate in complete(run_dir):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # nobody will go on from it, as `damage` tells
            found.append(segment_of(candidate))
    return min(found, default=0)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None where they are as they were written."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"{checkpoint}: format: got {manifest['format']}, expected {FORMAT}"
        for name, wanted in manifest["sha256"].items():
            if _sha256(checkpoint / name) != wanted:
                return f"{checkpoint / name}: is damaged: its SHA-256 is not the one in {_MANIFEST}"
    except OSError as error:
        return f"{checkpoint}: is incomplete: {error.strerror}: {Path(error.filename or '').name}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{checkpoint / _MANIFEST}: is damaged: it is not what we write"
    return None


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


def _tidy(folder: Path) -> None:
    """Remove what a writer that was killed has left; a checkpoint that it had moved aside gets its name again."""
    for left in folder.glob(f".{_PREFIX}*"):
        target = folder / left.name.removeprefix(".").split(".")[0]
        if left.suffix == ".former" and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _write_manifest(folder: Path, iteration: int, segment: int) -> None:
    content = {
        "format": FORMAT,
        "iteration": iteration,
        "segment": segment,
        "sha256": {name: _sha256(folder / name) for name in ("server.pt", "model.pt", "config.yaml")},
    }
    with (folder / _MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def complete(run_dir: Path) -> list[Path]:
    """The checkpoints of a run directory that were written to their end, oldest first."""
    return sorted(path for path in (run_dir / FOLDER).glob(f"{_PREFIX}*") if path.is_dir())


def _sync_folder(folder: Path) -> None:
    """Force the rename to disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
