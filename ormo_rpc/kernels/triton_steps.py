"""Steps on a GPU, each by one kernel of Triton; torch operations where there is no Triton, or it does not work here."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.kernels.steps import AdamWStep, HeavyBallStep, SGDStep, Step, Steps, TorchSteps

BLOCK = 1024
"""Elements of a program: 8 of each of its threads, in two accesses of 16 bytes to a vector of float32."""
WARPS = 4
_GRADIENTS = (torch.bfloat16, torch.float16)
_log = logging.getLogger(__name__)


class TritonSteps(Steps):
    """`Steps` as kernels of Triton: each element is read and written once.

    The bits of `SGDStep`, `HeavyBallStep` and `OrMoStep` are those of `TorchSteps` on the CPU, and so are the moments of an
    `AdamWStep`. Its square root is rounded as IEEE 754 has it, and that of torch on the CPU not quite: it may be another one by
    a unit in the last place, and what is taken from the parameters by three.

    Falls back to `TorchSteps` for vectors that are strided or not on a GPU, and for other pairs of dtypes.
    """

    def __init__(self) -> None:
        from ormo_rpc.kernels import triton_kernels

        self._kernels: Any = triton_kernels
        self._otherwise = TorchSteps()

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
        present = [vector for vector in (grad, u, w, out, out_16bit, v) if vector is not None]
        known = w.dtype in (torch.float32, torch.float64) and (grad.dtype == w.dtype or grad.dtype in _GRADIENTS)
        if not known or not all(vector.is_cuda and vector.is_contiguous() and not vector.is_neg() for vector in present):
            self._otherwise(step, grad, u, w, out, out_16bit, v)
            return
        # A kernel knows nothing of lengths, so whatever would make it read or write elsewhere is refused here.
        length = w.numel()
        fits = all(vector.numel() == length and vector.device == w.device for vector in present)
        fits = fits and all(vector is None or vector.dtype == w.dtype for vector in (u, out, v))
        fits = fits and (out_16bit is None or out_16bit.dtype == torch.bfloat16)
        fits = fits and (u is None) == isinstance(step, SGDStep) and (v is not None) == isinstance(step, AdamWStep)
        assert fits, f"{step}: got vectors of {[(vector.numel(), vector.dtype, vector.device) for vector in present]}"
        if torch.cuda.current_device() == w.device.index:
            self._launch(step, grad, u, w, out, out_16bit, v)
        else:
            with torch.cuda.device(w.device):
                self._launch(step, grad, u, w, out, out_16bit, v)

    def _launch(
        self,
        step: Step,
        grad: torch.Tensor,
        u: torch.Tensor | None,
        w: torch.Tensor,
        out: torch.Tensor,
        out_16bit: torch.Tensor | None,
        v: torch.Tensor | None,
    ) -> None:
        length = w.numel()
        grid = (-(-length // BLOCK),)
        options = {"BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": False}
        if isinstance(step, SGDStep):
            self._kernels.sgd_kernel[grid](grad, w, out, out_16bit, length, -step.w_scale, **options)
        elif isinstance(step, HeavyBallStep):
            self._kernels.heavy_ball_kernel[grid](grad, u, w, out, out_16bit, length, *step, **options)
        elif isinstance(step, AdamWStep):
            numbers = step._replace(size=-step.size)
            self._kernels.adamw_kernel[grid](grad, u, v, w, out, out_16bit, length, *numbers, **options)
        else:
            numbers = (step.scale, step.shifts, step.beta, -step.beta, step.u_scale, -step.w_scale)
            self._kernels.ormo_kernel[grid](grad, u, w, out, out_16bit, length, *numbers, **options)


@functools.cache
def triton_steps(device: torch.device) -> TritonSteps | None:
    """Return the steps for a GPU once one was tried there; None, with a line in the log, where Triton is missing or fails.

    Triton compiles a kernel at its first use, into its cache (``TRITON_CACHE_DIR``), and needs a C compiler for that.
    """
    if importlib.util.find_spec("triton") is None:
        _log.info("no Triton: the server's steps run in torch on %s, which takes more passes over its memory", device)
        return None
    ones = torch.ones(16, device=device)
    out = torch.empty_like(ones)
    try:
        steps = TritonSteps()
        steps(SGDStep(0.25), ones, None, ones, out)
        made = out.tolist()
    except Exception as error:  # of the compiler, of the driver, or of a Triton that is another one
        _log.warning("the server's steps run in torch on %s, as Triton fails: %s", device, str(error).strip() or repr(error))
        return None
    if made != [0.75] * len(made):
        _log.warning("the server's steps run in torch on %s, as Triton computes %s there in place of 0.75", device, made[0])
        return None
    return steps
