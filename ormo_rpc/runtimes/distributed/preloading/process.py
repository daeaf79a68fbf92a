"""A preloader's process: ``python -m ormo_rpc.runtimes.distributed.preloading.process``.

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
from typing import Any, NoReturn

if __name__ == "__main__":  # not where a user's multiprocessing imports the main module of a fork again
    gc.disable()  # nothing of what is imported is garbage, and a collection takes its time
_TASKS = "/proc/self/task"
_THREADS_BEFORE = len(os.listdir(_TASKS)) if os.path.isdir(_TASKS) else 1  # noqa: PTH112, PTH208 - before any import of ours

import torch  # noqa: E402 - after the count

from ormo_rpc import console  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed import entry_point, memory  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed.linux import set_title  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed.preloading import forking, messages  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed.preloading.client import PROGRAM  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed.preloading.load import Loading  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed.preloading.safety import Baseline, refusal_of_generators  # noqa: E402 - after the count
from ormo_rpc.runtimes.distributed.shortages import limit_reached, reason_of_end  # noqa: E402 - after the count
from ormo_rpc.runtimes.job import LoadedJob  # noqa: E402 - after the count
from ormo_rpc.signals import withstand  # noqa: E402 - after the count


class PreloaderProcess:
    """Serves one launcher.

    Args:
        sock: The connection.
        baseline: This process with its imports alone.
        refusal: The reason why it must not be forked, empty where it may be.
    """

    def __init__(self, sock: socket.socket, baseline: Baseline, refusal: str) -> None:
        self.sock = sock
        self.baseline = baseline
        self.refusal = refusal
        self.loaded: LoadedJob | None = None
        self._loading: Mapping[str, Any] | None = None
        """The request for the job; what loading it has changed about this process, such as a variable, is a part of the job."""

    def run(self) -> None:
        """Serve requests, to the end of the connection."""
        with contextlib.suppress(EOFError, OSError):  # the launcher has closed it, perhaps in the midst of an answer
            messages.send(self.sock, {"refusal": self.refusal})
            while True:
                request, descriptors = messages.receive(self.sock)
                try:
                    answer = self._answer(request, descriptors)
                except Exception as error:  # told to the launcher; this process stays as it was
                    if not limit_reached(error):
                        traceback.print_exc()
                    answer = {"failed": reason_of_end(error)}
                finally:
                    messages.close_all(descriptors)
                messages.send(self.sock, answer)

    def _answer(self, request: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
        if "config" in request:
            return self._load(request)
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
        )
        if self._loading is not None:
            wanted = wanted.beside(self._loading)
        own = descriptors[1:] if request["has_output"] else descriptors

        def run() -> NoReturn:
            self.sock.detach()  # it is closed already
            if request["arguments"] is None:
                serve(own[0], self.refusal)
            numbers = [word for option, each in zip(request["options"], own, strict=True) for word in (option, str(each))]
            entry_point.main([*request["arguments"], *numbers], self.loaded)
            os._exit(0)

        try:
            return {"pid": forking.fork(wanted, own, run)}
        except OSError as error:
            return {"errno": error.errno}

    def _load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        loading = Loading(request, lambda: self.refusal or self.baseline.refusal())
        answer = loading.run()
        self.refusal = self.refusal or self.baseline.refusal(gpu_in_use=loading.gpu_in_use) or refusal_of_generators()
        self.loaded, self._loading = loading.loaded, request
        return {**answer, "refusal": self.refusal}


def serve(number: int, refusal: str) -> NoReturn:
    """Serve the launcher at the other end of a socket, and end with the connection."""
    withstand()
    with socket.socket(fileno=number) as sock:
        # A fork has neither the threads nor the descriptors of the process that it comes from.
        PreloaderProcess(sock, Baseline.now(), refusal).run()
    os._exit(0)


def main() -> NoReturn:
    """Serve as a process of its own."""
    console.install()  # for whatever a user's data or model prints
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket-fd", type=int, required=True, help="of the connection with the launcher")
    parser.add_argument("--room", help="room for the command lines of forks")
    arguments = parser.parse_args()
    set_title("ormo preloader", [sys.executable, "-P", "-m", PROGRAM])
    memory.raise_oom_score(memory.PRELOADER)
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    refusal = "threads were started before ours, at the start of Python" if _THREADS_BEFORE > 1 else Baseline.now().refusal()
    serve(arguments.socket_fd, refusal)


if __name__ == "__main__":
    main()
