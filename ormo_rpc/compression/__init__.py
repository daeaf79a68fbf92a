"""Compression of pushes: the values that stand for a vector, beside the dtype that they travel in.

A new one is one file here, its options and its `Compressor`::

    base.py      the contract: a vector of D to values and indices, and back
    none.py      every value                     topk.py  the largest ones, with their places
    powersgd.py  two thin factors for each matrix
    rounding.py  values to the wire's dtype and back
    format.py    `PushFormat`: the bytes of a push, of fixed number; the server's side
    encoder.py   `Encoder`: the worker's side, with the state of each worker (error feedback, factors)

Worker and server each build the same `PushFormat` from the configuration and the model (`Job.push_format`). The worker's
gradient is written into `Encoder.push`, `Encoder.encode` makes the wire form of it and returns what the server will see;
`PushFormat.unpack` makes that of the wire form. Without compression and rounding the wire form is the vector itself, and
nothing is copied on either side. With rounding alone the worker writes the rounded vector, and nothing is decoded on either
side (but for error feedback, which has to know what was dropped): the server's step reads 16 bits.
"""

from __future__ import annotations

from ormo_rpc.compression.base import Compression, Compressor
from ormo_rpc.compression.encoder import Allocate, Encoder
from ormo_rpc.compression.format import PushFormat, pushed_dtype
from ormo_rpc.compression.none import NoCompression
from ormo_rpc.compression.powersgd import PowerSGD
from ormo_rpc.compression.topk import TopK

__all__ = [
    "Allocate",
    "Compression",
    "Compressor",
    "Encoder",
    "NoCompression",
    "PowerSGD",
    "PushFormat",
    "TopK",
    "pushed_dtype",
]
