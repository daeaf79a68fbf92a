"""The wire form of a push: its size, its layout, and its decoding on the server."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ormo_rpc.compression.base import Compressed, Compression, Compressor
from ormo_rpc.compression.none import NoCompression
from ormo_rpc.compression.rounding import round_into
from ormo_rpc.compression.wire_buffers import WireBuffers
from ormo_rpc.compression.wire_metrics import ROOM, WireMetrics
from ormo_rpc.compression.wire_options import WireDtype
from ormo_rpc.errors import PushRefused
from ormo_rpc.models.flat import Layout
from ormo_rpc.server.buffer_layout import ALIGNMENT, BufferLayout
from ormo_rpc.server.validation import check_plain


@dataclass(frozen=True, slots=True)
class Region:
    """The place of some values among the bytes of a push.

    Attributes:
        start: Their first byte, a multiple of their own size.
        count: The number of values.
        dtype: Theirs.
    """

    start: int
    count: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The offset of the byte after the last one."""
        return self.start + self.count * self.dtype.itemsize

    def of(self, wire: torch.Tensor) -> torch.Tensor:
        """The values, shape (count,), as a view of the bytes."""
        return wire[self.start : self.end].view(self.dtype)


def pushed_dtype(compression: Compression, wire: WireDtype) -> torch.dtype | None:
    """The dtype of pushes once they are unpacked; None for the model's, unless they are rounded and not compressed."""
    return wire.rounded if isinstance(compression, NoCompression) else None


class PushFormat:
    """The wire form of a push: for each vector the values that stand for it and their indices, then buffers, then metrics.

    Buffers are those of the model (`WireBuffers`); only a form with room for metrics has any (`WireMetrics`). Each part begins
    at a multiple of its values' size, little-endian as the machines are, and the whole has always the same number of bytes.
    Both sides build it of the same configuration and model. It has no state and may be used by any thread.

    Args:
        params: Names and shapes of the parameters.
        buffers: The places of the model's buffers, which travel as they are.
        dtype: The model's.
        vectors: The number of vectors of D in a push (`Algorithm.VECTORS_PUSHED`); each is compressed for itself.
        compression: The choice of values that travel; all by default.
        wire: What they are rounded to.
        seed: The seed of the run, for the random draws of a compressor.
        metrics: There is room for metrics (`Push.metrics`).

    Attributes:
        size: Bytes of the wire form.
        length: Values of a push once it is unpacked: ``vectors * D``.
        plain: Whether the values of the push are on the wire one by one, rounded or not, so that there is nothing to decode.
        exact: Whether they are not rounded either, so that the wire form is the push itself.
        pushed_dtype: Of the push once it is unpacked; see the function of that name.
        buffer_region: The place of the buffers (`WireBuffers`).
        metrics: There is room for metrics.

    Raises:
        ValueError: the compression does not support this number of parameters.
    """

    def __init__(
        self,
        *,
        params: Layout,
        buffers: BufferLayout,
        dtype: torch.dtype,
        vectors: int = 1,
        compression: Compression | None = None,
        wire: WireDtype = WireDtype.float32,
        seed: int = 0,
        metrics: bool = False,
    ) -> None:
        self.compression = compression or NoCompression()
        self.compressor: Compressor = self.compression.build(params)
        self.buffers = buffers
        self.dtype = dtype
        self.vectors = vectors
        self.dimension = params.size
        self.length = vectors * params.size
        self.seed = seed
        self.metrics = metrics
        value_dtype = wire.rounded or dtype
        self.plain = isinstance(self.compression, NoCompression)
        self.exact = self.plain and value_dtype == dtype
        self.pushed_dtype = pushed_dtype(self.compression, wire) or dtype
        self._end = 0
        self.regions = [
            (self._region(self.compressor.num_values, value_dtype), self._region(self.compressor.num_indices, torch.int32))
            for _ in range(vectors)
        ]
        self.buffer_region = self._region(WireBuffers.size(buffers), torch.uint8, ALIGNMENT)
        self._metrics_region = self._region(ROOM if metrics else 0, torch.uint8, ALIGNMENT)
        self.size = self._end

    @property
    def metrics_start(self) -> int:
        """The number of bytes before the metrics, which are the last ones."""
        return self._metrics_region.start if self.metrics else self.size

    def _region(self, count: int, dtype: torch.dtype, alignment: int | None = None) -> Region:
        """Place the next region; an empty one is at the beginning, where every dtype may be."""
        if not count:
            return Region(0, 0, dtype)
        unit = alignment or dtype.itemsize
        region = Region(-(-self._end // unit) * unit, count, dtype)
        self._end = region.end
        return region

    def whole(self, wire: torch.Tensor) -> torch.Tensor:
        """View the vectors of a push, shape (length,), in its bytes, of the wire's dtype; only where the format is plain."""
        assert self.plain, "what is compressed is not there value by value"
        first, last = self.regions[0][0], self.regions[-1][0]
        return wire[first.start : last.end].view(first.dtype)

    def wire_buffers(self, wire: torch.Tensor) -> WireBuffers:
        """The buffers among the bytes of a push."""
        return WireBuffers(self.buffers, self.buffer_region.of(wire))

    def wire_metrics(self, wire: torch.Tensor) -> WireMetrics:
        """The metrics among the bytes of a push; there are none where there is no room."""
        return WireMetrics(self._metrics_region.of(wire))

    def write(self, number: int, compressed: Compressed, wire: torch.Tensor) -> None:
        """Put what stands for vector ``number`` at its place among the bytes."""
        values, indices = self.regions[number]
        round_into(compressed.values, values.of(wire))
        if compressed.indices is not None:
            indices.of(wire).copy_(compressed.indices)

    def read(self, number: int, wire: torch.Tensor, into: torch.Tensor) -> None:
        """Write vector ``number`` into ``into``, shape (D,).

        Raises:
            PushRefused: see `Compressor.decompress`.
        """
        values, indices = self.regions[number]
        self.compressor.decompress(values.of(wire), indices.of(wire), into)

    def unpack(
        self, payload: torch.Tensor, into: torch.Tensor | None = None, sender: str = "push"
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Decode a push; forged bytes are safe, since nothing outside of them and of ``into`` is touched.

        Values that are not finite are decoded as they are (or as NaN), and the server refuses the push (`NonFiniteGradient`).

        Args:
            payload: The bytes, uint8, shape (size,), on the CPU; they may be forged.
            into: Receives the push, shape (length,), contiguous and of the model's dtype; by default new memory. Not used where
                the format is plain.
            sender: The sender, for the error message.

        Returns:
            The push, shape (length,), and the reported buffers by name. They, and a plain push, are views of ``payload``.

        Raises:
            PushRefused: it is no such tensor, or the bytes are no valid push; the content of ``into`` is undefined then.
        """
        wire = self._checked(payload, f"{sender}: payload")
        buffers = self.wire_buffers(wire).read()
        if self.plain:
            return self.whole(wire), buffers
        into = torch.empty(self.length, dtype=self.dtype) if into is None else into
        for number, vector in enumerate(into.split(self.dimension)):
            try:
                self.read(number, wire, vector)
            except PushRefused as error:
                raise PushRefused(f"{sender}: payload: {error}") from None
        return into, buffers

    def _checked(self, payload: torch.Tensor, what: str) -> torch.Tensor:
        """The bytes in one piece, at an address where values can be read from."""
        check_plain(payload, what)
        if (payload.dtype, payload.device.type, tuple(payload.shape)) != (torch.uint8, "cpu", (self.size,)):
            raise PushRefused(
                f"{what}: got {tuple(payload.shape)} of {payload.dtype} on {payload.device.type}, expected {self.size} bytes "
                f"(torch.uint8) on cpu; worker and server must have the same model and wire format"
            )
        placed = payload.storage_offset() % ALIGNMENT == 0 and payload.data_ptr() % ALIGNMENT == 0
        return payload if placed and payload.is_contiguous() else payload.clone(memory_format=torch.contiguous_format)
