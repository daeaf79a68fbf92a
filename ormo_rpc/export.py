"""Export the model of a run: ``python -m ormo_rpc.export RUN_DIRECTORY --output model.safetensors``.

The file is a plain ``state_dict``, for ``torch.load`` (``.pt``, ``.pth``) or for safetensors (``.safetensors``); neither needs
this package to be read, and the configuration of the run, or its script, is not needed to write it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ormo_rpc import console
from ormo_rpc.config.paths import typed
from ormo_rpc.errors import ConfigError, one_line
from ormo_rpc.storage import best, checkpoint


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A model that was exported.

    Attributes:
        source: The checkpoint, or the folder of the best model.
        iteration: Gradients applied to it.
        averaged: The model has the moving average of the parameters.
        tensors: The number of tensors in the file.
        elements: Their elements.
    """

    source: Path
    iteration: int
    averaged: bool
    tensors: int
    elements: int


def export(
    path: Path, output: Path, *, best_model: bool = False, averaged: bool | None = None, overwrite: bool = False
) -> Exported:
    """Write the model of a run to a file, in one step.

    Args:
        path: A run directory, of which the newest checkpoint is taken, or a checkpoint.
        output: The file; its ending is the format.
        best_model: Take the model of the run's best evaluation.
        averaged: Take the moving average of the parameters (True), or the parameters (False); by default what the run
            evaluates, which is the average where it has one.
        overwrite: Replace a file that exists.

    Raises:
        ConfigError: there is no such model, or the file cannot be written.
    """
    write = _WRITERS.get(output.suffix)
    if write is None:
        raise ConfigError(f"--output: got {output}, expected a file that ends with one of {', '.join(_WRITERS)}")
    if output.exists() and not overwrite:
        raise ConfigError(f"--output: {output} exists; give another name, or --overwrite")
    source = _best_of(path) if best_model else checkpoint.locate(path)
    name, is_average = _model(source, averaged)
    state = checkpoint.read(source, name)
    iteration = checkpoint.gradients_in(source)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        write(state, temporary, {"format": "pt", "iteration": str(iteration)})
        temporary.replace(output)
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written: {error.strerror or one_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
    tensors = [each for each in state.values() if isinstance(each, torch.Tensor)]
    return Exported(
        source=source,
        iteration=iteration,
        averaged=is_average,
        tensors=len(tensors),
        elements=sum(each.numel() for each in tensors),
    )


def _best_of(path: Path) -> Path:
    run = checkpoint.run_directory_of(path)
    if best.read(run) is None:
        raise ConfigError(f"--best: {run} has no model of its best evaluation; a run with checkpoint.best=true keeps it")
    return run / checkpoint.FOLDER / checkpoint.BEST


def _model(source: Path, averaged: bool | None) -> tuple[str, bool]:
    """Return the file of the model in a checkpoint, and whether that is a moving average.

    Raises:
        ConfigError: it has none of this kind.
    """
    record = best.read(checkpoint.run_directory_of(source)) if source.name == checkpoint.BEST else None
    if record is not None:
        average = record.evaluated == "ema"
        if averaged is False and average:
            raise ConfigError(f"--parameters: {source} has the moving average alone, as that was evaluated")
        if averaged and not average:
            raise ConfigError(_no_average(source))
        return checkpoint.MODEL, average
    if averaged and not (source / checkpoint.EMA).exists():
        raise ConfigError(_no_average(source))
    name = checkpoint.MODEL if averaged is False else checkpoint.evaluated_model(source)
    return name, name == checkpoint.EMA


def _no_average(source: Path) -> str:
    return f"--ema: {source} has no moving average of the parameters; a run with evaluate.ema=0.999 keeps one"


def _write_torch(state: Mapping[str, Any], file: Path, _: Mapping[str, str]) -> None:
    with file.open("wb") as stream:
        torch.save(dict(state), stream)
        stream.flush()
        os.fsync(stream.fileno())


def _write_safetensors(state: Mapping[str, Any], file: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors that lie in the same memory once; the metadata have each further name with the one that is kept.

    That is the convention of ``safetensors.torch.load_model``. A part of another tensor is written by itself.

    Raises:
        ConfigError: there is something else than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kept: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"--output: {name} of the model is a {type(value).__name__}, which safetensors cannot hold, expected tensors "
                "alone; export it as .pt"
            )
        same = kept.setdefault((value.data_ptr(), value.shape, value.stride(), value.dtype), name) if value.numel() else name
        if same != name:
            ties[name] = same
            continue
        storage = value.untyped_storage().data_ptr()
        tensors[name] = value.clone(memory_format=torch.contiguous_format) if storage in storages else value.contiguous()
        storages.add(storage)
    try:
        save_file(tensors, file, {**metadata, **ties})
    except SafetensorError as error:  # of the system, in its words
        raise OSError(str(error)) from error
    except (ValueError, KeyError, RuntimeError) as error:  # such as a dtype that it does not know
        raise ConfigError(f"--output: safetensors cannot hold the model: {one_line(error)}; export it as .pt") from error


_WRITERS: Mapping[str, Callable[[Mapping[str, Any], Path, Mapping[str, str]], None]] = {
    ".pt": _write_torch,
    ".pth": _write_torch,
    ".safetensors": _write_safetensors,
}
"""By the ending of the file."""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ormo_rpc.export") -> None:
    """Run the command line.

    Args:
        arguments: What stands behind the command; by default this process's.
        prog: The command.
    """
    console.install()
    parser = argparse.ArgumentParser(
        prog=prog, description="Write the model of a run to a file, as a plain state_dict for PyTorch or safetensors."
    )
    parser.add_argument("path", type=typed, help="a run directory, of which the newest checkpoint is taken, or a checkpoint")
    parser.add_argument(
        "--output", type=typed, required=True, metavar="FILE", help="its ending is the format: .pt, .pth or .safetensors"
    )
    parser.add_argument("--best", action="store_true", help="the model of the best evaluation (checkpoint.best=true)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_true", help="the moving average (evaluate.ema), which is the default where it is")
    which.add_argument("--parameters", action="store_true", help="the parameters, where there is a moving average as well")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    given = parser.parse_args(arguments)
    averaged = True if given.ema else False if given.parameters else None
    try:
        done = export(given.path, given.output, best_model=given.best, averaged=averaged, overwrite=given.overwrite)
    except ConfigError as error:
        console.say(f"export: {error}")
        sys.exit(2)
    what = "moving average" if done.averaged else "parameters"
    sys.stdout.write(
        f"{given.output}: {done.tensors} tensors with {done.elements} elements, {what} at iteration {done.iteration} of "
        f"{done.source}\n"
    )


if __name__ == "__main__":
    main()
