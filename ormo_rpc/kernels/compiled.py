"""Steps in C, compiled on first use with the system's compiler; without one the steps run in torch."""

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
from typing_extensions import override

from ormo_rpc.kernels.kernel import Kernel
from ormo_rpc.kernels.pool import pooled
from ormo_rpc.kernels.steps import CHUNK, HeavyBallStep, OrMoStep, SGDStep, Step, Steps, TorchSteps
from ormo_rpc.kernels.threads import LEAST, Threaded
from ormo_rpc.kernels.triton_steps import triton_steps

SOURCE = Path(__file__).with_name("steps.c")
FLAGS = ("-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-std=c11")
"""Without contraction: a fused multiply-add would round once where torch rounds twice."""
COMPILE_TIMEOUT_SECONDS = 30.0

WORTH_COMPILING = CHUNK
"""Number of elements below which compiling does not pay: there the calls cost more than the passes over memory."""

_log = logging.getLogger(__name__)
_NAMES: dict[torch.dtype, tuple[str, Any]] = {
    torch.float32: ("f32", ctypes.c_float),
    torch.float64: ("f64", ctypes.c_double),
    torch.bfloat16: ("bf16", None),
    torch.float16: ("fp16", None),
}
"""Suffix of each dtype in the names of ``steps.c``, and the C type of scalars where it is the parameters' dtype."""
_PAIRS = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
)
"""(Dtype of the parameters, dtype of the gradient) of the compiled functions."""


class CompiledSteps(Steps):
    """`Steps` in C: each element is read and written once.

    Falls back to `TorchSteps` for vectors that are strided or not on the CPU, and for pairs of dtypes without a function; for
    `AdamWStep` too, as the square root of torch (that of MKL) is not rounded as the processor rounds it.

    Args:
        library: The compiled ``steps.c``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._otherwise = TorchSteps()
        self._functions: dict[tuple[type[Step], torch.dtype, torch.dtype], Any] = {}
        size, addresses = ctypes.c_int64, [ctypes.c_void_p] * 5
        for dtype, grad_dtype in _PAIRS:
            suffix, scalar = _NAMES[dtype]
            numbers = {SGDStep: [scalar], HeavyBallStep: [scalar] * 2, OrMoStep: [scalar, size, *[scalar] * 3]}
            for kind, types in numbers.items():
                function = getattr(library, f"{kind.__name__.lower()}_{suffix}_{_NAMES[grad_dtype][0]}")
                function.argtypes, function.restype = [size, *addresses, *types], None
                self._functions[kind, dtype, grad_dtype] = function

    @override
    def __call__(
        self,
        step: Step,
        grad: torch.Tensor,
        u: torch.Tensor | None,
        w: torch.Tensor,
        out: torch.Tensor,
        out_16bit: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
    ) -> None:
        function = self._functions.get((type(step), w.dtype, grad.dtype))
        vectors = (grad, u, w, out, out_16bit)
        present = [vector for vector in vectors if vector is not None]
        if function is None or not all(map(_readable, present)):
            self._otherwise(step, grad, u, w, out, out_16bit, v)
            return
        # C knows nothing of lengths and dtypes, so whatever would make it read or write elsewhere is refused here.
        length = w.numel()
        fits = (
            out.dtype == w.dtype
            and (u is None or u.dtype == w.dtype)
            and (out_16bit is None or out_16bit.dtype == torch.bfloat16)
        )
        fits = fits and all(vector.numel() == length for vector in present) and (u is None) == isinstance(step, SGDStep)
        assert fits, f"{step}: got vectors of {[(vector.numel(), vector.dtype) for vector in present]}"
        function(length, *(0 if vector is None else vector.data_ptr() for vector in vectors), *step)
        if out_16bit is not None and w.dtype is torch.float64:
            out_16bit.copy_(out)  # C rounds float32 alone


def _readable(vector: torch.Tensor) -> bool:
    """Tell if C can read a vector by its address: on the CPU, contiguous and not lazily negated."""
    return vector.device.type == "cpu" and vector.is_contiguous() and not vector.is_neg()


def fastest_kernel(dimension: int, device: torch.device | None = None) -> Kernel:
    """Choose the kernel for vectors of D: pooled memory, and compiled steps where they pay and there is a compiler.

    Compiled steps over very long vectors run on as many threads as torch has at this moment (``runtime.threads``); operations
    of torch are divided by torch itself. On a GPU steps are those of Triton, where it works, and memory is that of torch's
    allocator there, which lends what was freed again without a call of the driver.
    """
    if device is not None and device.type != "cpu":
        fused = triton_steps(device)
        return Kernel() if fused is None else Kernel(name="triton", steps=fused)
    steps = compiled_steps() if dimension >= WORTH_COMPILING else None
    if steps is None:
        return Kernel(empty=pooled())
    threads = torch.get_num_threads()
    divided = threads > 1 and dimension >= 2 * LEAST
    return Kernel(name="compiled", steps=Threaded(steps, threads) if divided else steps, empty=pooled())


@functools.cache
def compiled_steps() -> CompiledSteps | None:
    """Compile and load the steps; None, with a line in the log, where there is no compiler or its bits differ from torch's.

    They are compiled once in each process, in a third of a second, into a directory that is removed as soon as the library is
    loaded: no file remains that could be stale, made for another processor, or tampered with. ``CC`` names the compiler.
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
    """Tell if two implementations give the same bits: vectors of all dtypes and of an odd length, aligned and not."""
    return all(
        torch.equal(mine, theirs)
        for dtypes in _PAIRS
        for offset in (0, 1)
        for mine, theirs in zip(
            _all_steps(some, length, offset, *dtypes), _all_steps(others, length, offset, *dtypes), strict=True
        )
    )


def _all_steps(steps: Steps, length: int, offset: int, dtype: torch.dtype, grad_dtype: torch.dtype) -> list[torch.Tensor]:
    """Take every kind of step on random vectors that begin ``offset`` elements after an aligned address; return the results."""
    results: list[torch.Tensor] = []
    for step in (
        SGDStep(0.037),
        HeavyBallStep(0.9, 0.037),
        *(OrMoStep(0.3, shifts, 0.9, 0.0333, 0.0703) for shifts in (0, 1, 3)),
    ):
        randomness = torch.Generator().manual_seed(0)
        grad, u, w, out = (torch.randn(length + offset, generator=randomness, dtype=dtype)[offset:] for _ in range(4))
        out_16bit = torch.zeros(length + offset, dtype=torch.bfloat16)[offset:]
        momentum = None if isinstance(step, SGDStep) else u
        steps(step, grad.to(grad_dtype), momentum, w, out, out_16bit)
        results += [u, out, out_16bit]
    return results
