"""Loggers: metrics of a run, and the places besides the run directory where they are shown meanwhile."""

from __future__ import annotations

from ormo_rpc.loggers.base import Logger, RunInfo, RunLog
from ormo_rpc.loggers.none import NoLogger
from ormo_rpc.loggers.progress import ProgressBar
from ormo_rpc.loggers.wandb import WandbLogger, end_service

__all__ = ["Logger", "NoLogger", "RunInfo", "RunLog", "WandbLogger", "end_service", "start_logs"]


def start_logs(logger: Logger, run: RunInfo, terminal: int | None) -> list[RunLog]:
    """Start the logger and, where ``logger.progress`` is set and there is a terminal, the progress bar.

    Args:
        logger: The logger.
        run: The run to be logged.
        terminal: A file descriptor of the terminal, if there is one.
    """
    bar = [ProgressBar(run.total_iterations, terminal, run.metric)] if logger.progress and terminal is not None else []
    return [logger.start(run), *bar]
