"""A worker's process: from reply to push until it is told to stop."""

from __future__ import annotations

import time

import torch.distributed.rpc as rpc
from omegaconf import OmegaConf
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public

from ormo_rpc.config import Config, parse_config
from ormo_rpc.job import Job, time_generator
from ormo_rpc.messages import Reply
from ormo_rpc.runtimes.rpc.connection import SERVER, rpc_group, say_ready
from ormo_rpc.runtimes.rpc.service import deliver, published, say_goodbye, say_hello
from ormo_rpc.worker import Worker


def work(store: Store, *, rank: int, world_size: int, timeout_seconds: float) -> None:
    """Be one worker of a run from start to end.

    Args:
        store: Where the server is found, and the configuration.
        rank: The rank in the RPC group; the worker's number is one less.
        world_size: Workers plus one.
        timeout_seconds: For the start.
    """
    config = parse_config(OmegaConf.to_container(OmegaConf.create(store.get("config").decode())))  # pyright: ignore[reportArgumentType] # a mapping
    job = Job(config)
    worker = job.worker()
    worker.warm_up()
    say_ready(store, rank)
    with rpc_group(store, rank=rank, world_size=world_size, timeout_seconds=timeout_seconds):
        store.wait(["service"])
        _work(config, worker, rank - 1, timeout_seconds)


def _work(config: Config, worker: Worker, number: int, start_timeout_seconds: float) -> None:
    service = rpc.rpc_sync(SERVER, published)
    speed = time_generator(config, number)
    reply: Reply = say_hello(service, number, start_timeout_seconds)
    while reply.ticket is not None:
        began = time.monotonic()
        push = worker.compute(reply)
        slowdown = config.heterogeneity.slowdown(number, config.num_workers, speed)
        time.sleep((slowdown - 1) * (time.monotonic() - began))
        reply = deliver(service, push, worker.payload, timeout_seconds=config.rpc.rpc_timeout_seconds)
    say_goodbye(service, number, config.rpc.stop_timeout_seconds)
