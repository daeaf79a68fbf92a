"""The model of the best evaluation of a run: ``checkpoints/best``, a folder that appears, and is replaced, in one step.

It holds ``model.pt`` (a ``state_dict``, of the moving average where the run has one), ``buffers.pt`` (all buffers by name, as a
``state_dict`` may leave some out), ``config.yaml``, and ``manifest.json`` with the entries of the `Record`. A run cannot be
resumed from it, as it has no state of the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.checkpoint import BEST, BUFFERS, FOLDER, MANIFEST, MODEL

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Record:
    """The evaluation of the model.

    Attributes:
        metric: The metric by which it is the best, such as ``val_loss``.
        value: Its value.
        iteration: Gradients applied to what was evaluated.
        evaluated: ``parameters``, or ``ema`` for their moving average.
        test: All metrics on the test split.
        validation: Those on the validation split; None where there is none.
    """

    metric: str
    value: float
    iteration: int
    evaluated: str
    test: Mapping[str, float]
    validation: Mapping[str, float] | None = None


def write(
    run_dir: Path,
    record: Record,
    model: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    config: Config,
    fingerprint: Fingerprint,
) -> Path:
    """Write the best model of a run, in the place of a former one; return its folder.

    Raises:
        OSError: the disk is full or read-only; the former one is untouched.
    """
    target = run_dir / FOLDER / BEST
    entries = {"iteration": record.iteration, "best": dataclasses.asdict(record)}
    checkpoint.write_folder(target, {MODEL: model, BUFFERS: buffers}, config, entries, fingerprint)
    return target


def recover(run_dir: Path) -> None:
    """Put in order what a killed writer of this run has left; called where no other process writes."""
    checkpoint.remove_leftovers(run_dir / FOLDER, BEST)


def read(run_dir: Path) -> Record | None:
    """Read the record of a run's best model; None where it has none, or a damaged one."""
    folder = run_dir / FOLDER / BEST
    if not folder.is_dir() or checkpoint.damage_of(folder) is not None:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Record(**json.loads((folder / MANIFEST).read_bytes())["best"])
    return None


def copy(source: Path, run_dir: Path, *, metric: str, iteration: int) -> None:
    """Take over the best model of the run that another one resumes, unless it is of a later iteration or by another metric.

    Args:
        source: The run directory that it is in.
        run_dir: The directory of the run that resumes.
        metric: The metric by which the run compares.
        iteration: Where it resumes.

    Raises:
        OSError: it cannot be copied.
    """
    record = read(source)
    if record is None or record.metric != metric:
        return
    if record.iteration > iteration:
        _log.warning(
            "the best model of %s, %s=%g, is of iteration %d, which the run resumes before: the best one is that of its "
            "evaluations from iteration %d on",
            *(source, metric, record.value, record.iteration, iteration),
        )
        return
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = folder / f".{BEST}.copy"
    shutil.copytree(source / FOLDER / BEST, temporary)
    temporary.rename(folder / BEST)


def refuse(found: Path) -> None:
    """Refuse to resume from a folder that has a model, but no state of the server.

    Raises:
        ConfigError: the folder has no state of the server.
    """
    if not (found / checkpoint.SERVER).exists():
        run = checkpoint.run_directory_of(found)
        raise ConfigError(
            f"checkpoint.resume: got {found}, which has a model and not the state of a server; expected {run}, or one of its "
            f"{FOLDER}/iteration_*"
        )


def entries_of(record: Record, run_dir: Path) -> dict[str, Any]:
    """Return the entry ``best`` of a summary."""
    return {
        "metric": record.metric,
        "value": record.value,
        "iteration": record.iteration,
        "path": str(run_dir / FOLDER / BEST),
    }
