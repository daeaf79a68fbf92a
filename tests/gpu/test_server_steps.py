"""The server's steps on a GPU have the bits of torch on the CPU, by Triton and by torch's own kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ormo_rpc.kernels.compiled import fastest_kernel
from ormo_rpc.kernels.steps import AdamWStep, HeavyBallStep, OrMoStep, SGDStep, Step, Steps, TorchSteps
from ormo_rpc.kernels.triton_steps import BLOCK, TritonSteps, triton_steps

LENGTHS = [1, 17, BLOCK, 3 * BLOCK + 5, 1_000_003]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float64, torch.bfloat16),
]
"""(Dtype of the parameters, dtype of the gradient)."""
LINEAR: list[Step] = [
    SGDStep(0.037),
    SGDStep(0.0),
    HeavyBallStep(0.9, 0.037),
    *(OrMoStep(scale, shifts, 0.9, 0.0333, 0.0703) for scale, shifts in ((1.0, 0), (0.3, 1), (1.0, 16), (1.0, 3))),
]
ADAMW: list[Step] = [
    AdamWStep(3.0, 0.1, 0.999, 0.001, 0.99, 0.03, 0.7, 1e-8),
    AdamWStep(1.0, 0.9, 0.9, 0.1, 1.0, 0.03, 0.7, 1e-8),
]


@pytest.fixture(params=["triton", "torch"])
def steps(request: pytest.FixtureRequest, gpu: torch.device) -> Steps:
    """Return both implementations; the one of Triton must be there."""
    if request.param == "torch":
        return TorchSteps()
    found = triton_steps(gpu)
    assert found is not None, "Triton comes with PyTorch for CUDA"
    return found


def taken(
    steps: Steps, step: Step, length: int, offset: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device | str
) -> list[Tensor]:
    """Take a step on random vectors that begin so many elements behind an aligned address; return all that it writes."""
    dtype, grad_dtype = dtypes
    generator = torch.Generator().manual_seed(length)
    drawn = [torch.randn(length + offset, generator=generator, dtype=dtype) for _ in range(4)]
    grad, u, w, v = (each.to(device)[offset:] for each in (drawn[0].to(grad_dtype), drawn[1], drawn[2], drawn[3].abs()))
    before = grad.clone(), w.clone()
    out = torch.full((length + offset,), torch.nan, dtype=dtype, device=device)[offset:]
    out_16bit = torch.zeros(length + offset, dtype=torch.bfloat16, device=device)[offset:]
    adam = isinstance(step, AdamWStep)
    steps(step, grad, None if isinstance(step, SGDStep) else u, w, out, out_16bit, v if adam else None)
    assert torch.equal(grad, before[0])
    assert torch.equal(w, before[1])
    return [each.cpu() for each in (u, v, out, out_16bit)]


@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_step_has_the_bits_of_torch_on_the_cpu(
    steps: Steps, dtypes: tuple[torch.dtype, torch.dtype], gpu: torch.device
) -> None:
    for number, (length, step) in enumerate((length, step) for length in LENGTHS for step in LINEAR):
        found, expected = (
            taken(some, step, length, number % 2, dtypes, device) for some, device in ((steps, gpu), (TorchSteps(), "cpu"))
        )
        for name, mine, theirs in zip(("u", "v", "out", "out_16bit"), found, expected, strict=True):
            assert torch.equal(mine, theirs), f"{step} of {length} {dtypes}: {name}"


@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_step_of_adamw_differs_by_the_rounding_of_its_root(
    steps: Steps, dtypes: tuple[torch.dtype, torch.dtype], gpu: torch.device
) -> None:
    eps = torch.finfo(dtypes[0]).eps
    for length in (17, 3 * BLOCK + 5):
        for step in ADAMW:
            u, v, out, _ = taken(steps, step, length, 0, dtypes, gpu)
            expected_u, expected_v, expected, _ = taken(TorchSteps(), step, length, 0, dtypes, "cpu")
            if isinstance(steps, TritonSteps):
                assert torch.equal(u, expected_u)
                assert torch.equal(v, expected_v)
            torch.testing.assert_close(u, expected_u, rtol=4 * eps, atol=4 * eps)
            torch.testing.assert_close(v, expected_v, rtol=4 * eps, atol=0)
            assert isinstance(step, AdamWStep)
            moved = step.size * expected_u.abs() / (expected_v.sqrt() / step.root + step.eps)
            allowed = 8 * eps * moved + 2 * eps * expected.abs() + 2 * eps
            assert bool(((out - expected).abs() <= allowed).all()), f"{step} of {length} {dtypes}"


def test_numbers_are_rounded_to_the_nearest_with_ties_to_even(steps: Steps, gpu: torch.device) -> None:
    """All exponents and signs; what lies between two neighbours, in the middle, and next to the middle."""
    high = torch.arange(0, 2**16, 37, dtype=torch.int64)
    rest = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] * 2**16 + rest).reshape(-1)
    numbers = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    numbers = numbers[numbers.isfinite()]
    w = numbers.to(gpu)
    out, out_16bit = torch.empty_like(w), torch.empty_like(w, dtype=torch.bfloat16)
    steps(SGDStep(w_scale=0.0), torch.zeros_like(w), None, w, out, out_16bit)
    assert torch.equal(out.cpu(), numbers)
    assert torch.equal(out_16bit.cpu(), numbers.to(torch.bfloat16))


def test_the_kernel_of_a_gpu_is_that_of_triton(gpu: torch.device) -> None:
    kernel = fastest_kernel(1000, gpu)
    assert kernel.name == "triton"
    w = torch.ones(1000, device=gpu)
    assert torch.equal(kernel.apply(SGDStep(0.5), w, w), w * 0.5)
    # What it cannot read by an address alone is left to torch.
    strided = torch.ones(2000, device=gpu)[::2]
    assert torch.equal(kernel.apply(SGDStep(0.5), strided, w), w * 0.5)
    with pytest.raises(AssertionError, match="SGDStep"):
        kernel.steps(SGDStep(0.5), w, None, w, torch.ones(999, device=gpu))
