"""The summary of a run: every key of ``summary.json``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ormo_rpc.config.runtimes import GradientKind, SimRuntime
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.loggers.metrics import Metrics
from ormo_rpc.storage.run_directory import check_present, write_json
from ormo_rpc.tasks import Classification, TaskMetric

FILE = "summary.json"
TERMINAL_STATUSES = ("completed", "diverged")
"""The statuses of a run that has ended by itself; a signal that comes later changes nothing."""
RENAMED_KEYS: Mapping[str, str] = {"server_lives": "incarnations", "losses": "evictions"}
"""From a key of earlier versions to the present one."""

BY_NAME = "by_name"
"""The field of `Summary` that stands for several keys."""
_PREFIXES = ("train_", "test_", "val_")
"""The beginnings of these keys."""


def entry(doc: str) -> Any:
    """Declare a key of the summary."""
    return dataclasses.field(default=None, metadata={"doc": doc})


@dataclass(kw_only=True)
class Summary(Metrics):
    """The content of ``summary.json``; None where a value is unknown, or does not apply to this kind of run."""

    status: str | None = entry("completed, diverged, interrupted, failed; of a replay also differs")
    reason: str | None = entry(
        "why it diverged, was interrupted, failed or differs, ended before its last epoch, or has no evaluation"
    )

    algorithm: str | None = entry("name of the algorithm")
    scheduler: str | None = entry("name of the scheduler")
    runtime: str | None = entry("rpc, ddp, sim or replay")
    dataset: str | None = entry("name of the data set; - for synthetic gradients")
    model: str | None = entry("name of the model, or the kind of synthetic gradients")
    heterogeneity: str | None = entry("name of the heterogeneity")
    wire: str | None = entry("changes to pushes and parameters on the wire; exact where there are none")
    control: str | None = entry("carrier of the control plane: rpc (torch.distributed.rpc) or socket; live runs only")
    transports: dict[str, dict[str, str]] | None = entry("by worker, its transport and the reason why it was taken")
    devices: dict[str, str] | None = entry("by worker, the device that it computes on, a GPU with its card")
    worker_device: str | None = entry("the devices that workers compute on, each once")
    worker_gpu_bytes: int | None = entry("most memory of a GPU that the tensors of a worker's process have had at once")
    start: str | None = entry("way in which processes are started, fork or spawn, with the reason; live runs only")
    lr: float | None = entry("configured learning rate train.lr")
    seed: int | None = entry("seed of the run")
    num_workers: int | None = entry("K, workers at the start")
    parameters: int | None = entry("D, parameters of the model")

    epochs: float | None = entry("passes over the training data")
    wall_seconds: float | None = entry(
        "real seconds from the start of the launcher's process (its imports included; in a sweep or from Python: of the call; "
        "where torchrun or Slurm has started it again: the first one) to the end of all other processes; start, training and "
        "end, and the time without a server where one was restarted"
    )
    start_seconds: float | None = entry("real seconds from the same start to the first ticket")
    training_seconds: float | None = entry(
        "seconds of the run's clock, virtual ones of a simulation, from the first ticket to the last applied gradient"
    )
    end_seconds: float | None = entry("real seconds from the last applied gradient to the end of all other processes")
    virtual_seconds: float | None = entry("simulated seconds that the run took")
    rolled_back: int | None = entry("updates undone because a server process died")
    incarnations: int | None = entry("server processes that the run had")
    metrics: dict[str, dict[str, Any]] | None = entry(
        "by name, what the metrics of its evaluations mean, whether higher is better, and how a value is written"
    )
    target_metric: str | None = entry("name of the metric that evaluate.targets are values of")
    delay_within_round: bool | None = entry(
        "true where delays are but places within a round, whose gradients were all taken at the same parameters"
    )
    seconds_to: dict[str, float | None] | None = entry(
        "by target (evaluate.targets), seconds of the run's clock, virtual ones of a simulation, from the first ticket to the "
        "parameters at which the mean of the last evaluate.smooth evaluations on the test split first was as good; null: "
        "never. Of a resumed run from the first ticket of the first run"
    )
    gradients_to: dict[str, int | None] | None = entry(
        "by target, the gradients applied by then: H for a ticket of H local steps, as many as it has batches"
    )
    val_seconds_to: dict[str, float | None] | None = entry("seconds_to on the validation split, where there is one")
    val_gradients_to: dict[str, int | None] | None = entry("gradients_to on the validation split, where there is one")
    failed_evaluations: int | None = entry("evaluations that failed, see the server's log")
    evaluation_seconds: float | None = entry(
        "processor seconds that evaluations took in the last server process: in live runs beside training, unless "
        "evaluate.when=after; no time of training in simulations"
    )
    evictions: list[dict[str, Any]] | None = entry(
        "evicted workers: worker, process, host, reason, cause where the server's launcher knows it, and the tickets they held"
    )

    server_memory_bytes: int | None = entry(
        "largest proportional set size measured of the server's process: memory that n processes share counts as its nth part; "
        "live runs of more than two seconds of training"
    )
    worker_memory_bytes: int | None = entry("the same of a worker's process: the mean of up to three on the server's machine")

    server_device: str | None = entry("device of the parameters and of the algorithm's state: cpu or cuda:N")
    final_params_sha256: str | None = entry("SHA-256 of the final parameters")
    best: dict[str, Any] | None = entry("model of the best evaluation that is kept: metric, value, iteration, path")
    final_ema_sha256: str | None = entry("SHA-256 of their final moving average, with evaluate.ema")
    evaluated: str | None = entry("the parameters that evaluations use: parameters, or ema (their moving average)")
    final_buffers_sha256: str | None = entry("SHA-256 of the model's final buffers, such as batch-norm statistics")
    checkpoint: str | None = entry("the last checkpoint written")

    utilisation_per_worker: dict[str, float] | None = entry("simulation: fraction of its time that each worker computed")
    server_load: float | None = entry("simulation: fraction of the time that the server was busy")
    server_queue_seconds: float | None = entry("simulation: sum over the pushes of the time that they waited for the server")

    replayed: str | None = entry("replay: the recorded run")
    identical: bool | None = entry("replay: whether every event and the final state are the recorded ones")
    environment_differences: dict[str, list[Any]] | None = entry("replay: recorded and present value of what bits depend on")

    by_name: Mapping[str, float] = dataclasses.field(
        default_factory=dict[str, float],
        metadata={
            "doc": "train_NAME: mean of what an own loop has pushed by name, over all applied gradients; "
            "test_NAME and val_NAME: further metrics of the task"
        },
    )
    """Metrics that only this run has, each a key of its own in the file."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Summary:
        """Make a summary of the entries that were read; keys of other versions are dropped."""
        names = {field.name for field in dataclasses.fields(cls)} - {BY_NAME}
        by_name = {
            key: value
            for key, value in content.items()
            if key not in names and key.startswith(_PREFIXES) and isinstance(value, (int, float))
        }
        return cls(**{key: value for key, value in content.items() if key in names}, by_name=by_name)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``summary.json``: kind and end of the run first, metrics last."""
        metrics = {field.name for field in dataclasses.fields(Metrics)}
        names = [field.name for field in dataclasses.fields(self) if field.name != BY_NAME]
        return {**{name: getattr(self, name) for name in sorted(names, key=metrics.__contains__)}, **self.by_name}


def identity(config: Config) -> dict[str, Any]:
    """Return the entries of a summary that the configuration determines."""
    synthetic = isinstance(config.runtime, SimRuntime) and config.runtime.gradient is not GradientKind.real
    algorithm, scheduler = config.update_rule
    return {
        "algorithm": algorithm,
        "scheduler": scheduler,
        "runtime": config.runtime.name,
        "dataset": "-" if synthetic else config.dataset.known_as,
        "model": config.sim.gradient.value if synthetic else config.model.known_as,
        "heterogeneity": config.heterogeneity.name,
        "delay_within_round": config.delay_within_round,
        "wire": config.wire_form,
        "lr": config.train.lr,
        "seed": config.seed,
        "num_workers": config.num_workers,
    }


def device_entries(of_workers: Mapping[int, str], peaks: Iterable[int] = ()) -> dict[str, Any]:
    """Return the entries of a summary about the devices of workers, by their numbers, and the most memory of each."""
    return {
        "devices": {str(worker): device for worker, device in sorted(of_workers.items())} or None,
        "worker_device": ", ".join(sorted(set(of_workers.values()))) or None,
        "worker_gpu_bytes": max(peaks, default=0) or None,
    }


def described(summary: Mapping[str, Any]) -> str:
    """Write what ran in a few words, such as ``ormo (async), 1 worker, digits, mlp``."""
    workers = f"{summary['num_workers']} worker{'' if summary['num_workers'] == 1 else 's'}"
    return f"{summary['algorithm']} ({summary['scheduler']}), {workers}, {summary['dataset']}, {summary['model']}"


def metrics_as_dict(metrics: Iterable[TaskMetric]) -> dict[str, dict[str, Any]]:
    """Return the entry ``metrics`` of a summary, which `metrics_of` reads."""
    return {each.name: {key: value for key, value in dataclasses.asdict(each).items() if key != "name"} for each in metrics}


def metrics_of(summary: Mapping[str, Any]) -> tuple[TaskMetric, ...]:
    """Return the metrics of a run's evaluations, the loss first; those of classification where an earlier version wrote it."""
    found: Mapping[str, Mapping[str, Any]] | None = summary.get("metrics")
    if found is None:
        return Classification().metrics()
    known = {field.name for field in dataclasses.fields(TaskMetric)}
    return tuple(
        TaskMetric(name=name, **{key: value for key, value in each.items() if key in known}) for name, each in found.items()
    )


def write_summary(run_dir: Path, summary: Summary) -> dict[str, Any]:
    """Write ``summary.json`` in one step, and return its content.

    Raises:
        OSError: the disk is full or read-only.
        RunFailed: the run directory is gone.
    """
    check_present(run_dir)
    content = summary.to_dict()
    write_json(run_dir / FILE, content)
    return content


def extend_summary(run_dir: Path, summary: Mapping[str, Any], wall_seconds: float) -> dict[str, Any]:
    """Count the end of the processes that ended after the server had written its summary; return the content.

    Args:
        run_dir: The run directory; where it cannot be written any more, the server's summary stays.
        summary: As `read_summary` returns it.
        wall_seconds: The seconds of the run by now.
    """
    content = {**summary, "wall_seconds": wall_seconds}
    if summary.get("end_seconds") is not None:
        content["end_seconds"] = summary["end_seconds"] + wall_seconds - summary["wall_seconds"]
    with contextlib.suppress(OSError):
        write_json(run_dir / FILE, content)
    return content


def forget_summary(run_dir: Path) -> None:
    """Remove the summary of a run that continues in its directory."""
    (run_dir / FILE).unlink(missing_ok=True)


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """Read ``summary.json``, also one with keys of earlier versions; None where there is none yet.

    Raises:
        ConfigError: it is damaged.
    """
    file = run_dir / FILE
    if not file.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    return {RENAMED_KEYS.get(key, key): value for key, value in content.items()}


def unfinished_summary(config: Config, status: str, reason: str, wall_seconds: float) -> Summary:
    """Make the summary of a run whose server process could not write one."""
    return Summary(**identity(config), status=status, reason=reason, wall_seconds=wall_seconds)
