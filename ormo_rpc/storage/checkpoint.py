"""Checkpoints: folders that appear in one step, and that plain PyTorch can read.

``checkpoints/iteration_000001350/`` holds ``model.pt`` (the model's ``state_dict``: ``torch.load(..., weights_only=True)``),
``model_ema.pt`` (the same with the moving average in the place of the parameters, where there is one), ``server.pt`` (all that
the run depends on), ``config.yaml``, and ``manifest.json`` with the SHA-256 of the others, so that a torn or damaged checkpoint
is recognised before anything of it is used, and with the fingerprint of model and data, so that nothing is loaded into another
model. Beside them ``best`` may be kept, see `ormo_rpc.storage.best`.
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

from ormo_rpc.config.parsing import save_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.models.fingerprint import Fingerprint

FOLDER = "checkpoints"
FORMAT = 3
"""The format of the folder, in its manifest; another one is refused."""
SERVER, MODEL, EMA, BUFFERS = "server.pt", "model.pt", "model_ema.pt", "buffers.pt"
MANIFEST = "manifest.json"
_PREFIX = "iteration_"
BEST = "best"
_log = logging.getLogger(__name__)


def write(
    run_dir: Path,
    server: Mapping[str, Any],
    model: Mapping[str, torch.Tensor],
    config: Config,
    *,
    keep: int,
    segment: int = 0,
    fingerprint: Fingerprint | None = None,
    ema: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint of a run, then remove all but the newest ``keep``; return its folder.

    The folder is written under a temporary name, forced to disk, and renamed.

    Args:
        run_dir: The run directory.
        server: Content of ``server.pt``, with the key ``iteration``.
        model: Content of ``model.pt``.
        config: The run's configuration.
        keep: The number of checkpoints to keep.
        segment: The journal's segment that begins with this state.
        fingerprint: Of the run; an empty one by default.
        ema: Content of ``model_ema.pt``; there is none by default.

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints are untouched.
    """
    target = run_dir / FOLDER / f"{_PREFIX}{server['iteration']:09d}"
    models = {MODEL: model} if ema is None else {MODEL: model, EMA: ema}
    numbers = {"iteration": server["iteration"], "segment": segment}
    write_folder(target, {SERVER: server, **models}, config, numbers, fingerprint or Fingerprint())
    # A damaged newer checkpoint, which this run could not resume from, does not count.
    for old in [each for each in complete(run_dir) if iteration_of(each) <= iteration_of(target)][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def write_folder(
    target: Path,
    tensors: Mapping[str, Mapping[str, Any]],
    config: Config,
    entries: Mapping[str, Any],
    fingerprint: Fingerprint,
) -> None:
    """Write a folder in one step, in the place of a former one, which is removed only once the new one is there.

    Args:
        target: Where it will be; the folder above is made where its own one is there.
        tensors: What `torch.save` writes, by name of the file.
        config: The run's configuration.
        entries: Further entries of the manifest.
        fingerprint: Of the run.

    Raises:
        OSError: the disk is full or read-only; the former folder is untouched.
    """
    folder = target.parent
    temporary = folder / f".{target.name}.{os.getpid()}"
    former = temporary.with_name(f"{temporary.name}.former")
    remove_leftovers(folder, target.name if target.name == BEST else _PREFIX)
    folder.mkdir(exist_ok=True)  # in the run directory, which is not made again where it was deleted
    temporary.mkdir()
    try:
        for name, content in tensors.items():
            with (temporary / name).open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        save_config(config, temporary / "config.yaml")
        _write_manifest(temporary, entries, fingerprint)
        if target.exists():
            target.rename(former)
        temporary.rename(target)
        _sync_folder(folder)
    finally:
        if former.exists() and not target.exists():
            former.rename(target)
        for leftover in (temporary, former):
            shutil.rmtree(leftover, ignore_errors=True)


def locate(path: Path) -> Path:
    """Return the checkpoint at a path, or the newest intact checkpoint of the run directory at a path.

    Damaged checkpoints of a run directory are skipped with a warning.

    Raises:
        ConfigError: there is none, or the path is that of a damaged checkpoint.
    """
    if (path / "server.pt").exists() or (path / MANIFEST).exists():
        damage = damage_of(path)
        if damage is not None:
            raise ConfigError(f"{damage}; take another checkpoint")
        return path
    found = newest(path)
    if found is not None:
        return found
    reason = "".join(f"; {damage_of(candidate)}" for candidate in complete(path)[-1:])
    raise ConfigError(
        f"{path}: got a path without an intact checkpoint, expected a run directory or one of its {FOLDER}/{_PREFIX}*{reason}"
    )


def run_directory_of(path: Path) -> Path:
    """Return the run directory of a path that `locate` takes."""
    return path.parent.parent if path.parent.name == FOLDER else path


def newest(run_dir: Path) -> Path | None:
    """Return the newest intact checkpoint of a run directory, or None; damaged ones are skipped with a warning."""
    for candidate in reversed(complete(run_dir)):
        damage = damage_of(candidate)
        if damage is None:
            return candidate
        _log.warning("%s; an older checkpoint is used instead", damage)
    return None


def complete(run_dir: Path) -> list[Path]:
    """List the completely written checkpoints of a run directory, oldest first; they may have been damaged since."""
    return sorted(path for path in (run_dir / FOLDER).glob(f"{_PREFIX}*") if path.is_dir())


def iteration_of(checkpoint: Path) -> int:
    """Return the iteration of a checkpoint of a run directory."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def segment_of(checkpoint: Path) -> int:
    """Return the number of the journal's segment that begins with an intact checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_bytes())["segment"]


def gradients_in(checkpoint: Path) -> int:
    """Return the number of gradients that an intact checkpoint's state has, whatever its folder is called."""
    return json.loads((checkpoint / MANIFEST).read_bytes())["iteration"]


def fingerprint_of(checkpoint: Path) -> Fingerprint:
    """Return the fingerprint of the run that wrote an intact checkpoint."""
    return Fingerprint.from_dict(json.loads((checkpoint / MANIFEST).read_bytes())["fingerprint"])


def check_fingerprint(checkpoint: Path, fingerprint: Fingerprint) -> None:
    """Refuse to load an intact checkpoint into another model, or for another data set.

    Raises:
        ConfigError: names, shapes, frozen values or the data set differ from the checkpoint's.
    """
    then = fingerprint_of(checkpoint)
    difference = then.difference(fingerprint, "the checkpoint", "this run", buffer_values=False)
    if difference is not None:
        raise ConfigError(f"checkpoint.resume: {difference}; resume with model and data as they were in {checkpoint}")


def first_segment(run_dir: Path) -> int:
    """Return the first segment of the journal that any checkpoint needs; one without a readable manifest needs none."""
    found: list[int] = []
    for candidate in complete(run_dir):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # nothing resumes from it: `damage_of` says so
            found.append(segment_of(candidate))
    return min(found, default=0)


def damage_of(checkpoint: Path) -> str | None:
    """Describe the damage to a checkpoint's files; None where they are as they were written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"{checkpoint}: format: got {manifest['format']}, expected {FORMAT}; another version of ormo_rpc wrote it"
        for name, expected in manifest["sha256"].items():
            if _sha256(checkpoint / name) != expected:
                return f"{checkpoint / name}: is damaged: its SHA-256 is not the one in {MANIFEST}"
    except OSError as error:
        return f"{checkpoint}: is incomplete: {error.strerror}: {Path(error.filename or '').name}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{checkpoint / MANIFEST}: is damaged: it is not a manifest of this format"
    return None


def evaluated_model(checkpoint: Path) -> str:
    """Return the file of the model as the run's evaluations use it: of the moving average, where there is one."""
    return EMA if (checkpoint / EMA).exists() else MODEL


def buffers_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read all buffers by name, also those that a ``state_dict`` leaves out.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    kept = (checkpoint / BUFFERS).exists()  # of a best model, which has no server
    return read(checkpoint, BUFFERS) if kept else read(checkpoint, SERVER)["buffers"]


def read(checkpoint: Path, name: str) -> dict[str, Any]:
    """Read a file of tensors of a checkpoint; nothing but tensors and plain values is unpickled.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        return torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{checkpoint / name}: cannot be read: {reason}; take an older checkpoint") from None


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove what a killed writer has left of folders with such names; one that it had moved aside gets its name back."""
    for leftover in folder.glob(f".{prefix}*"):
        target = folder / leftover.name.removeprefix(".").split(".")[0]
        if leftover.suffix == ".former" and not target.exists():
            leftover.rename(target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _write_manifest(folder: Path, entries: Mapping[str, Any], fingerprint: Fingerprint) -> None:
    content = {
        "format": FORMAT,
        **entries,
        "fingerprint": fingerprint.to_dict(),
        "sha256": {file.name: _sha256(file) for file in sorted(folder.iterdir())},
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Force the rename to disk, where the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
