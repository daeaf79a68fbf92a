"""The job of a run, loaded and checked in a preloader."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.config.parsing import parse_text
from ormo_rpc.config.runtimes import DdpRuntime
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes import prepare
from ormo_rpc.runtimes.distributed.oom_kills import OomKills
from ormo_rpc.runtimes.distributed.preloading.forking import apart
from ormo_rpc.runtimes.distributed.preloading.safety import gpu_is_lost
from ormo_rpc.runtimes.distributed.shortages import MEMORY
from ormo_rpc.runtimes.job import Job, LoadedJob


class Loading:
    """Loads the job of a launcher's request.

    Args:
        request: Its ``config`` is YAML; ``path``, ``directory``, ``environment`` and ``default_dtype`` are the launcher's, and
            ``starts_server`` tells that it starts the server.
        refusal: Returns the reason why this process must not be forked at the moment; where it is empty, what may start threads
            is done in a process that is thrown away.

    Attributes:
        loaded: The job.
        gpu_in_use: The GPU has been looked at, so that no fork of this process can use it.
    """

    def __init__(self, request: Mapping[str, Any], refusal: Callable[[], str]) -> None:
        self._request = request
        self._refusal = refusal
        self.loaded: LoadedJob | None = None
        self.gpu_in_use = False

    def run(self) -> dict[str, Any]:
        """Load the job, and return the answer: ``config`` or ``refused``, and the records of the ``log``."""
        request, records = self._request, Records()
        settle(request)
        torch.set_default_dtype(getattr(torch, request["default_dtype"]))
        try:
            with _silence():
                config = parse_text(request["config"])  # the launcher has shown what the user's modules print at import
            job = prepare.check(config, starts_server=request["starts_server"], apart=self._apart(records))
            assert isinstance(job, Job)
            job.fingerprint()  # once for all processes
            job.push_format()
            job.prepare_models(1)  # a server has three: to evaluate, to export, and to compare
            if isinstance(job.config.runtime, DdpRuntime):
                importlib.import_module("torch._dynamo")  # DistributedDataParallel does, in a second of each rank's processor
            self.loaded = LoadedJob(job.config.yaml, job)
            return {"config": self.loaded.text, "log": records.rows}
        except ConfigError as error:
            return {"refused": str(error), "log": records.rows}
        finally:
            records.close()

    def _apart(self, records: Records) -> Callable[[Callable[[], None]], None]:
        """Return a caller of functions, each where it leaves nothing behind but its log, and raises its refusal."""

        def run(function: Callable[[], None]) -> None:
            if self._refusal():  # threads of OpenMP, say, which a fork would wait for without end
                function()
                return
            kills = OomKills()
            try:
                answer = apart(lambda: _answer(function, records))
            except ChildProcessError as error:
                cause = kills.cause(1) if str(error).endswith(signal.SIGKILL.name) else ""
                why = f", {cause}; {MEMORY}" if cause else ""
                raise ConfigError(f"model: the process that tried a batch {error}{why}") from None
            self.gpu_in_use = answer["gpu_is_lost"]
            records.rows += answer["log"]
            if answer["refused"] is not None:
                raise ConfigError(answer["refused"])
            if self.gpu_in_use:
                function()

        return run


def _answer(function: Callable[[], None], records: Records) -> dict[str, Any]:
    """Run the function, unless that cannot tell anything about a process that is not forked."""
    records.rows.clear()
    refused, lost = None, gpu_is_lost()
    try:
        if not lost:
            function()
    except ConfigError as error:
        refused = str(error)
    return {"refused": refused, "log": records.rows, "gpu_is_lost": lost}


def settle(request: Mapping[str, Any]) -> None:
    """Take over the launcher's module path, environment, directory and number of threads."""
    sys.path[:] = request["path"]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@contextlib.contextmanager
def _silence() -> Generator[None]:
    """Let nothing be seen that is printed; who has kept one of the streams, such as a logger, can go on with it afterwards."""
    with contextlib.ExitStack() as stack, Path(os.devnull).open("wb") as nowhere:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            former = os.dup(number)
            stack.callback(os.close, former)
            stack.callback(os.dup2, former, number)
            stack.callback(stream.flush)
            os.dup2(nowhere.fileno(), number)
        yield


class Records(logging.Handler):
    """Keeps what is logged until it is closed, for the launcher to log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.rows: list[tuple[str, int, str]] = []
        logger = logging.getLogger("ormo_rpc")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.rows.append((record.name, record.levelno, record.getMessage()))

    @override
    def close(self) -> None:
        logging.getLogger("ormo_rpc").removeHandler(self)
        super().close()
