"""A preloader's process: ``python -m ormo_rpc.runtimes.programs.preloader``.

It imports what every process of a run needs, and then serves the requests of its launcher until that closes the connection.
Whatever is asked, this process stays as it is but for the job that it loads: a request for a process is answered by a fork.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

if __name__ == "__main__":  # not where a user's multiprocessing imports the main module of a fork again
    gc.disable()  # nothing of what is imported is garbage, and a collection takes its time
_TASKS = "/proc/self/task"
THREADS_BEFORE = len(os.listdir(_TASKS)) if os.path.isdir(_TASKS) else 1  # noqa: PTH112, PTH208 - before any import of ours

import torch  # noqa: E402 - after the count

from ormo_rpc import console  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed import memory  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed.preloading import forking, messages  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed.preloading.client import JOBS  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed.preloading.load import Loading  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed.preloading.safety import Baseline, refusal_of_generators  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed.shortages import limit_reached, reason_of_end  # noqa: E402 - after the count
from ormo_rpc.runtimes.job import LoadedJob  # noqa: E402 - after the count
from ormo_rpc.runtimes.linux import set_title  # noqa: E402 - after the count
from ormo_rpc.runtimes.programs import entry_point  # noqa: E402 - after the count
from ormo_rpc.signals import withstand  # noqa: E402 - after the count


class Program(Protocol):
    """Loads what the forks of a preloader are to have, and is their main function."""

    @property
    def keeps_random(self) -> bool:
        """True where forks draw the random numbers that this process would draw next."""
        ...

    def load(self, request: Mapping[str, Any], process: PreloaderProcess) -> Mapping[str, Any]:
        """Load what is asked for, and return the answer (`PreloaderProcess.loaded`)."""
        ...

    def main(self, arguments: list[str]) -> NoReturn:
        """Be the child with these arguments; called in a fork."""
        ...


class Jobs:
    """Loads the data and the model of a configuration (`Program`)."""

    keeps_random = False

    def __init__(self) -> None:
        self._loaded: LoadedJob | None = None

    def load(self, request: Mapping[str, Any], process: PreloaderProcess) -> Mapping[str, Any]:
        """Load a job."""
        loading = Loading(request, process.refusal_now)
        answer = loading.run()
        self._loaded = loading.loaded
        return process.loaded(request, answer, gpu_in_use=loading.gpu_in_use)

    def main(self, arguments: list[str]) -> NoReturn:
        """Run the server or a worker."""
        entry_point.main(arguments, self._loaded)


@dataclass(frozen=True)
class Fork:
    """The purpose of a forked process.

    Attributes:
        arguments: The command line of a child; None for a preloader.
        socket: The descriptor of a preloader's connection.
    """

    arguments: list[str] | None
    socket: int


class PreloaderProcess:
    """Serves one launcher.

    Args:
        sock: The connection.
        baseline: This process with its imports alone.
        refusal: The reason why it must not be forked, empty where it may be.
        program: What it loads.
    """

    def __init__(self, sock: socket.socket, baseline: Baseline, refusal: str, program: Program) -> None:
        self.sock = sock
        self.baseline = baseline
        self.refusal = refusal
        self.program = program
        self._loading: Mapping[str, Any] | None = None
        """The request for the job; what loading it has changed about this process, such as a variable, is a part of the job."""

    def serve(self) -> Fork | None:
        """Serve requests to the end of the connection; return in each fork as well, with what it is for."""
        with contextlib.suppress(EOFError, OSError):  # the launcher has closed it, perhaps in the midst of an answer
            while True:
                request, descriptors = messages.receive(self.sock)
                try:
                    answer = self._answer(request, descriptors)
                except Exception as error:  # told to the launcher; this process stays as it was
                    if not limit_reached(error):
                        traceback.print_exc()
                    answer = {"failed": reason_of_end(error)}
                if isinstance(answer, Fork):
                    self.sock.detach()  # it is closed already
                    return answer
                messages.close_all(descriptors)
                self.tell(answer)
        return None

    def tell(self, answer: Mapping[str, Any]) -> None:
        """Send an answer.

        Raises:
            OSError: the launcher has closed the connection.
        """
        messages.send(self.sock, answer)

    def refusal_now(self) -> str:
        """The reason why this process must not be forked at the moment; empty where it may be."""
        return self.refusal or self.baseline.refusal()

    def loaded(
        self, request: Mapping[str, Any], answer: Mapping[str, Any], *, gpu_in_use: bool = False, refusal: str = ""
    ) -> Mapping[str, Any]:
        """Note that what was asked for is loaded; return the answer with the reason not to fork this process.

        Args:
            request: What was asked for.
            answer: The answer to it.
            gpu_in_use: The GPU has been looked at.
            refusal: A reason that is known already.
        """
        self._loading = request
        self.refusal = self.refusal or refusal or self.baseline.refusal(gpu_in_use=gpu_in_use) or refusal_of_generators()
        return {**answer, "refusal": self.refusal}

    def _answer(self, request: Mapping[str, Any], descriptors: list[int]) -> Mapping[str, Any] | Fork:
        if "launcher" not in request:
            return self.program.load(request, self)
        if "incomplete" in request:
            return {"errno": errno.EMFILE}  # no descriptor was left for those of the request
        wanted = forking.ForkRequest(
            launcher=request["launcher"],
            name=request["name"],
            title=request["title"],
            environment=request["environment"],
            path=request["path"],
            directory=request["directory"],
            output=descriptors[0] if request["has_output"] else None,
            keeps_random=self._loading is not None and self.program.keeps_random,
        )
        if self._loading is not None:
            wanted = wanted.beside(self._loading)
        own = descriptors[1:] if request["has_output"] else descriptors
        sys.stdout.flush()  # what a fork has of it would be written twice
        sys.stderr.flush()
        try:
            number = forking.fork(wanted, own)
        except OSError as error:
            return {"errno": error.errno}
        if number > 0:
            return {"pid": number}
        if request["arguments"] is None:
            return Fork(None, own[0])
        numbers = [word for option, each in zip(request["options"], own, strict=True) for word in (option, str(each))]
        return Fork([*request["arguments"], *numbers], -1)


def serve(number: int, refusal: str, program: Program) -> NoReturn:
    """Serve the launcher at the other end of a socket, and end with the connection; be the child in a fork."""
    while True:
        withstand()
        with socket.socket(fileno=number) as sock:
            # A fork has neither the threads nor the descriptors of the process that it comes from.
            process = PreloaderProcess(sock, Baseline.now(), refusal, program)
            with contextlib.suppress(OSError):
                process.tell({"refusal": refusal})
            fork = process.serve()
        if fork is None:
            os._exit(0)
        if fork.arguments is not None:
            program.main(fork.arguments)
        number, refusal = fork.socket, process.refusal


def main(program: Program, module: str) -> NoReturn:
    """Serve as a process of its own, which the module is the program of."""
    console.install()  # for whatever a user's data or model prints
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket-fd", type=int, required=True, help="of the connection with the launcher")
    parser.add_argument("--room", help="room for the command lines of forks")
    arguments = parser.parse_args()
    set_title("ormo preloader", [sys.executable, "-P", "-m", module])
    memory.raise_oom_score(memory.PRELOADER)
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    refusal = "threads were started before ours, at the start of Python" if THREADS_BEFORE > 1 else Baseline.now().refusal()
    serve(arguments.socket_fd, refusal, program)


if __name__ == "__main__":
    main(Jobs(), JOBS.preloader)
