"""transport=gloo with both sides in this process: every wire form crosses, memory is lent as long as needed, none is left."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ormo_rpc.compression import Encoder, PushFormat
from ormo_rpc.compression.wire_options import WireDtype
from ormo_rpc.control.memberships import Membership
from ormo_rpc.errors import PushRefused, ServerLost, StaleSession
from ormo_rpc.kernels.pool import Pool
from ormo_rpc.messages import ErrorReply, Push, Reply, no_buffers
from ormo_rpc.transports.base import Endpoint, ReplySize, ServerClient, ServerSide
from ormo_rpc.transports.gloo import Gloo
from ormo_rpc.transports.gloo.addresses import TOKEN_BYTES
from ormo_rpc.transports.gloo.server import MAX_ERROR_CHARACTERS, GlooServerSide
from tests.support.compression import CASES, buffer_layout, gradients, layout, made
from tests.support.processes import PATIENCE_SECONDS, wait_until
from tests.support.rendezvous import join_request
from tests.support.transport_peers import RecordingService, connected

pytestmark = pytest.mark.skipif(bool(Gloo.unavailable()), reason=Gloo.unavailable())
SMALL = 5
HUGE = 4_000_000
"""More than the system keeps for a worker that does not read."""
ADDRESS = {"host": "127.0.0.1", "port": 9, "token": "ab" * TOKEN_BYTES}


@pytest.fixture(autouse=True, scope="module")
def _forkserver() -> None:  # pyright: ignore[reportUnusedFunction] # a fixture
    """Start the process that workers are forked from, which outlives each test."""
    forkserver.ensure_running()


class Peers:
    """A server's half, and workers in this process.

    Args:
        service: The service.
    """

    def __init__(self, service: RecordingService) -> None:
        self.service = service
        self.side = GlooServerSide()
        self.side.start(service)
        service.on_ended = self.side.session_ended
        self.alive = True
        self._stack = ExitStack()

    def join(self, membership: Membership | None = None) -> tuple[ServerClient, torch.Tensor, Membership]:
        """Connect a worker, a new one by default; return it, its payload and its membership."""
        membership = membership or self.service.join(join_request(len(self.service.memberships)))
        session_id = membership.session_id
        endpoint = SimpleNamespace(
            ask=lambda request: self.side.answer(session_id, request),
            address=("127.0.0.1", 0),
            local_host="127.0.0.1",
            alive=lambda: self.alive,
            session_id=session_id,
            reason="asked for",
            control=SimpleNamespace(leave=self.service.leave),
        )
        worker = Gloo().worker_side()
        payload = worker.allocate(self.service.push_format.size)
        return self._stack.enter_context(worker.connect(cast("Endpoint", endpoint), payload)), payload, membership

    def sessions(self) -> int:
        """The number of sessions whose thread has not ended."""
        return len(self.side._sessions)  # pyright: ignore[reportPrivateUsage] # there is no other way to tell them from others

    def close(self) -> None:
        """Close the workers' sides, then the server's."""
        self._stack.close()
        self.side.close()


@contextmanager
def peers(form: PushFormat | None = None, *, params: int = 4 * SMALL) -> Generator[Peers]:
    """Serve, with a wire form; by default a small one."""
    service = RecordingService(SMALL)
    service.push_format = service.push_format if form is None else form
    service.reply_size = ReplySize(params=params, buffers=100)
    there = Peers(service)
    try:
        yield there
    finally:
        there.close()


def reply(**other: Any) -> Reply:
    numbers: dict[str, Any] = {"worker": 0, "ticket": 3, "stamp": 2, "lr": 0.1, "steps": 1, "incarnation": 0}
    given: dict[str, Any] = {**numbers, "params": torch.arange(SMALL).float(), **other}
    return Reply(**given)


def push(grad: torch.Tensor) -> Push:
    return Push(worker=0, ticket=3, stamp=2, grad=grad)


FORMS: Mapping[str, Callable[[], PushFormat]] = {
    **{f"{name} {wire.name}": lambda name=name, wire=wire: made(name, wire) for name, wire in CASES},
    "two vectors": lambda: made("none", WireDtype.float32, vectors=2),
    "float64": lambda: made("none", WireDtype.float32, dtype=torch.float64),
    "one parameter and no buffers": lambda: PushFormat(
        params=layout({"only": ()}), buffers=buffer_layout({}), dtype=torch.float32
    ),
    "metrics": lambda: PushFormat(params=layout({"only": (3,)}), buffers=buffer_layout({}), dtype=torch.float32, metrics=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_wire_form_crosses(form: str) -> None:
    made = FORMS[form]()
    with peers(made) as there:
        client, payload, _ = there.join()
        for number, gradient in enumerate(gradients(3, made.dtype, made.length)):
            encoder = Encoder(made, lambda _: payload)
            encoder.push.copy_(gradient)
            encoder.encode(0)
            metrics = encoder.metrics.write({"tokens": number, "hits": (0.1, 3)} if made.metrics else {})
            there.service.replies = [reply(ticket=number)]
            assert client.push(push(payload)).ticket == number
            expected, buffers = made.unpack(payload.clone())
            assert torch.equal(there.service.pushes[-1].grad, expected)
            assert there.service.pushes[-1].buffers.keys() == buffers.keys()
            assert there.service.pushes[-1].metrics == metrics


def test_parameters_of_any_dtype_cross_and_buffers_only_when_they_change() -> None:
    first, second = torch.arange(7, dtype=torch.uint8), torch.arange(3, dtype=torch.uint8)
    with peers(params=8 * SMALL) as there:
        client, payload, _ = there.join()
        buffers_in_turn = (no_buffers(), first, first, second, no_buffers())
        for dtype, buffers in zip(
            (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float32), buffers_in_turn, strict=True
        ):
            sent = reply(params=torch.arange(SMALL).to(dtype), buffers=buffers)
            there.service.replies = [sent]
            came = client.push(push(payload))
            assert came.params.dtype == dtype
            assert torch.equal(came.params, sent.params)
            assert torch.equal(came.buffers, buffers)


def test_the_text_of_a_refusal_crosses_and_a_long_one_is_cut() -> None:
    with peers() as there:
        client, payload, _ = there.join()
        for text in ("short", "\N{SNOWMAN}" * 3 * MAX_ERROR_CHARACTERS):
            refused = ErrorReply(error="PushRefused", text=text)
            there.service.replies = cast("list[Reply]", [refused, reply()])
            with pytest.raises(PushRefused) as caught:
                client.push(push(payload))
            assert str(caught.value) == text[:MAX_ERROR_CHARACTERS]
            assert client.push(push(payload)).ticket == 3  # the memory for parameters was posted all the while


def test_a_snapshot_is_lent_until_it_has_left_and_no_longer() -> None:
    pool = Pool(SMALL, torch.float32)
    with peers() as there:
        client, payload, _ = there.join()
        there.service.replies = [reply(params=pool.take().fill_(7))]
        client.push(push(payload))
        wait_until(lambda: pool.lent == 0, "the return of the memory")
        assert len(pool.made) == 1


def test_a_session_that_has_ended_closes_its_pair_at_once() -> None:
    with peers() as there:
        client, payload, membership = there.join()
        there.service.replies = [reply()]
        client.push(push(payload))
        began = time.monotonic()
        there.service.evict(membership, "of this test")
        wait_until(lambda: there.sessions() == 0, "the end of its thread", every_seconds=0.001)
        assert time.monotonic() - began < 5.0  # 1 ms, on a machine that does nothing else
        with pytest.raises(ServerLost, match=r"\Athe connection to the server is lost: "):
            client.push(push(payload))


@pytest.mark.parametrize("ended", ["the process", "the membership"])
def test_a_worker_that_ends_while_it_is_sent_a_reply_leaves_no_thread(ended: str) -> None:
    sides: list[GlooServerSide] = []

    def make(side: ServerSide) -> RecordingService:
        sides.append(cast("GlooServerSide", side))
        return RecordingService(HUGE)

    with connected(Gloo(), make) as (service, (worker,), _):
        worker.register()
        wait_until(lambda: service.open, "the call")
        os.kill(worker.process.pid, signal.SIGSTOP)
        service.open[0].set_result(reply(params=torch.zeros(HUGE)))
        time.sleep(0.1)  # most likely the reply is half-way by then; otherwise the same must hold
        if ended == "the process":
            worker.process.kill()
        else:
            service.evict(service.memberships.by_worker[0], "of this test")
        wait_until(lambda: not sides[0]._sessions, "the end of its thread")  # pyright: ignore[reportPrivateUsage] # as above


@pytest.mark.slow
@pytest.mark.parametrize("ended", ["the membership", "the lease"])
def test_a_worker_whose_reply_never_comes_waits_no_longer_than_for(ended: str) -> None:
    with peers() as there:
        client, payload, membership = there.join()
        failures: list[ServerLost] = []

        def wait() -> None:
            with pytest.raises(ServerLost) as caught:
                client.push(push(payload))
            failures.append(caught.value)

        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_until(lambda: there.service.open, "the push")
        if ended == "the lease":
            there.alive = False
        else:
            there.service.evict(membership, "of this test")
        waiting.join(PATIENCE_SECONDS)
        assert failures


def test_a_session_that_opens_a_pair_again_loses_the_former_one() -> None:
    with peers() as there:
        former, payload, membership = there.join()
        client, payload, _ = there.join(membership=membership)
        there.service.replies = [reply()]
        assert client.push(push(payload)).ticket == 3
        with pytest.raises(ServerLost):
            former.push(push(payload))
        assert there.sessions() == 1  # the newest of each membership
    wait_until(lambda: there.sessions() == 0, "the end of its thread")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"payload": 1},
            r"\Agloo: push: got 1 bytes, expected \d+; worker and server must have the same model and wire",
        ),
        ({"payload": None}, r"\Agloo: push: got None bytes, expected "),
        ({"host": None}, r"\Agloo: got other fields than expected: address, host, payload, reason\Z"),
        ({"address": 3}, r"\Agloo: address: got other fields than expected"),
        ({"host": "192.0.2.1"}, r"\Agloo: the server cannot make a pair at 192\.0\.2\.1: Cannot resolve 192\.0\.2\.1 to a"),
        ({"host": ""}, r"\Agloo: the server cannot make a pair at : Specify either"),
        ({"host": "0.0.0.0"}, r"\Agloo: the server cannot make a pair at 0\.0\.0\.0: "),  # noqa: S104 - which is refused
    ],
)
def test_a_wrong_request_is_refused(changes: dict[str, Any], text: str) -> None:
    with peers() as there:
        session_id = there.service.join(join_request(0)).session_id
        request = {"payload": there.service.push_format.size, "host": "127.0.0.1", "address": ADDRESS, "reason": ""}
        with pytest.raises(ValueError, match=text):
            there.side.answer(session_id, {**request, **changes})
        with pytest.raises(StaleSession):
            there.side.answer("unknown", request)
        client, payload, _ = there.join()
        there.service.replies = [reply()]
        assert client.push(push(payload)).ticket == 3


def counts() -> tuple[int, int, int]:
    """Threads, descriptors and memory (KiB) of this process."""
    gc.collect()
    tasks, descriptors = (sum(1 for _ in Path(folder).iterdir()) for folder in ("/proc/self/task", "/proc/self/fd"))
    return tasks, descriptors, int(Path("/proc/self/statm").read_text().split()[1]) * 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system has no /proc")
def test_32_pairs_have_bounded_threads_descriptors_and_memory() -> None:
    """Both sides are here, so each number is that of a server and of a worker; `docs/wire.md` states them."""
    with peers() as there:
        there.join()  # the first one loads what all of them share
        before = counts()
        for _ in range(32):
            there.join()
        threads, descriptors, kibibytes = (now - then for now, then in zip(counts(), before, strict=True))
        assert threads <= 32 * (2 + 2) + 8
        assert descriptors <= 32 * (6 + 6) + 8  # of other threads of this process
        assert kibibytes <= 32 * 1024
    wait_until(lambda: all(now <= then for now, then in zip(counts()[:2], before, strict=False)), "the end of all of them")
