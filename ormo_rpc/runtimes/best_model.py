"""Keeping the model of the best evaluation of a run, beside training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ormo_rpc.kernels.host_copies import on_host
from ormo_rpc.runtimes.job_like import JobLike
from ormo_rpc.runtimes.ranking import Ranking
from ormo_rpc.storage import best
from ormo_rpc.worker.evaluation import Evaluation


class BestModel:
    """Writes a model that is better than the one in the run directory; called by the thread that evaluates.

    Args:
        job: The run.
        run_dir: Its directory.
        ranking: Compares evaluations.
    """

    def __init__(self, job: JobLike, run_dir: Path, ranking: Ranking) -> None:
        self._job = job
        self._run_dir = run_dir
        self._ranking = ranking
        self._export = job.exporter()
        self._record: best.Record | None = None

    def begin(self, source: Path | None, iteration: int) -> None:
        """Take note of the model that is there, or take over that of the run that is resumed.

        Args:
            source: The directory of that run; None where there is none, or this process continues in its own.
            iteration: Gradients applied so far.
        """
        best.recover(self._run_dir)
        if source is not None:
            best.copy(source, self._run_dir, metric=self._ranking.name, iteration=iteration)
        self._record = best.read(self._run_dir)

    def consider(
        self, iteration: int, evaluation: Evaluation, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]
    ) -> None:
        """Keep what was evaluated, if it is better than what is kept.

        Raises:
            ConfigError: the evaluation has no such metric.
            OSError: it cannot be written.
        """
        value, kept = self._ranking.value_of(evaluation), self._record
        if not self._ranking.better(value, None if kept is None else kept.value):
            return
        record = best.Record(
            metric=self._ranking.name,
            value=value,
            iteration=iteration,
            evaluated="parameters" if self._job.config.evaluate.ema is None else "ema",
            test=evaluation.test,
            validation=evaluation.validation,
        )
        params, buffers = on_host((params, buffers))
        model = self._export({"params": params, "buffers": buffers})
        best.write(self._run_dir, record, model, buffers, self._job.config, self._job.fingerprint())
        self._record = record

    def summary_entry(self) -> dict[str, Any] | None:
        """Return the entry ``best`` of the summary."""
        return None if self._record is None else best.entries_of(self._record, self._run_dir)
