"""The ways of tensors between GPUs: what they refuse; `test_contract` has the rest, with memory of the CPU."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ormo_rpc.compression import PushFormat
from ormo_rpc.compression.topk import TopK
from ormo_rpc.errors import TransportRefused
from ormo_rpc.models.flat import Layout
from ormo_rpc.rendezvous.protocol import LineReader
from ormo_rpc.server.buffer_layout import BufferLayout
from ormo_rpc.transports import cuda_ipc, nccl
from ormo_rpc.transports.cuda_ipc.server import offered as offered_window
from ormo_rpc.transports.cuda_ipc.server import window_of
from ormo_rpc.transports.nccl.group import SERVER, WORKER, ConnectionStore
from ormo_rpc.transports.nccl.server import offered as offered_pair
from ormo_rpc.transports.nccl.server import pair_of
from ormo_rpc.transports.stream.tensor_path import Offer, Sizes, attach_window, make_window
from tests.support.gpu_paths import CPU, FileMemory, gloo_group
from tests.support.transport_peers import RecordingService

SIZES = Sizes(push=8, params=8, buffers=3)


@pytest.mark.parametrize("offered", [offered_window, offered_pair])
def test_a_server_on_the_cpu_offers_none(offered: Callable[..., Offer]) -> None:
    with pytest.raises(TransportRefused, match="the server's parameters are not on a GPU"):
        offered(RecordingService(5), {})


def test_compressed_pushes_are_refused() -> None:
    service = RecordingService(5)
    service.push_format = PushFormat(
        params=Layout({"params": torch.empty(5)}), buffers=BufferLayout({}), dtype=torch.float32, compression=TopK(ratio=0.4)
    )
    for offer in (lambda: window_of(FileMemory(), service), lambda: pair_of(service, CPU, gloo_group)):
        with pytest.raises(TransportRefused, match="compressed pushes are unpacked on the CPU"):
            offer()


@pytest.mark.parametrize("side", [cuda_ipc.CudaIpc, nccl.Nccl])
def test_a_worker_on_the_cpu_asks_for_none(side: Any) -> None:
    connecting = side().worker_side().connect(None, torch.empty(8))
    with pytest.raises(TransportRefused, match=r"worker\.device and server\.device are not both on a GPU"), connecting:
        pass


def test_memory_that_is_not_the_servers_is_refused() -> None:
    memory = FileMemory()
    (window, made), (_, other) = make_window(memory, SIZES), make_window(memory, SIZES)
    with pytest.raises(ValueError, match="the memory that was opened is not the server's"):
        attach_window(FileMemory(), {**made, "handle": other["handle"]})
    attached = attach_window(FileMemory(), made)
    attached.ready_push(torch.arange(8, dtype=torch.uint8))
    assert window.push.tolist() == list(range(8))


def test_values_of_a_store_cross_a_connection_and_one_that_is_not_set_is_an_error() -> None:
    ends = socket.socketpair()
    stores = [ConnectionStore(LineReader(end), 10.0) for end in ends]
    with ends[0], ends[1]:
        stores[SERVER].set("0", b"number")
        assert stores[WORKER].get("0") == b"number"
        assert stores[WORKER].clone() is stores[WORKER]
        done = threading.Thread(target=stores[SERVER].finish)
        done.start()
        with pytest.raises(RuntimeError, match="the other side has not set 1"):
            stores[WORKER].get("1")
        stores[WORKER].finish()
        done.join()
        stores[SERVER].set("2", b"of no interest")  # as NCCL's own threads may do later
    ends = socket.socketpair()
    ends[1].close()
    with ends[0], pytest.raises(EOFError):
        ConnectionStore(LineReader(ends[0]), 10.0).get("0")
