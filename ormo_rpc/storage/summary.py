"""What the summary of every run says, also of a run whose server could not write one."""

from __future__ import annotations

from typing import Any

from ormo_rpc.config.runtimes import GradientKind, SimRuntime
from ormo_rpc.config.schema import Config

SUMMARY_KEYS = (
    *(
        "status",
        "reason",
        "algorithm",
        "scheduler",
        "runtime",
        "dataset",
        "model",
        "heterogeneity",
        "wire",
        "lr",
        "seed",
        "num_workers",
    ),
    *("parameters", "iterations", "gradients_computed", "discarded", "rolled_back", "server_lives", "repeated", "epochs"),
    *("train_loss", "test_loss", "test_accuracy", "wall_seconds", "virtual_seconds", "updates_per_second"),
    *("delay_mean", "delay_max", "delay_median", "delay_99_percent", "pushes_per_worker"),
    *("lock_wait_seconds", "lock_held_seconds", "step_seconds", "final_params_sha256", "final_buffers_sha256", "checkpoint"),
)
"""What every summary has at least."""


def unfinished_summary(config: Config, status: str, reason: str) -> dict[str, Any]:
    """The summary of a run whose server could not write one: what the configuration tells, and None for the rest."""
    return {**dict.fromkeys(SUMMARY_KEYS), **identity(config), "status": status, "reason": reason}


def identity(config: Config) -> dict[str, Any]:
    """What kind of run it is."""
    synthetic = isinstance(config.runtime, SimRuntime) and config.runtime.gradient is not GradientKind.real
    return {
        "algorithm": config.algorithm.name,
        "scheduler": config.scheduler.name,
        "runtime": config.runtime.name,
        "dataset": "-" if synthetic else config.dataset.name,
        "model": config.sim.gradient.value if synthetic else config.model.name,
        "heterogeneity": config.heterogeneity.name,
        "wire": config.wire_form,
        "lr": config.train.lr,
        "seed": config.seed,
        "num_workers": config.num_workers,
    }
