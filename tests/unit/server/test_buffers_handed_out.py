"""The buffers in replies: those of the reply's stamp, shared until they change, and never changed afterwards."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from ormo_rpc import build_server
from ormo_rpc.messages import Push, Reply
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.buffers import averages
from tests.support.contract import same

WORKERS = 3


def server(**options: Any) -> ParameterServer:
    buffers = averages({"mean": torch.tensor([1.0, 2.0]), "var": torch.tensor([4.0])}, {"mean": 0.5, "var": 0.5})
    return build_server(
        algorithm="asgd", params=torch.zeros(4), num_workers=WORKERS, lr=0.1, buffers=buffers, total_tickets=6, **options
    )


def answer(reply: Reply, mean: float) -> Push:
    """A push whose batch has these means, and a variance of 0."""
    assert reply.ticket is not None
    buffers = {"mean": torch.full((2,), mean), "var": torch.zeros(1)}
    return Push(
        worker=reply.worker,
        ticket=reply.ticket,
        stamp=reply.stamp,
        grad=torch.ones(4),
        buffers=buffers,
        incarnation=reply.incarnation,
    )


def values(reply: Reply) -> list[float]:
    """Of the two buffers, which lie at multiples of 16 bytes."""
    return [*reply.buffers[:8].view(torch.float32).tolist(), *reply.buffers[16:20].view(torch.float32).tolist()]


def test_a_reply_carries_the_buffers_of_its_stamp() -> None:
    made = server()
    first = made.start()
    assert [values(reply) for reply in first] == [[1.0, 2.0, 4.0]] * WORKERS
    (second,) = made.receive(answer(first[1], 9.0))
    # Half of the former value and half of the batch's: (1 + 9) / 2, (2 + 9) / 2 and (4 + 0) / 2.
    assert values(second) == [5.0, 5.5, 2.0]
    (third,) = made.receive(answer(first[0], 1.0))
    assert values(third) == [3.0, 3.25, 1.0]


def test_replies_share_the_buffers_until_they_change_and_keep_them_then() -> None:
    made = server()
    first = made.start()
    assert len({reply.buffers.data_ptr() for reply in first}) == 1
    before = first[0].buffers.clone()
    (second,) = made.receive(answer(first[1], 9.0))
    assert second.buffers.data_ptr() != first[0].buffers.data_ptr()
    assert torch.equal(first[0].buffers, before)


def test_a_reply_that_ends_a_worker_has_none() -> None:
    made = server()
    replies = made.start()
    (last, *_) = made.stop() or made.receive(answer(replies[0], 1.0))
    assert (last.ticket, last.buffers.numel()) == (None, 0)


def test_a_model_without_buffers_gets_none() -> None:
    made = build_server(algorithm="asgd", params=torch.zeros(4), num_workers=1)
    assert [(reply.buffers.dtype, reply.buffers.numel()) for reply in made.start()] == [(torch.uint8, 0)]


def test_a_server_that_loads_newest_replies_repeats_them_with_their_buffers() -> None:
    made, again = server(), server()
    first = made.start()
    push = answer(first[1], 9.0)
    (reply,) = made.receive(push)
    made.receive(answer(first[0], -3.0))  # the buffers change once more, those of the reply do not
    file = io.BytesIO()
    torch.save(made.state_dict(replies=True), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    (repeated,) = again.receive(push)
    assert same(_tensors(repeated), _tensors(reply))
    assert values(repeated) == [5.0, 5.5, 2.0]
    assert [values(each) for each in again.join(7)] == [[1.0, 1.25, 1.0]]  # (5 - 3) / 2, (5.5 - 3) / 2, 2 / 2


def _tensors(reply: Reply) -> dict[str, Tensor]:
    return {"params": reply.params, "buffers": reply.buffers}
