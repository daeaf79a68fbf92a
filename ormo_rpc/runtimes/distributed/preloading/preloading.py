"""The preloaders of a launcher, and the way in which its children are started.

One preloader has the imports alone; it is started as early as possible, and serves all runs of this process. For each run
another one is forked from it, which loads and checks the job. Children are forked from the latter where that is safe, else from
the former, and then load the job themselves, else they are spawned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.lazy_import import is_loaded
from ormo_rpc.runtimes.distributed.preloading.client import JOBS, Preloader, PreloaderLost, Programs, module_path
from ormo_rpc.runtimes.distributed.shortages import reason_of_start
from ormo_rpc.runtimes.distributed.starter import Command, Process, spawn
from ormo_rpc.signals import exit_statuses

if TYPE_CHECKING:
    from ormo_rpc.config.runtimes import StartKind
    from ormo_rpc.config.schema import Config

_OF_NO_CONCERN = ("PYTHONPATH", "PWD", "OLDPWD", "HYDRA_FULL_ERROR")
"""Variables that mean nothing to what is imported; the module path is told with each request."""
_log = logging.getLogger(__name__)


class Preloading:
    """Loads the jobs of this process's runs, one after the other, and starts their children (`Starter`).

    Use it as a context, whose end ends the preloaders. It belongs to one thread.

    Args:
        programs: Of the runs.

    Attributes:
        way: The way in which children are started, for people, with the reason for it.
        report: Called with messages for people.
    """

    def __init__(self, programs: Programs = JOBS) -> None:
        self.programs = programs
        self.way = "spawn"
        self.report: Callable[[str], None] = lambda text: _log.warning("%s", text)
        self._imports: Preloader | None = None
        self._job: Preloader | None = None
        self._killed: list[Preloader] = []
        """Preloaders whose end has yet to be waited for: that of large processes takes its time."""
        self._contexts = contextlib.ExitStack()

    @property
    def _way_of_imports(self) -> str:
        return f"fork, each process {self.programs.does}"

    def __enter__(self) -> Self:
        self._contexts.enter_context(exit_statuses())
        return self

    def __exit__(self, *_: object) -> None:
        self.end_job()
        if self._imports is not None:
            self._imports.kill()
        self._await_killed()
        self._end_imports()
        self._contexts.close()

    def begin(self, threads: int) -> None:
        """Start the preloader with the imports, for runs with this number of threads, unless there is one already."""
        environment = child_environment(threads)
        if self._imports is not None and _concerning(self._imports.environment) != _concerning(environment):
            self._end_imports()
        if self._imports is None:
            self._imports = Preloader.spawned(environment, self.programs)

    def load(self, config: Config, *, starts_server: bool) -> Config:
        """Load and check the job of a run; return its configuration, with what the data set was read for.

        Args:
            config: Of the run, with the number of workers decided.
            starts_server: This launcher starts the server.

        Raises:
            ConfigError: it cannot be run; nothing was started.
            RunFailed: no preloader can be started, or lives long enough.
        """
        request = {"config": config.yaml, "starts_server": starts_server, "default_dtype": default_dtype()}
        return self.load_what(request, "data and model", threads=config.runtime.threads, start=config.live.start)

    def load_what(self, request: Mapping[str, Any], what: str, *, threads: int, start: StartKind) -> Config:
        """Load what a request asks for; return the configuration of the run.

        Args:
            request: To the preloader, without what is told to every one.
            what: The name of the preloader in messages.
            threads: Of each process.
            start: How children are to be started, as far as that is known; the configuration may know more.

        Raises:
            ConfigError: it cannot be run; nothing was started.
            RunFailed: no preloader can be started, or lives long enough.
            SystemExit: it has ended in order, and there is no run.
        """
        self.end_job()
        self._await_killed()
        try:
            return self._load(request, what, threads, start)
        except OSError as error:
            raise RunFailed(f"the process that loads {what} could not be started: {reason_of_start(error)}") from None
        except PreloaderLost as error:
            self._end_imports()
            raise RunFailed(f"the process that loads {what} was lost: {error}") from None

    def use_imports(self, config: Config) -> None:
        """Wait for the imports, from which the children of a run are forked whose job is not known here.

        Where what they run is loaded all the same, as a script is, they are forked with that.

        Raises:
            ConfigError: they were to be forked, and cannot be.
        """
        if self._job is not None:
            return
        try:
            self._ready_imports(config.runtime.threads, config.live.start)
        except PreloaderLost as error:
            self._end_imports()
            self.way = f"spawn: a preloader was lost: {error}"
        except OSError as error:
            self.way = f"spawn: a preloader could not be started: {reason_of_start(error)}"

    def __call__(self, command: Command) -> Process:
        """Start a child, in the best way that there is at the moment.

        Raises:
            OSError: it cannot be started now.
        """
        for preloader in (self._job, self._imports):
            try:
                if preloader is not None and preloader.ready(0) and not preloader.refusal:
                    return preloader.fork(command)
            except PreloaderLost as error:
                self._replace(preloader, error)
            except OSError as error:
                if error.errno != errno.ENOMEM:  # a smaller process may be forked yet, or started
                    raise
        program = (sys.executable, "-P", "-m", self.programs.child, *self.programs.words)
        return spawn(dataclasses.replace(command, arguments=[*program, *command.arguments]))

    def end_job(self) -> None:
        """End the preloader with the job of the last run; its end is waited for later."""
        job, self._job = self._job, None
        if job is not None:
            job.kill()
            self._killed.append(job)

    def _await_killed(self) -> None:
        while self._killed:
            self._killed.pop().close()

    def _load(self, request: Mapping[str, Any], what: str, threads: int, start: StartKind) -> Config:
        from ormo_rpc.config.parsing import parse_text  # not before the preloader has begun

        imports = self._ready_imports(threads, start)
        loader = imports
        if not imports.refusal:
            with contextlib.suppress(OSError):  # such as for want of memory
                loader = imports.fork_preloader()
        try:
            here = {"path": module_path(), "directory": str(Path.cwd()), "environment": child_environment(threads)}
            answer = loader.ask({**here, **request})
            for name, level, message in answer.get("log", ()):
                logging.getLogger(name).log(level, "%s", message)
            if "refused" in answer:
                raise ConfigError(answer["refused"])
            if "exited" in answer:
                raise SystemExit(answer["exited"])
            if "config" not in answer:
                raise RunFailed(f"{what} cannot be loaded: {answer.get('failed')}")
            config = parse_text(answer["config"])
            self._heed(imports, config.live.start)
            loader.refusal = imports.refusal or answer["refusal"]
            if loader is not imports and not loader.refusal:
                self._job, self.way = loader, "fork"
            elif loader is not imports and not imports.refusal:
                self.way = f"{self._way_of_imports}: {loader.refusal}"
            return config
        finally:
            if loader is imports:  # has a job of its own from now on
                self._end_imports()
            elif self._job is not loader:
                loader.close()

    def _ready_imports(self, threads: int, start: StartKind) -> Preloader:
        """Return the preloader with the imports, and note in which way it starts children."""
        self.begin(threads)
        imports = self._imports
        assert imports is not None
        if not imports.ready():
            raise PreloaderLost("its imports took too long")
        self._heed(imports, start)
        return imports

    def _heed(self, imports: Preloader, start: StartKind) -> None:
        """Note in which way children are started, as it is asked for.

        Raises:
            ConfigError: they were to be forked, and cannot be.
        """
        kind = start.value
        if kind == "spawn":
            imports.refusal = "runtime.start=spawn"
        elif imports.refusal and kind == "fork":
            raise ConfigError(f"runtime.start: got fork, expected auto or spawn: {imports.refusal}")
        self.way = f"spawn: {imports.refusal}" if imports.refusal else self._way_of_imports

    def _replace(self, lost: Preloader | None, error: PreloaderLost) -> None:
        """End a preloader that does not answer; one with the imports is started again, and ready some time later."""
        if lost is self._job:
            self.end_job()
            self.report(f"the preloader with the job was lost: {error}; each process {self.programs.does} from now on")
        else:
            environment = None if lost is None else lost.environment
            self._end_imports()
            self.report(f"the preloader was lost: {error}; processes start without it until there is another one")
            if environment is not None:
                with contextlib.suppress(OSError):
                    self._imports = Preloader.spawned(environment, self.programs)

    def _end_imports(self) -> None:
        imports, self._imports = self._imports, None
        if imports is not None:
            imports.close()


def child_environment(threads: int) -> dict[str, str]:
    """The environment of children: the module path, and the number of threads."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(module_path()),
        "PYTHONUNBUFFERED": "1",
        # Large new tensors on huge pages take a fraction of the time; torch.distributed.rpc receives each message into one.
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),
        # Whenever an agent shuts down, the others warn of closed pipes.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }


def default_dtype() -> str:
    """Torch's default dtype, which a script may have set; torch is not loaded to find out."""
    if not is_loaded("torch"):
        return "float32"
    get: Any = getattr(sys.modules["torch"], "get_default_dtype", None)  # None while another thread of ours imports it
    return "float32" if get is None else str(get()).removeprefix("torch.")


def _concerning(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _OF_NO_CONCERN}
