"""A worker of a region, in a process of its own: from the region's server by a pipe, and back.

The region's process starts it as ``python -m ormo_rpc.runtimes.distributed.worker_process.region_worker DESCRIPTOR``. The end
of the pipe is its end.
"""

from __future__ import annotations

import functools
import pickle
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from ormo_rpc.algorithms._regions import TwoLevels
from ormo_rpc.config.parsing import parse_text
from ormo_rpc.data.tickets import TicketParts
from ormo_rpc.kernels.page_locked import zeros
from ormo_rpc.runtimes.configured import computing_device, time_generator
from ormo_rpc.runtimes.job import Job
from ormo_rpc.worker.heterogeneity import cpu_seconds


def main(descriptor: int) -> None:
    """Compute the pushes for the replies that come, until the pipe is closed.

    Args:
        descriptor: The file descriptor of the pipe. The first message is the configuration as YAML, the folder of the data set
            or None, and the number that this worker's speed is drawn for.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the region ends it, after its ticket
    with Connection(descriptor) as pipe:
        try:
            text, data_root, number = pickle.loads(pipe.recv_bytes())  # noqa: S301 - of the process that started this one
            config = parse_text(text, data_root=data_root)
            assert isinstance(config.algorithm, TwoLevels)
            torch.set_num_threads(config.runtime.threads)
            job = Job(config)
            device = computing_device(config, number)
            worker = job.worker(functools.partial(zeros, page_locked=device.type == "cuda"), device)
            worker.epochs = TicketParts(job.epochs, config.algorithm.region_parts)
            worker.warm_up()
            speed = time_generator(config, number)
            pipe.send_bytes(_packed(None))
            while True:
                reply = pickle.loads(pipe.recv_bytes())  # noqa: S301 - as above
                began = cpu_seconds()
                push = worker.compute(reply)
                time.sleep((config.slowdown(number, speed) - 1) * (cpu_seconds() - began))
                pipe.send_bytes(_packed(push))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the region has ended


def _packed(message: Any) -> bytes:
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
