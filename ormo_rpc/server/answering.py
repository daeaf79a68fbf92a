"""Answers of the parameter server: the workers that get their next ticket now, and the reply to each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ormo_rpc.algorithms.base import PullContext
from ormo_rpc.errors import RunFailed
from ormo_rpc.messages import Reply, no_buffers
from ormo_rpc.server.events import Kind

if TYPE_CHECKING:
    from ormo_rpc.server.parameter_server import ParameterServer


def answer(server: ParameterServer) -> list[Reply]:
    """Reply to all workers that are released and not held, with a ticket while there is one, or to stop at the end.

    Where no worker would compute then, as the algorithm holds all that wait, its round is ended with what there is.

    Raises:
        RunFailed: the algorithm holds workers all the same, or the scheduler releases nobody although nobody computes.
    """
    enough = _enough(server)
    server.members.release(server.assignments.holding, everyone=server.ended)
    replies = _replies(server, enough)
    stuck = not server.assignments.holding and enough and not server.ended and not server.assignments.exhausted
    if stuck and _held(server):
        server.end_round()
        still = _held(server)
        if still:
            raise RunFailed(
                f"algorithm {server.algorithm.name}: held returned {still} after flush although no worker computes, expected "
                f"nobody"
            )
        replies += _replies(server, enough)
    return replies


def cancel(server: ParameterServer) -> None:
    """Take back the tickets that are void by now; their workers wait for new ones."""
    workers = [worker for worker in server.algorithm.cancelled() if worker in server.assignments.holding]
    for worker in workers:
        for assignment in server.assignments.take_back(worker):
            place = {"ticket": assignment.ticket, "stamp": assignment.stamp, "bucket": assignment.bucket}
            server.events.add(Kind.cancel, worker=worker, **place)
        server.members.take_back(worker)
    if workers:
        server.on_cancel(workers)


def _held(server: ParameterServer) -> list[int]:
    """Return the workers that wait and are held."""
    held = server.algorithm.held()
    return [worker for worker in server.members.idle if worker in held]


def _replies(server: ParameterServer, enough: bool) -> list[Reply]:
    """Reply to the idle workers that are not held, as long as there is work."""
    held = () if server.ended else server.algorithm.held()
    replies: list[Reply] = []
    for worker in list(server.members.idle):
        if not server.ended and (server.assignments.exhausted or not enough):
            break
        if worker in held:
            continue
        reply = _reply(server, worker)
        if reply is not None:
            server.members.answer(reply)
            replies.append(reply)
    return replies


def _reply(server: ParameterServer, worker: int) -> Reply | None:
    """Make the reply to a worker; None if there is no ticket for it now."""
    ticket, loss_scale, lr = None, 1.0, 0.0
    if not server.ended:
        if server.loss_scale is not None:
            loss_scale = server.loss_scale.value
        fresh = server.assignments.issued
        lr = server.lr(server.iteration)
        assignment = server.assignments.assign(
            worker, server.iteration, server.buckets.current, server.algorithm.version, server.members, loss_scale, lr
        )
        if assignment is None:
            return None
        ticket = assignment.ticket
        server.newest_bucket = max(server.newest_bucket, assignment.bucket)
        kind = Kind.issue if ticket >= fresh else Kind.reissue
        server.events.add(kind, worker=worker, ticket=ticket, stamp=assignment.stamp, bucket=assignment.bucket)
    return Reply(
        worker=worker,
        ticket=ticket,
        stamp=server.iteration,
        params=server.snapshots.sent() if ticket is None else _params_for(server, worker, lr),
        lr=lr,
        steps=server.algorithm.steps,
        incarnation=server.incarnation,
        loss_scale=loss_scale,
        buffers=no_buffers() if ticket is None else server.buffers.snapshot(),
    )


def _params_for(server: ParameterServer, worker: int, lr: float) -> torch.Tensor:
    """Return what the algorithm sends this worker: the snapshot that replies of one stamp share, or its own vectors."""
    context = PullContext(worker=worker, concurrency=server.concurrency, lr=lr, bucket=server.buckets.current)
    began = server.timer()
    outgoing = server.algorithm.outgoing(context)
    params = server.snapshots.sent() if outgoing is server.params else server.snapshots.copy(outgoing)
    server.step_seconds += server.timer() - began
    return params


def _enough(server: ParameterServer) -> bool:
    """Tell if there are ``min_workers``, and record when that changes."""
    enough = len(server.members) >= server.min_workers
    if enough == server.paused and not server.ended:
        server.paused = not enough
        kind = Kind.proceed if enough else Kind.pause
        server.events.add(kind, concurrency=len(server.members), minimum=server.min_workers)
    return enough
