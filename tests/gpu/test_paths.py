"""Pushes and replies between processes that share one GPU: the contract of transports, and the memory itself."""

from __future__ import annotations

import gc
import multiprocessing
import random
import socket
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_rpc.kernels.host_copies import on_host
from ormo_rpc.messages import Push, Reply
from ormo_rpc.rendezvous.protocol import LineReader
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.transports.base import ServerSide, Transport
from ormo_rpc.transports.cuda_ipc import runtime
from ormo_rpc.transports.nccl.group import SERVER, WORKER, connected_group, nccl_group
from ormo_rpc.transports.nccl.pair import Pair
from ormo_rpc.transports.stream.tensor_path import Sizes
from tests.support.contract import same
from tests.support.gpu_paths import GPU, WindowOnGpu
from tests.support.processes import PATIENCE_SECONDS, QUIET, launch, summary, wait_until
from tests.support.schedule import normal
from tests.support.transport_peers import RecordingService, connected
from tests.unit.transports import test_contract as contract

_context = multiprocessing.get_context("forkserver")
SIZE = (5 << 20) + 4


@pytest.fixture(autouse=True, scope="module")
def _forkserver() -> None:  # pyright: ignore[reportUnusedFunction] # a fixture
    forkserver.ensure_running()


@pytest.fixture
def transport(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> Transport:
    """The one that these tests are about, at a server on the GPU."""
    monkeypatch.setattr(contract, "GPUS", [gpu])
    return WindowOnGpu()


# Collected here as well, with the transport above.
test_replies_and_state_are_those_in_process = contract.test_replies_and_state_are_those_in_process
test_a_refused_push_changes_nothing = contract.test_a_refused_push_changes_nothing_and_raises_its_error_at_the_worker
test_workers_that_die_harm_no_other = contract.test_workers_that_die_or_are_evicted_while_stopped_harm_no_other
test_a_worker_leaves_and_connects_again = contract.test_a_worker_leaves_and_connects_again
test_all_of_a_push_and_of_its_reply_crosses = contract.test_all_of_a_push_and_of_its_reply_crosses
test_the_death_of_the_server_ends_the_wait_of_a_worker = contract.test_the_death_of_the_server_ends_the_wait_of_a_worker


def test_200_pushes_of_random_sizes_and_their_replies_keep_their_bits(transport: Transport) -> None:
    rng = random.Random(7)
    for dimension in (rng.randrange(1, 5000), rng.randrange(100_000, 600_000)):
        with connected(transport, lambda _: RecordingService(dimension)) as (service, (worker,), _):  # noqa: B023 - at once
            for ticket in range(100):
                payload = normal(service.push_format.size // 4, 5, ticket).float()
                params = normal(dimension, 6, ticket).float()
                buffers = torch.frombuffer(bytearray(rng.randbytes(rng.randrange(1, 5000))), dtype=torch.uint8)
                service.replies = [Reply(**contract.numbers_of(Reply, rng), params=params.to(GPU), buffers=buffers.to(GPU))]
                worker.push(contract.numbers_of(Push, rng), payload)
                came = worker.result()
                assert torch.equal(came.params, params)
                assert torch.equal(came.buffers, buffers)
                assert torch.equal(service.pushes.pop().grad, payload[:dimension])


def test_pushes_of_workers_at_once_have_the_bits_of_the_same_pushes_on_the_cpu(transport: Transport) -> None:
    """A copy that comes too early or too late between streams or processes would show."""
    workers, rounds = 3, 60
    order, sent = list[Push](), dict[int, torch.Tensor]()

    def make(side: ServerSide) -> Service:
        service = contract.real_service(side, num_workers=workers)
        commit = service.server.commit

        def recorded(push: Push, validated: Any) -> list[Reply]:
            order.append(replace(push, grad=torch.empty(0)))
            return commit(push, validated)

        service.server.commit = recorded
        return service

    with connected(transport, make, workers) as (service, made, _):
        for worker in made:
            worker.register()
        for number in range(rounds + 1):
            for worker in made:
                reply = worker.result()
                assert reply.ticket is not None
                sent[reply.ticket] = reply.params
                if number < rounds:
                    worker.push(contract.answering(reply), gradient(reply.ticket))
        state = on_host(service.server.state_dict(replies=True))
    reference = contract.server(num_workers=workers)
    due = reference.start()
    for push in order:
        due += reference.receive(replace(push, grad=gradient(push.ticket)))
    for reply in due:
        assert reply.ticket is not None
        assert torch.equal(sent[reply.ticket], reply.params)
    assert len(order) == workers * rounds
    assert same(state, reference.state_dict(replies=True))


def gradient(ticket: int) -> torch.Tensor:
    """The push for a ticket."""
    return 0.1 * normal(contract.LARGE, 3, ticket).float()


def test_a_worker_that_is_killed_in_the_middle_of_a_push_frees_its_window_and_the_others_go_on(transport: Transport) -> None:
    dimension = 2_000_000
    with connected(transport, lambda _: RecordingService(dimension), 2) as (service, (killed, other), _):
        payload = normal(service.push_format.size // 4, 5, 0).float()
        assert _windows() == 2
        killed.push(contract.numbers_of(Push, random.Random(1)), payload)
        killed.process.kill()
        wait_until(lambda: len(service.evicted) == 1, "the eviction")
        wait_until(lambda: _windows() == 1, "the end of its window")
        service.replies = [Reply(**contract.numbers_of(Reply, random.Random(2)), params=payload[:dimension].to(GPU))]
        service.pushes.clear()
        other.push(contract.numbers_of(Push, random.Random(3)), payload)
        assert torch.equal(other.result().params, payload[:dimension])
        assert torch.equal(service.pushes[-1].grad, payload[:dimension])


def _windows() -> int:
    gc.collect()
    return sum(type(each) is runtime.Memory for each in gc.get_objects())


def test_a_process_goes_on_after_the_death_of_the_one_whose_memory_it_has_opened(gpu: torch.device) -> None:
    with _Process(_make) as maker:
        handle = maker.result()
        with _Process(_read, handle) as reader:
            assert reader.result() == 3.0
            maker.kill()
            reader.go_on()
            assert reader.result() == 3.0
            reader.go_on()
            assert reader.ended() == 0
    assert torch.ones(3, device=gpu).sum().item() == 3.0


def test_a_handle_of_nothing_and_too_much_memory_are_refused_and_no_later_call_is_harmed(gpu: torch.device) -> None:
    del gpu
    with _Process(_fail) as process:
        errors = process.result()
        process.go_on()
        assert process.ended() == 0
    assert errors[0] == "got a handle of 0 bytes, expected 64"
    assert errors[1].startswith("cudaIpcOpenMemHandle: ")
    assert errors[2] == "cudaMalloc: out of memory (error 2)"
    assert errors[3] == 3.0


@pytest.mark.parametrize("worker_gpu", [0, 1], ids=["one GPU", "two GPUs"])
def test_a_pair_of_nccl_carries_pushes_and_replies_between_two_gpus_and_fails_alone_on_one(
    gpu: torch.device, worker_gpu: int
) -> None:
    if worker_gpu >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    with _Process(_pair, SERVER, 0) as server, _Process(_pair, WORKER, worker_gpu) as worker:
        worker.go_on(server.result())
        outcomes = [server.result(), worker.result()]
        for process in (server, worker):
            process.go_on()
            assert process.ended() == 0
    assert outcomes == ["all bits"] * 2 if worker_gpu else "all bits" not in outcomes, outcomes
    assert torch.ones(3, device=gpu).sum().item() == 3.0


def test_a_run_with_both_sides_on_one_gpu_takes_its_memory(tmp_path: Path, gpu: torch.device) -> None:
    """On the CPU it has a test accuracy of 98%."""
    del gpu
    data = ("dataset._target_=benchmarks.gpu_images.images", "train.batch_size=32", "train.lr=0.01", "train.max_iterations=200")
    options = ("server.device=cuda", "worker.device=cuda", "workers=2", "worker.prefetch=1", "wire.dtype=bf16")
    status, _, err = launch(tmp_path / "run", *QUIET, *data, *options)
    assert status == 0, err
    found = summary(tmp_path / "run")
    taken = [(each["transport"], each["reason"]) for each in found["transports"].values()]
    assert taken == [("cuda_ipc", "worker and server share memory of a GPU")] * 4
    assert (found["iterations"], found["evictions"]) == (200, [])
    assert found["test_accuracy"] > 0.9


class _Process:
    """A process of its own, which a test talks to; ended with the context."""

    def __init__(self, work: Any, *arguments: Any) -> None:
        self._pipe, end = _context.Pipe()
        self._process = _context.Process(target=work, args=(end, *arguments), daemon=True)
        self._process.start()
        end.close()

    def result(self) -> Any:
        assert self._pipe.poll(15.0), "the process does not answer"
        return self._pipe.recv()

    def go_on(self, value: object = None) -> None:
        self._pipe.send(value)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def ended(self) -> int | None:
        self._process.join(PATIENCE_SECONDS)
        return self._process.exitcode

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._pipe.close()


def _make(pipe: Connection) -> None:
    memory, handle = runtime.make(GPU, SIZE)
    memory[-4:].view(torch.float32).fill_(3.0)
    torch.cuda.synchronize()
    pipe.send(handle)
    pipe.poll(PATIENCE_SECONDS)


def _read(pipe: Connection, handle: bytes) -> None:
    memory = runtime.attach(GPU, SIZE, handle)
    for _ in range(2):
        pipe.send(memory[-4:].view(torch.float32).sum().item())
        assert pipe.poll(PATIENCE_SECONDS)
        pipe.recv()


def _fail(pipe: Connection) -> None:
    errors = list[str | float]()
    for attempt in (
        lambda: runtime.attach(GPU, SIZE, b""),
        lambda: runtime.attach(GPU, SIZE, bytes(runtime.HANDLE_BYTES)),
        lambda: runtime.make(GPU, 1 << 50),
    ):
        try:
            attempt()
        except runtime.CudaError as error:
            errors.append(str(error))
    errors.append(torch.ones(3, device=GPU).sum().item())
    pipe.send(errors)
    pipe.poll(PATIENCE_SECONDS)


def _pair(pipe: Connection, rank: int, number: int) -> None:
    """Let pushes and replies cross 20 times; tell whether they kept their bits, or the error."""
    device, sizes = torch.device("cuda", number), Sizes(push=4 * 70_001, params=4 * 70_001, buffers=5)
    torch.cuda.set_device(device)
    with _connection(pipe, rank) as connection:
        try:
            pair = Pair(connected_group(nccl_group, LineReader(connection), rank, device), rank, device, sizes)
        except (ValueError, OSError, EOFError) as error:
            outcome = f"{type(error).__name__}: {error}"
        else:
            outcome = _crossed(pair, connection, rank, device)
            pair.close()
    pipe.send(outcome)
    pipe.poll(PATIENCE_SECONDS)


def _connection(pipe: Connection, rank: int) -> socket.socket:
    if rank == WORKER:
        return socket.create_connection(pipe.recv())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[:2])
        return listener.accept()[0]


def _crossed(pair: Pair, connection: socket.socket, rank: int, device: torch.device) -> str:
    """Frames are bytes here."""
    buffers = torch.arange(5, dtype=torch.uint8, device=device)
    try:
        for ticket in range(20):
            push, params = normal(70_001, 1, ticket).float().to(device), normal(70_001, 2, ticket).float().to(device)
            if rank == WORKER:
                pair.ready_push(push)
                connection.sendall(b"p")
                pair.deliver()
                connection.recv(1)
                pair.fetch_reply(4 * 70_001, 5)
                same = torch.equal(pair.params.view(torch.float32), params) and torch.equal(pair.buffers, buffers)
            else:
                connection.recv(1)
                pair.fetch_push()
                same = torch.equal(pair.push.view(torch.float32), push)
                pair.ready_reply(params, buffers)
                connection.sendall(b"r")
                pair.deliver()
            if not same:
                return f"other bits at {ticket}"
    except EOFError as error:
        return f"EOFError: {error}"
    return "all bits"
