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

from ormo_rpc.kernels.kernel import Kernel
from ormo_rpc.kernels.pool import pooled
from ormo_rpc.kernels.steps import CHUNK, HeavyBallStep, OrMoStep, SGDStep, Step, Steps, TorchSteps
from ormo_rpc.kernels.threads import LEAST, Threaded

SOURCE = Path(__file__).with_name("steps.c")
FLAGS = ("-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-std=c11")
"""Without contraction, so that every rounding is the one that is written down."""
COMPILE_TIMEOUT_SECONDS = 30.0

WORTH_COMPILING = CHUNK
"""Elements below which the compiler takes longer than a run gains, as the calls cost more than the passes over memory."""

_log = logging.getLogger(__name__)
_NAMES: dict[torch.dtype, tuple[str, Any]] = {
    torch.float32: ("f32", ctypes.c_float),
    torch.float64: ("f64", ctypes.c_double),
    torch.bfloat16: ("bf16", None),
    torch.float16: ("fp16", None),
}
"""What a dtype is called in C, and the type of a step's numbers there, which are of the parameters' dtype."""
_PAIRS = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
)
"""Dtypes of parameters and of gradients that there are steps for."""


class CompiledSteps:
    """`Steps` in C: each element is read and written once.

    What C cannot read is torch's work: strided or elsewhere, or with a gradient of another dtype than there are functions for.

    Args:
        library: ``steps.c``, compiled.
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

    def __call__(
        self, step: Step, grad: Tensor, u: Tensor | None, w: Tensor, out: Tensor, out_16bit: Tensor | None = None
    ) -> None:
        """See `Steps`."""
        function = self._functions.get((type(step), w.dtype, grad.dtype))
        vectors = (grad, u, w, out, out_16bit)
        present = [vector for vector in vectors if vector is not None]
        if function is None or not all(map(_readable, present)):
            self._otherwise(step, grad, u, w, out, out_16bit)
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


def _readable(vector: Tensor) -> bool:
    """Whether its values lie in this machine's memory one behind the other, as they are."""
    return vector.device.type == "cpu" and vector.is_contiguous() and not vector.is_neg()


def fastest_kernel(dimension: int) -> Kernel:
    """Pools of vectors, and compiled steps where the vectors are long enough for that and there is a compiler, else torch's.

    Compiled steps over very long vectors are divided among as many threads as torch may have now (``runtime.threads``); its own
    operations it divides by itself.
    """
    steps = compiled_steps() if dimension >= WORTH_COMPILING else None
    if steps is None:
        return Kernel(empty=pooled())
    threads = torch.get_num_threads()
    divided = threads > 1 and dimension >= 2 * LEAST
    return Kernel(name="compiled", steps=Threaded(steps, threads) if divided else steps, empty=pooled())


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
    """Whether two implementations give the same bits on vectors with an odd rest, aligned and not, of all dtypes."""
    return all(
        torch.equal(mine, theirs)
        for dtypes in _PAIRS
        for offset in (0, 1)
        for mine, theirs in zip(
            _all_steps(some, length, offset, *dtypes), _all_steps(others, length, offset, *dtypes), strict=True
        )
    )


def _all_steps(steps: Steps, length: int, offset: int, dtype: torch.dtype, grad_dtype: torch.dtype) -> list[Tensor]:
    """What each step makes of a gradient, a momentum and parameters that begin ``offset`` behind an aligned address."""
    results: list[Tensor] = []
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
