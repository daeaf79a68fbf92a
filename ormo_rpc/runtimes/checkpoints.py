"""Writing checkpoints beside training: a state is copied under the server's lock, and written once its events are on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from ormo_rpc.config.schema import Config
from ormo_rpc.kernels.host_copies import on_host
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.runtimes.job_like import Exporter
from ormo_rpc.runtimes.recorder import Offsets, Recorder
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.journal import Journal, NoJournal

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes one checkpoint at a time; where the disk is too slow, those that become due meanwhile are skipped.

    Args:
        run_dir: The run directory.
        config: The configuration of the run.
        fingerprint: Of the run.
        exporter: Makes the content of ``model.pt``.
        executor: Writes to disk.
        recorder: Calls back when the events that led to a state are written.
        clock: The run's seconds.
        evaluations: Returns what a resumed run has to know of the evaluations so far.

    Attributes:
        journal: Begins a segment with each checkpoint.
        newest: The newest checkpoint that was written.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        fingerprint: Fingerprint,
        exporter: Exporter,
        executor: Executor,
        recorder: Recorder,
        clock: Callable[[], float],
        evaluations: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.journal: Journal = NoJournal()
        self.newest: Path | None = None
        self._run_dir = run_dir
        self._config = config
        self._fingerprint = fingerprint
        self._export = exporter
        self._executor = executor
        self._recorder = recorder
        self._clock = clock
        self._evaluations = evaluations
        self._seconds = 0.0
        """The run's seconds at the newest state."""
        self._pending = False
        """A state was copied, and waits for the events before it to be written."""
        self._writing: Future[Path] | None = None

    @property
    def busy(self) -> bool:
        """True while a checkpoint is under way."""
        return self._pending or self._writing is not None

    def submit(self, state: Mapping[str, Any], seconds: float | None = None) -> None:
        """Have a copied state written as soon as the events that led to it are; called under the server's lock.

        Args:
            state: The state.
            seconds: The run's seconds at it; now by default.
        """
        self.journal.rotate()
        self._pending = True
        self._seconds = seconds = self._clock() if seconds is None else seconds
        segment = self.journal.segment

        def start(offsets: Offsets) -> None:
            records = {
                "seconds": seconds,
                "trace_bytes": offsets.trace_bytes,
                "metrics_bytes": offsets.metrics_bytes,
                "statistics": offsets.statistics,
                **self._evaluations(),
            }
            self._writing = self._executor.submit(self._write, {**state, "session": records}, segment)
            self._pending = False

        self._recorder.call_when_written(start)

    def flush(self) -> None:
        """Take note of a checkpoint that is complete.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None and self._writing.done():
            self._wait()

    def write_again(self, state: Mapping[str, Any]) -> None:
        """Write the newest state once more, with the evaluations that were ready since; where that fails, the former stays."""
        try:
            self.write(state, self._seconds)
        except OSError as error:
            _log.warning("the last checkpoint lacks the last evaluations, as it could not be written again: %s", error)

    def write(self, state: Mapping[str, Any], seconds: float | None = None) -> None:
        """Write a state as a checkpoint, and wait until it is complete; ``seconds`` as in `submit`.

        Raises:
            OSError: it, or the one before it, could not be written.
        """
        self._recorder.flush()
        if self._writing is not None:
            self._wait()
        self.submit(state, seconds)
        self._recorder.flush()
        self._wait()

    def _wait(self) -> None:
        assert self._writing is not None
        writing, self._writing = self._writing, None
        self.newest = writing.result()

    def _write(self, state: Mapping[str, Any], segment: int) -> Path:
        """Write a checkpoint, and remove what only older ones needed; called in the executor."""
        state = on_host(state)
        keep, average = self._config.checkpoint.keep, state["ema"]
        written = checkpoint.write(
            self._run_dir,
            state,
            self._export(state),
            self._config,
            keep=keep,
            segment=segment,
            fingerprint=self._fingerprint,
            ema=None if average is None else self._export({**state, "params": average["params"]}),
        )
        self.journal.forget(checkpoint.first_segment(self._run_dir))
        self._recorder.record(Event(Kind.checkpoint, self._clock(), {"iteration": state["iteration"]}))
        return written
