"""Options of the wire between a worker and the server."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from ormo_rpc.options import Section, option


class WireDtype(Enum):
    """The dtype that the values of a push are rounded to."""

    float32 = "float32"
    """No rounding: they travel in the model's dtype."""
    bf16 = "bf16"
    """8 bits of precision, the range of float32."""
    fp16 = "fp16"
    """11 bits of precision; what is beyond 65,504 is sent as that."""

    @property
    def rounded(self) -> torch.dtype | None:
        """The dtype to round to; None for no rounding."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.value)


class ParamsDtype(Enum):
    """The dtype that parameters are rounded to when they are sent."""

    float32 = "float32"
    """No rounding: they travel in the server's dtype."""
    bf16 = "bf16"
    """8 bits of precision: a gradient is then taken at rounded parameters; the server's own stay exact."""

    @property
    def rounded(self) -> torch.dtype | None:
        """The dtype to round to; None for no rounding."""
        return {"bf16": torch.bfloat16}.get(self.value)


@dataclass(frozen=True, kw_only=True)
class Wire(Section):
    """The dtypes of gradients and parameters between a worker and the server."""

    PATH = "wire"
    dtype: WireDtype = option(WireDtype.float32, "dtype that a push is rounded to: float32 (exact, not rounded), bf16 or fp16")
    params: ParamsDtype = option(ParamsDtype.float32, "dtype that parameters are sent in: float32 (exact, not rounded) or bf16")
