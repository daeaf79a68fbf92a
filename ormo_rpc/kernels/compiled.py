"""The steps in C, compiled with the system's compiler when they are first asked for; None where that does not work."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.kernels.pool import pooled
from ormo_rpc.kernels.steps import CHUNK, Kernel, Steps, TorchSteps
from ormo_rpc.kernels.threads import LEAST, Threaded

SOURCE = Path(__file__).with_name("steps.c")
FLAGS = ("-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-std=c11")
"""Without contraction, so that every rounding is the one that is written down."""
COMPILE_TIMEOUT_SECONDS = 30.0

WORTH_COMPILING = CHUNK
"""Elements below which the compiler takes longer than a run gains, as the calls cost more than the passes over memory."""

_log = logging.getLogger(__name__)
_SUFFIX: dict[torch.dtype, tuple[str, Any]] = {torch.float32: ("f32", ctypes.c_float), torch.float64: ("f64", ctypes.c_double)}


class CompiledSteps:
    """`Steps` in C: each element is read and written once. Vectors that C cannot read, strided or elsewhere, are torch's work.

    Args:
        library: ``steps.c``, compiled.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._otherwise = TorchSteps()
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        size, address = ctypes.c_int64, ctypes.c_void_p
        for dtype, (suffix, scalar) in _SUFFIX.items():
            arguments = {
                "plain": [size, *[address] * 3, scalar],
                "heavy": [size, *[address] * 5, scalar, scalar],
                "ordered": [size, *[address] * 5, scalar, size, *[scalar] * 3],
            }
            for name, types in arguments.items():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = types, None
                self._functions[name, dtype] = function

    def plain(self, grad: Tensor, w: Tensor, out: Tensor, *, into_w: float) -> None:
        """See `Steps.plain`."""
        if not _readable(grad, w, out):
            self._otherwise.plain(grad, w, out, into_w=into_w)
        else:
            self._call("plain", (grad, w, out), into_w)

    def heavy(self, grad: Tensor, u: Tensor, w: Tensor, out: Tensor, *, beta: float, into_u: float) -> None:
        """See `Steps.heavy`."""
        if not _readable(grad, u, w, out):
            self._otherwise.heavy(grad, u, w, out, beta=beta, into_u=into_u)
        else:
            self._call("heavy", (grad, u, u, w, out), beta, into_u)

    def ordered(
        self,
        grad: Tensor,
        u: Tensor,
        w: Tensor,
        out: Tensor,
        *,
        scale: float,
        shifts: int,
        beta: float,
        into_u: float,
        into_w: float,
    ) -> None:
        """See `Steps.ordered`."""
        if not _readable(grad, u, w, out):
            self._otherwise.ordered(grad, u, w, out, scale=scale, shifts=shifts, beta=beta, into_u=into_u, into_w=into_w)
        else:
            self._call("ordered", (grad, u, u, w, out), scale, shifts, beta, into_u, into_w)

    def _call(self, name: str, vectors: tuple[Tensor, ...], *numbers: float) -> None:
        """Call a function; C knows nothing of lengths, so whatever would make it read or write elsewhere is refused here."""
        first = vectors[0]
        for vector in vectors:
            alike = vector.dtype == first.dtype and vector.numel() == first.numel()
            assert alike, f"{name}: {vector.numel()} {vector.dtype} beside {first.numel()} {first.dtype}"
        self._functions[name, first.dtype](first.numel(), *(vector.data_ptr() for vector in vectors), *numbers)


def _readable(*vectors: Tensor) -> bool:
    """Whether the values of all of them lie in this machine's memory one behind the other, as they are."""
    return all(vector.device.type == "cpu" and vector.is_contiguous() and not vector.is_neg() for vector in vectors)


def fastest_kernel(dimension: int) -> Kernel:
    """Pools of vectors, and compiled steps where the vectors are long enough for that and there is a compiler, else torch's.

    Compiled steps over very long vectors are divided among as many threads as torch may have now (``runtime.threads``); its own
    operations it divides by itself.
    """
    steps = compiled_steps() if dimension >= WORTH_COMPILING else None
    if steps is None:
        return Kernel(blank=pooled())
    threads = torch.get_num_threads()
    divided = threads > 1 and dimension >= 2 * LEAST
    return Kernel(name="compiled", steps=Threaded(steps, threads) if divided else steps, blank=pooled())


@functools.cache
def compiled_steps() -> CompiledSteps | None:
    """The steps in C; None, with a warning in the log, where there is no compiler or its bits are not those of torch.

    It is compiled once in a process, in a third of a second, into a directory that is removed as soon as the library is
    loaded: nothing is left that could be stale, made for another processor, or changed by somebody else. ``CC`` names the
    compiler.
    """
    compiler = (
        shlex.split(os.environ.get("CC", "")) or [found for found in map(shutil.which, ("cc", "gcc", "clang")) if found][:1]
    )
    if not compiler:
        _log.info("no C compiler: the server's steps run in torch, which takes more passes over memory")
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="ormo_rpc_") as folder:
            library = Path(folder) / "steps.so"
            command = [*compiler, *FLAGS, "-o", str(library), str(SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_SECONDS)
            steps = CompiledSteps(ctypes.CDLL(str(library)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning(
            "the server's steps run in torch, as they could not be compiled: %s", getattr(error, "stderr", "") or error
        )
        return None
    if not agrees(steps, TorchSteps()):
        _log.warning("the server's steps run in torch: compiled for this machine they would give other bits than torch does")
        return None
    return steps


def agrees(some: Steps, others: Steps, length: int = 1_037) -> bool:
    """Whether two implementations give the same bits on vectors with an odd rest, aligned and not, of both dtypes."""
    return all(
        torch.equal(mine, theirs)
        for dtype in _SUFFIX
        for offset in (0, 1)
        for mine, theirs in zip(_all_steps(some, length, offset, dtype), _all_steps(others, length, offset, dtype), strict=True)
    )


def _all_steps(steps: Steps, length: int, offset: int, dtype: torch.dtype) -> list[Tensor]:
    """What each step makes of a gradient, a momentum and parameters that begin ``offset`` behind an aligned address."""
    results: list[Tensor] = []
    for shifts in (None, 0, 1, 3):
        randomness = torch.Generator().manual_seed(0)
        grad, u, w, out = (torch.randn(length + offset, generator=randomness, dtype=dtype)[offset:] for _ in range(4))
        if shifts is None:
            steps.plain(grad, w, out, into_w=0.037)
            results.append(out.clone())
            steps.heavy(grad, u, w, out, beta=0.9, into_u=0.037)
        else:
            steps.ordered(grad, u, w, out, scale=0.3, shifts=shifts, beta=0.9, into_u=0.0333, into_w=0.0703)
        results += [u, out]
    return results
