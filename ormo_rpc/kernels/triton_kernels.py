"""The server's steps on a GPU as kernels of Triton, which reads and writes each element once; see `triton_steps`.

Every element goes through the roundings of the torch operations in ``steps.py`` on a processor, as in ``steps.c``: torch adds
with a scale by one fused multiply-add. So these are written as `tl.fma`, and must be launched with ``enable_fp_fusion=False``,
or the compiler would fuse others too. Numbers come as float64 and are rounded to the parameters' dtype here, as torch rounds
them; those that are subtracted come negated, as Triton negates by a difference, which has another sign of zero.

A block that is whole is read without a mask, since a mask would keep Triton from reading 16 bytes at a time.
"""

# Triton is no dependency (PyTorch for CUDA brings it), and its language is no Python that a type checker knows.
# pyright: reportMissingImports=false, reportUnknownParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingParameterType=false, reportInvalidTypeForm=false
# ruff: noqa: ANN001, ANN202, ANN201

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store(out, out_16bit, at, mask, y):
    """Write new parameters, and their copy rounded to bfloat16, to nearest with ties to even."""
    tl.store(out + at, y, mask=mask)
    if out_16bit is not None:
        tl.store(out_16bit + at, y.to(tl.float32).to(tl.bfloat16), mask=mask)


@triton.jit
def _sgd(grad, w, out, out_16bit, at, mask, minus_w_scale):
    y = tl.load(w + at, mask=mask)
    g = tl.load(grad + at, mask=mask).to(y.dtype)
    _store(out, out_16bit, at, mask, tl.fma(g, minus_w_scale.to(y.dtype), y))


@triton.jit(do_not_specialize=["n"])
def sgd_kernel(grad, w, out, out_16bit, n: tl.int64, minus_w_scale: tl.float64, BLOCK: tl.constexpr):  # noqa: N803 - constants
    """``out <- w - w_scale g``."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _sgd(grad, w, out, out_16bit, at, None, minus_w_scale)
    else:
        _sgd(grad, w, out, out_16bit, at, at < n, minus_w_scale)


@triton.jit
def _heavy_ball(grad, u, w, out, out_16bit, at, mask, beta, u_scale):
    y = tl.load(w + at, mask=mask)
    g = tl.load(grad + at, mask=mask).to(y.dtype)
    v = tl.fma(g, u_scale.to(y.dtype), tl.load(u + at, mask=mask) * beta.to(y.dtype))
    tl.store(u + at, v, mask=mask)
    _store(out, out_16bit, at, mask, y - v)


@triton.jit(do_not_specialize=["n"])
def heavy_ball_kernel(
    grad,
    u,
    w,
    out,
    out_16bit,
    n: tl.int64,
    beta: tl.float64,
    u_scale: tl.float64,
    BLOCK: tl.constexpr,  # noqa: N803 - as above
):
    """``u <- beta u + u_scale g; out <- w - u``."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _heavy_ball(grad, u, w, out, out_16bit, at, None, beta, u_scale)
    else:
        _heavy_ball(grad, u, w, out, out_16bit, at, at < n, beta, u_scale)


@triton.jit
def _ormo(grad, u, w, out, out_16bit, at, mask, scale, shifts, beta, minus_beta, u_scale, minus_w_scale):
    y = tl.load(w + at, mask=mask)
    g = tl.load(grad + at, mask=mask).to(y.dtype)
    v = tl.load(u + at, mask=mask) * scale.to(y.dtype)
    for _ in range(shifts):
        y = tl.fma(v, minus_beta.to(y.dtype), y)
        v = v * beta.to(y.dtype)
    tl.store(u + at, tl.fma(g, u_scale.to(y.dtype), v), mask=mask)
    _store(out, out_16bit, at, mask, tl.fma(g, minus_w_scale.to(y.dtype), y))


@triton.jit(do_not_specialize=["n", "shifts"])
def ormo_kernel(
    grad,
    u,
    w,
    out,
    out_16bit,
    n: tl.int64,
    scale: tl.float64,
    shifts: tl.int64,
    beta: tl.float64,
    minus_beta: tl.float64,
    u_scale: tl.float64,
    minus_w_scale: tl.float64,
    BLOCK: tl.constexpr,  # noqa: N803 - as above
):
    """``u <- scale u``; ``shifts`` times ``w <- w - beta u; u <- beta u``; ``u <- u + u_scale g; out <- w - w_scale g``."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _ormo(grad, u, w, out, out_16bit, at, None, scale, shifts, beta, minus_beta, u_scale, minus_w_scale)
    else:
        _ormo(grad, u, w, out, out_16bit, at, at < n, scale, shifts, beta, minus_beta, u_scale, minus_w_scale)


@triton.jit
def _divided(x, y):
    """Divide with the rounding of IEEE 754; Triton's own division of float32 is an approximation."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:  # noqa: RET505 - Triton compiles one of the two
        return x / y


@triton.jit
def _root(x):
    """Take the square root with the rounding of IEEE 754."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:  # noqa: RET505 - as above
        return tl.sqrt(x)


@triton.jit
def _adamw(grad, u, v, w, out, out_16bit, at, mask, divisor, weight1, beta2, weight2, decay, minus_size, root, eps):
    y = tl.load(w + at, mask=mask)
    m = tl.load(u + at, mask=mask)
    g = _divided(tl.load(grad + at, mask=mask).to(y.dtype), tl.zeros_like(y) + divisor.to(y.dtype))
    weight = weight1.to(y.dtype)
    # torch goes from the nearer end.
    m = tl.where(weight < 0.5, tl.fma(g - m, tl.zeros_like(y) + weight, m), tl.fma(g - m, tl.zeros_like(y) + (weight - 1), g))
    square = tl.fma(weight2.to(y.dtype) * g, g, tl.load(v + at, mask=mask) * beta2.to(y.dtype))
    tl.store(u + at, m, mask=mask)
    tl.store(v + at, square, mask=mask)
    below = _divided(_root(square), tl.zeros_like(y) + root.to(y.dtype)) + eps.to(y.dtype)
    moved = _divided(minus_size.to(y.dtype) * m, below)
    _store(out, out_16bit, at, mask, y * decay.to(y.dtype) + moved)


@triton.jit(do_not_specialize=["n"])
def adamw_kernel(
    grad,
    u,
    v,
    w,
    out,
    out_16bit,
    n: tl.int64,
    divisor: tl.float64,
    weight1: tl.float64,
    beta2: tl.float64,
    weight2: tl.float64,
    decay: tl.float64,
    minus_size: tl.float64,
    root: tl.float64,
    eps: tl.float64,
    BLOCK: tl.constexpr,  # noqa: N803 - as above
):
    """A step of AdamW in the operations of `AdamWStep`."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _adamw(grad, u, v, w, out, out_16bit, at, None, divisor, weight1, beta2, weight2, decay, minus_size, root, eps)
    else:
        _adamw(grad, u, v, w, out, out_16bit, at, at < n, divisor, weight1, beta2, weight2, decay, minus_size, root, eps)
