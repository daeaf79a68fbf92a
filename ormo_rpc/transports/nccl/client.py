"""The worker's half of ``transport=nccl``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.errors import ServerLost, TransportRefused
from ormo_rpc.transports.base import Endpoint, ServerClient, WorkerSide
from ormo_rpc.transports.nccl.group import WORKER, MakeGroup, connected_group, nccl_group
from ormo_rpc.transports.nccl.pair import Pair
from ormo_rpc.transports.nccl.server import NAME
from ormo_rpc.transports.pending_replies import LIVENESS_SECONDS
from ormo_rpc.transports.stream.client import StreamClient, begun, connection
from ormo_rpc.transports.stream.tensor_path import Sizes


class NcclWorkerSide(WorkerSide):
    """Connects by a pair.

    Attributes:
        make_group: Makes this side's group.
    """

    make_group: MakeGroup = staticmethod(nccl_group)

    @override
    def allocate(self, size: int) -> torch.Tensor:
        return super().allocate(size) if self.gpu is None else torch.zeros(size, dtype=torch.uint8, device=self.gpu)

    @override
    @contextlib.contextmanager
    def connect(self, endpoint: Endpoint, payload: torch.Tensor) -> Generator[ServerClient]:
        with connection(endpoint, payload, {"way": NAME, "gpu": self.identity()}) as (reader, answer):
            if answer["offer"] is None:
                raise TransportRefused(NAME, str(answer["reason"]))
            try:
                group = connected_group(self.make_group, reader, WORKER, payload.device)
            except ValueError as error:
                raise TransportRefused(NAME, f"no pair can be made: {error}") from None
            except (OSError, EOFError) as error:
                raise ServerLost(f"nccl: no pair with the server: {error}") from None
            pair = Pair(group, WORKER, payload.device, Sizes(**answer["offer"]))
            ended = threading.Event()
            watch = threading.Thread(target=_watch, args=(endpoint, pair, ended), name="nccl pair", daemon=True)
            watch.start()
            try:
                stream = begun(reader, endpoint, shared=True, reason=endpoint.reason)
                yield StreamClient(stream, payload, None, tensors=pair)
            finally:
                ended.set()
                pair.close()
                watch.join()

    def identity(self) -> Any:
        """The number of this worker's GPU.

        Raises:
            TransportRefused: it has none.
        """
        if self.gpu is None:
            raise TransportRefused(NAME, "worker.device and server.device are not both on a GPU")
        from ormo_rpc.transports.cuda_ipc.runtime import identity

        return identity(self.gpu)


def _watch(endpoint: Endpoint, pair: Pair, ended: threading.Event) -> None:
    """Close the pair where the lease has ended, as a message to a server that is cut off would never cross."""
    while not ended.wait(LIVENESS_SECONDS):
        if not endpoint.alive():
            pair.close()
            return
