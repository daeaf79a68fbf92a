"""Evaluate a run or checkpoint on the test and validation splits: ``python -m ormo_rpc.evaluate RUN_DIRECTORY``.

Of a live run that goes on, the server is asked for its present parameters, by the control plane; it goes on meanwhile, and does
not count this process as a worker.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ormo_rpc import console
from ormo_rpc.config.parsing import load_config
from ormo_rpc.config.paths import typed
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError, one_line
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.runtimes.configured import build_module, configured_evaluator
from ormo_rpc.runtimes.distributed.observer import NotReadable, present_state
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import read_fingerprint
from ormo_rpc.tasks.metrics import TaskMetric, metric_named
from ormo_rpc.worker.evaluation import Evaluation


def evaluate_checkpoint(path: Path) -> tuple[Path, Evaluation]:
    """Evaluate a checkpoint, or the newest one of a run directory, on the splits that it was not trained on.

    Returns:
        The checkpoint, and its metrics.

    Raises:
        ValueError: there is no checkpoint, it is damaged or of another model, or its data set is missing.
    """
    found = checkpoint.locate(path)
    config = load_config(found / "config.yaml")
    _refuse_own_loop(path, config)
    data = config.dataset.load_splits(config.seed)
    module = build_module(config, data)  # with the run's seed, for what model.pt does not have
    model = FlatModel(module)
    buffers = _load(model, found)
    return found, configured_evaluator(config, model, data)(model.flat_params(), buffers)


def evaluate_present(run_dir: Path) -> tuple[int, Evaluation] | None:
    """Evaluate the present parameters of a live run that goes on, as `evaluate_checkpoint` does.

    Returns:
        The iteration, with the metrics; None where no live run goes on there.

    Raises:
        NotReadable: its server cannot be asked.
        ValueError: the model or the data set is not that of the run.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        return None
    config = load_config(file)
    _refuse_own_loop(run_dir, config)
    state = present_state(run_dir, config)
    if state is None:
        return None
    data = config.dataset.load_splits(config.seed)
    model = FlatModel(build_module(config, data))
    recorded = read_fingerprint(run_dir)
    difference = recorded and recorded.layout_difference(Fingerprint.of(model.module), "the run", "now")
    if difference:
        raise ConfigError(f"{run_dir}: {difference}; evaluate it with the model that is trained")
    buffers = model.buffers.layout.views(state.buffers)
    return state.iteration, configured_evaluator(config, model, data)(state.params, buffers)


def _refuse_own_loop(path: Path, config: Config) -> None:
    """Refuse a run whose model and data are a script's.

    Raises:
        ConfigError: it is such a one.
    """
    if config.task.CHOOSES_DATA:
        raise ConfigError(
            f"{path}: got a run of a script's own loop, expected one whose model and data the configuration names; "
            f"summary.json has the metrics of its evaluations, and python -m ormo_rpc.export {path} --output model.pt writes "
            "its model"
        )


def _load(model: FlatModel, source: Path) -> dict[str, torch.Tensor]:
    """Load a checkpoint's model as the run evaluates it, by name; return all buffers, those too that it does not have.

    Raises:
        ConfigError: names or shapes differ.
    """
    state = checkpoint.read(source, checkpoint.evaluated_model(source))
    buffers = checkpoint.buffers_of(source)
    try:
        model.module.load_state_dict(state)
        same = {name: each.shape for name, each in buffers.items()} == model.buffers.layout.shapes
        reason = None if same else "model: its buffers are not those of the checkpoint"
    except RuntimeError as error:
        reason = f"model: {' '.join(str(error).split())}"
    if reason is not None:
        now = Fingerprint.of(model.module)
        reason = checkpoint.fingerprint_of(source).layout_difference(now, "the checkpoint", "now") or reason
        raise ConfigError(f"{source}: {reason}; evaluate it with the model that was trained")
    return buffers


def main() -> None:
    """Run the command line."""
    console.install()
    parser = argparse.ArgumentParser(
        prog="python -m ormo_rpc.evaluate",
        description="Print the metrics of a run or checkpoint on the test (and validation) split.",
    )
    parser.add_argument(
        "path",
        type=typed,
        help="a checkpoint, or a run directory: while a live run goes on its present parameters, else its newest checkpoint",
    )
    path: Path = parser.parse_args().path
    try:
        found, result, metrics = _evaluated(path)
    except ValueError as error:
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        console.say(f"evaluate: {kind}{error}")
        sys.exit(2)
    except Exception as error:  # a user's own model or data set may raise anything
        console.say(f"evaluate: {one_line(error)}")
        sys.exit(1)
    print(f"{found}\n{_shown('test', result.test, metrics)}")
    if result.validation is not None:
        print(_shown("validation", result.validation, metrics))


def _shown(split: str, values: Mapping[str, float], metrics: Sequence[TaskMetric]) -> str:
    """Put the metrics of a split on one line, the loss last."""
    names = sorted(values, key="loss".__eq__)
    return ", ".join(f"{split} {name} {values[name]:{metric_named(name, metrics).form}}" for name in names)


def _evaluated(path: Path) -> tuple[str, Evaluation, Sequence[TaskMetric]]:
    """Evaluate what there is; return what that is, too, and the metrics of its task."""
    try:
        present = evaluate_present(path)
        if present is not None:
            config = load_config(path / "config.yaml")
            average = "" if config.evaluate.ema is None else " (its moving average)"
            return f"{path}, iteration {present[0]}{average}, while the run goes on", present[1], config.task.all_metrics()
    except NotReadable as error:
        console.say(f"evaluate: {error}; its newest checkpoint is taken")
    found, result = evaluate_checkpoint(path)
    what = " (its moving average)" if checkpoint.evaluated_model(found) == checkpoint.EMA else ""
    return f"{found}{what}", result, load_config(found / "config.yaml").task.all_metrics()


if __name__ == "__main__":
    main()
