"""transport=auto takes the first transport that both sides can use, and says which and why."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ormo_rpc.errors import Refused, ServerLost, TransportRefused
from ormo_rpc.messages import Reply
from ormo_rpc.options import parts
from ormo_rpc.transports.auto import ON_GPUS, ORDER, Auto, AutoWorkerSide
from ormo_rpc.transports.base import Endpoint, ServerClient, WorkerSide
from ormo_rpc.transports.gloo import server as gloo_server
from ormo_rpc.transports.gloo.pair import PairLost
from ormo_rpc.transports.stream import server as stream_server
from tests.support.gpu_paths import AutoWithoutIpc
from tests.support.schedule import normal
from tests.support.transport_peers import RecordingService, connected, serving_workers, started

pytestmark = pytest.mark.skipif(any(cls.unavailable() for cls in ORDER), reason="not every transport works here")
SIZE = 5


@pytest.fixture(autouse=True, scope="module")
def _forkserver() -> None:  # pyright: ignore[reportUnusedFunction] # a fixture
    """Start the process that workers are forked from."""
    forkserver.ensure_running()


def test_every_transport_has_its_place_in_the_order() -> None:
    assert sorted(cls.name for cls in (*ON_GPUS, *ORDER)) == sorted(set(parts("transport")) - {"auto"})


def no_memory(*_: Any) -> Tensor:
    raise FileNotFoundError(2, "No such file or directory")


def no_pair(*_: Any) -> Any:
    raise PairLost("no connection within 10 s")


OTHER_MACHINE = "another machine: no shared memory"
NO_PAIR = "gloo: the server cannot make a pair at 127.0.0.1: no connection within 10 s"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "transport", "reason"),
    [
        ((), "shm", "worker and server share memory"),
        (("shm",), "gloo", OTHER_MACHINE),
        (("shm", "gloo"), "tcp", f"{OTHER_MACHINE}; {NO_PAIR}"),
    ],
    ids=["all", "without shm", "without shm and gloo"],
)
def test_a_worker_takes_the_first_that_works_and_the_server_knows_the_reason(
    broken: tuple[str, ...], transport: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "shm" in broken:
        monkeypatch.setattr(stream_server, "attach", no_memory)
    if "gloo" in broken:
        monkeypatch.setattr(gloo_server, "make_pair", no_pair)
    assert taken("auto") == (transport, reason)


@pytest.mark.parametrize("name", ["shm", "gloo", "tcp", "rpc"])
def test_a_worker_that_asks_for_one_of_them_gets_it(name: str) -> None:
    transport, reason = taken(name)
    assert transport == name
    assert reason == ("worker and server share memory" if name == "shm" else "asked for")


def test_a_push_that_cannot_stay_on_its_gpu_is_copied_to_memory_that_can_be_sent() -> None:
    with connected(AutoWithoutIpc(), lambda _: RecordingService(SIZE)) as (service, (worker,), _):
        assert service.transports[worker.session_id][0] == "shm"
        for ticket in range(2):
            payload = normal(service.push_format.size // 4, 5, ticket).float()
            service.replies = [Reply(worker=0, ticket=1, stamp=0, params=payload[:SIZE], lr=0.1, steps=1, incarnation=0)]
            worker.push({"worker": 0, "ticket": ticket, "stamp": 0}, payload)
            assert torch.equal(worker.result().params, payload[:SIZE])
            assert torch.equal(service.pushes[-1].grad, payload[:SIZE])


def taken(worker_transport: str) -> tuple[str, str]:
    """Transport and reason of a worker at a server of transport=auto, over which it has registered."""
    cls = parts("transport")[worker_transport]
    with serving_workers(Auto(), lambda _: RecordingService(SIZE)) as (service, address, _):
        (worker,) = started(cls(), address, [0], service.push_format.size)
        try:
            session_id = worker.connect()
            worker.register()
            while not service.open:
                assert not worker.done(0.01)
            return service.transports[session_id]
        finally:
            worker.close()


class Half(WorkerSide):
    """The half of a transport, which cannot be used for a given reason, or is."""

    def __init__(self, outcome: Exception | ServerClient) -> None:
        self.outcome = outcome
        self.closed = False

    @contextmanager
    def connect(self, endpoint: Endpoint, payload: Tensor) -> Generator[ServerClient]:
        """Connect, or do not."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        try:
            yield self.outcome
        finally:
            self.closed = True


CLIENT = cast("ServerClient", SimpleNamespace())


def connect(halves: Mapping[str, WorkerSide], *, alive: bool = True) -> Any:
    """Connect with these halves in place of the real ones."""
    side = AutoWorkerSide()
    side.halves = dict(halves)
    lease = SimpleNamespace(lost=SimpleNamespace(is_set=lambda: not alive))
    response = SimpleNamespace(offers={name: {} for name in (*halves, "other")})
    given: dict[str, Any] = {"lease": lease, "control": None, "joined": response, "secret": None}
    endpoint = Endpoint(**given, transport="auto", timeout_seconds=1.0)
    return side.connect(endpoint, torch.zeros(8, dtype=torch.uint8))


def test_a_server_that_is_lost_meanwhile_is_not_asked_again() -> None:
    with pytest.raises(ServerLost, match=r"\Agone\Z"), connect({"a": Half(ServerLost("gone")), "b": Half(CLIENT)}, alive=False):
        pass


@pytest.mark.parametrize(
    ("errors", "expected", "text"),
    [
        (
            (TransportRefused("shm", "far"), Refused("no")),
            TransportRefused,
            "transport=auto: far; no; take transport=auto, or another one",
        ),
        ((TransportRefused("shm", "far"), ServerLost("late")), ServerLost, "far; late"),
    ],
)
def test_without_any_that_works_the_error_has_all_reasons(
    errors: tuple[Exception, ...], expected: type[Exception], text: str
) -> None:
    with pytest.raises(expected) as caught, connect({str(number): Half(error) for number, error in enumerate(errors)}):
        pass
    assert (type(caught.value), str(caught.value)) == (expected, text)


def test_an_error_while_it_is_used_is_raised_and_closes_it() -> None:
    half, next_one = Half(CLIENT), Half(CLIENT)
    using = connect({"a": half, "b": next_one})
    assert using.__enter__() is CLIENT
    error = ServerLost("later")
    assert not using.__exit__(ServerLost, error, None)
    assert half.closed
    assert not next_one.closed
