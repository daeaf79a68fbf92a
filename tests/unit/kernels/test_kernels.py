"""Steps in one pass have the bits of plain torch operations: in C and in chunks, by one thread and by several."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from ormo_rpc.kernels import compiled, threads
from ormo_rpc.kernels import steps as torch_steps
from ormo_rpc.kernels.compiled import agrees, compiled_steps, fastest_kernel
from ormo_rpc.kernels.steps import CHUNK, AdamWStep, HeavyBallStep, OrMoStep, SGDStep, Step, Steps, TorchSteps
from ormo_rpc.kernels.threads import Threaded

LENGTHS = [1, 17, 1_000, 3 * CHUNK + 5, 13 * CHUNK + 5]  # the last one is so long that C stores past the caches


@pytest.fixture(params=["torch", "C", "torch, 3 threads", "C, 3 threads"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Return every implementation, with chunks and parts small enough for short vectors to be divided."""
    monkeypatch.setattr(threads, "LEAST", CHUNK)
    monkeypatch.setattr(torch_steps, "WORTH_CUTTING", CHUNK)
    found: Steps | None = compiled_steps() if request.param.startswith("C") else TorchSteps()
    if found is None:
        pytest.skip("no C compiler, or not one whose bits are torch's")
    return Threaded(found, 3) if "threads" in request.param else found


def vectors(length: int, dtype: torch.dtype, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient, momentum, parameters and a buffer full of NaN, that many elements behind an aligned address."""
    generator = torch.Generator().manual_seed(length)
    whole = [torch.randn(length + offset, generator=generator, dtype=dtype)[offset:] for _ in range(3)]
    return whole[0], whole[1], whole[2], torch.full((length + offset,), torch.nan, dtype=dtype)[offset:]


def check(
    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None],
    plain: Callable[[Tensor, Tensor, Tensor], None],
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    length: int,
    offset: int,
) -> None:
    """Compare a step with plain operations over whole vectors, which work on parameters in place; gradient and w stay.

    With a gradient of 16 bits the plain operations get it widened; what is rounded is what torch's copy makes of the result.
    """
    dtype, grad_dtype = dtypes
    grad, first_u, w, out = vectors(length, dtype, offset)
    narrow = torch.empty(length + offset, dtype=grad_dtype)[offset:].copy_(grad)
    expected_u, expected_w, before = first_u.clone(), w.clone(), (narrow.clone(), w.clone())
    plain(narrow.to(dtype), expected_u, expected_w)
    for out_16bit in (None, torch.zeros(length + offset, dtype=torch.bfloat16)[offset:]):
        u = torch.empty(length + offset, dtype=dtype)[offset:].copy_(first_u)
        run(narrow, u, w, out.fill_(torch.nan), out_16bit)
        assert torch.equal(u, expected_u)
        assert torch.equal(out, expected_w)
        assert out_16bit is None or torch.equal(out_16bit, expected_w.to(torch.bfloat16))
        assert torch.equal(narrow, before[0])
        assert torch.equal(w, before[1])


DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float64, torch.bfloat16),
]
"""(Dtype of the parameters, dtype of the gradient)."""
SHIFTS = [(1.0, 0), (1.0, 1), (0.3, 0), (0.3, 4)]
"""(Scale of the momentum, number of shifts) of an ordered step."""
CASES = [
    (length, DTYPES[j], (i + j) % 5 % 2, SHIFTS[(i + 3 * j) % 5 % 4])
    for i, length in enumerate(LENGTHS)
    for j in range(len(DTYPES))
]
"""Every length with every pair of dtypes, and of the offset and the shifts every pair with each other and with any of these.

Sums modulo a prime do that: any two of i, j, i + j and i + 3 j determine the others.
"""


@pytest.mark.parametrize(("length", "dtypes", "offset", "shifted"), CASES)
def test_an_ordered_step_is_that_of_the_algorithm_to_the_bit(
    steps: Steps, length: int, dtypes: tuple[torch.dtype, torch.dtype], offset: int, shifted: tuple[float, int]
) -> None:
    scale, shifts = shifted

    def plain(grad: Tensor, u: Tensor, w: Tensor) -> None:
        """Take the step of `ormo_rpc.algorithms.ormo`."""
        u.mul_(scale)
        for _ in range(shifts):
            w.sub_(u, alpha=0.9)
            u.mul_(0.9)
        u.add_(grad, alpha=0.9**2 * 0.07)
        w.sub_(grad, alpha=2.71 * 0.07)

    step = OrMoStep(scale=scale, shifts=shifts, beta=0.9, u_scale=0.9**2 * 0.07, w_scale=2.71 * 0.07)
    check(functools.partial(steps, step), plain, dtypes, length=length, offset=offset)


@pytest.mark.parametrize(("length", "dtypes", "offset"), [case[:3] for case in CASES])
def test_a_heavy_ball_step_is_that_of_the_algorithm_to_the_bit(
    steps: Steps, length: int, dtypes: tuple[torch.dtype, torch.dtype], offset: int
) -> None:
    def plain(grad: Tensor, u: Tensor, w: Tensor) -> None:
        """Take the step of `ormo_rpc.algorithms.naive`."""
        u.mul_(0.9).add_(grad, alpha=0.07)
        w.sub_(u)

    check(functools.partial(steps, HeavyBallStep(beta=0.9, u_scale=0.07)), plain, dtypes, length=length, offset=offset)


@pytest.mark.parametrize(("length", "dtypes", "offset"), [case[:3] for case in CASES])
def test_a_plain_step_is_that_of_the_algorithm_and_of_an_ordered_one_without_momentum(
    steps: Steps, length: int, dtypes: tuple[torch.dtype, torch.dtype], offset: int
) -> None:
    def plain(grad: Tensor, u: Tensor, w: Tensor) -> None:  # noqa: ARG001 - there is no momentum
        """Take the step of `ormo_rpc.algorithms.asgd`."""
        w.sub_(grad, alpha=0.07)

    def run(grad: Tensor, u: Tensor, w: Tensor, out: Tensor, out_16bit: Tensor | None) -> None:  # noqa: ARG001 - it has no momentum
        steps(SGDStep(w_scale=0.07), grad, None, w, out, out_16bit)

    check(run, plain, dtypes, length=length, offset=offset)

    def ordered(grad: Tensor, u: Tensor, w: Tensor, out: Tensor, out_16bit: Tensor | None) -> None:
        # 0^0 = 1: the gradient's own weight in u is eta, and u is forgotten by the next shift.
        zero = torch.zeros_like(u)
        steps(OrMoStep(scale=1.0, shifts=1, beta=0.0, u_scale=0.07, w_scale=0.07), grad, zero, w, out, out_16bit)

    check(ordered, plain, dtypes, length=length, offset=offset)


@pytest.mark.parametrize(("length", "dtypes", "offset"), [case[:3] for case in CASES])
def test_a_step_of_adamw_is_that_of_torch_to_the_bit(
    steps: Steps, length: int, dtypes: tuple[torch.dtype, torch.dtype], offset: int
) -> None:
    first_v = vectors(length + 1, dtypes[0], 0)[0][:length].abs()
    after: list[Tensor] = []

    def plain(grad: Tensor, u: Tensor, w: Tensor) -> None:
        """Take the step of ``torch.optim.AdamW`` in its operations, on the third part of a gradient."""
        v, grad = first_v.clone(), grad / 3.0
        w.mul_(0.99)
        u.lerp_(grad, 0.1)
        v.mul_(0.9).addcmul_(grad, grad, value=0.1)
        w.addcdiv_(u, (v.sqrt() / 0.7).add_(1e-8), value=-0.03)
        after.append(v)

    def run(grad: Tensor, u: Tensor, w: Tensor, out: Tensor, out_16bit: Tensor | None) -> None:
        step = AdamWStep(divisor=3.0, weight1=0.1, beta2=0.9, weight2=0.1, decay=0.99, size=0.03, root=0.7, eps=1e-8)
        v, before = first_v.clone(), u.clone()
        steps(step, grad, u, w, out, out_16bit, v)
        assert torch.equal(v, after[0])
        in_place = w.clone()
        steps(step, grad, before, in_place, in_place, None, first_v.clone())
        assert torch.equal(in_place, out)

    check(run, plain, dtypes, length=length, offset=offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_widened_exactly(steps: Steps, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for grad in (every, every[1:]):  # in whole vectors, and with a rest
        out = torch.empty(grad.numel())
        steps(SGDStep(w_scale=-1.0), grad, None, torch.full_like(out, -0.0), out)  # -0 + x = x, the zeros included
        expected = grad.float()
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(7.0).view(torch.int32), expected.nan_to_num(7.0).view(torch.int32))


def test_numbers_are_rounded_to_the_nearest_with_ties_to_even(steps: Steps) -> None:
    """All exponents and signs; what lies between two neighbours, in the middle, and next to the middle; no number at all."""
    high = torch.arange(0, 2**16, 37, dtype=torch.int64)
    rest = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] * 2**16 + rest).reshape(-1)
    numbers = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    out, out_16bit = torch.empty_like(numbers), torch.empty(numbers.numel(), dtype=torch.bfloat16)
    steps(SGDStep(w_scale=0.0), torch.zeros_like(numbers), None, numbers, out, out_16bit)
    assert torch.equal(out_16bit.isnan(), numbers.isnan())
    assert bool(numbers.isnan().any())
    finite = ~numbers.isnan()
    assert torch.equal(out_16bit[finite], numbers[finite].to(torch.bfloat16))


def test_steps_run_in_torch_without_a_working_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for compiler in ("/no/such/compiler", "false"):
        compiled_steps.cache_clear()
        monkeypatch.setenv("CC", compiler)
        assert compiled_steps() is None
    compiled_steps.cache_clear()
    assert caplog.text.count("could not be compiled") == 2


def test_compiled_steps_with_other_bits_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if compiled_steps() is None:
        pytest.skip("no C compiler, or not one whose bits are torch's")
    compiled_steps.cache_clear()
    # What a compiler does that rounds the product by itself.
    rounded = "-D__builtin_fmaf(a,b,c)=((a)*(b)+(c))"
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-mno-avx", rounded))
    assert compiled_steps() is None
    compiled_steps.cache_clear()
    assert "would give other bits" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx"])  # vectors of half the length, and none
def test_the_bits_are_the_same_on_other_processors(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled_steps() is None or platform.machine() != "x86_64":
        pytest.skip("no C compiler, or not one whose bits are torch's, or another family of processors")
    compiled_steps.cache_clear()
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, without))
    steps = compiled_steps()
    compiled_steps.cache_clear()
    assert steps is not None
    test_every_16_bit_value_is_widened_exactly(steps, torch.bfloat16)
    test_every_16_bit_value_is_widened_exactly(steps, torch.float16)
    test_numbers_are_rounded_to_the_nearest_with_ties_to_even(steps)


@pytest.mark.parametrize(
    ("torch_threads", "dimension", "divided"), [(1, 2 * CHUNK, 0), (3, 2 * CHUNK, 3), (3, 2 * CHUNK - 1, 0)]
)
def test_long_vectors_are_divided_among_as_many_threads_as_torch_has(
    torch_threads: int, dimension: int, divided: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled_steps() is None:
        pytest.skip("no C compiler, or not one whose bits are torch's")
    monkeypatch.setattr(compiled, "LEAST", CHUNK)
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    try:
        kernel = fastest_kernel(dimension)
    finally:
        torch.set_num_threads(before)
    assert kernel.name == "compiled"
    assert (kernel.steps.threads if isinstance(kernel.steps, Threaded) else 0) == divided


class Wrong(TorchSteps):
    """Rounds twice, or widens wrongly, or rounds the other way."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    @override
    def __call__(
        self,
        step: Step,
        grad: Tensor,
        u: Tensor | None,
        w: Tensor,
        out: Tensor,
        out_16bit: Tensor | None = None,
        v: Tensor | None = None,
    ) -> None:
        super().__call__(step, grad, u, w, out, out_16bit, v)
        if self.fault == "twice" and isinstance(step, SGDStep):
            torch.sub(w, grad * step.w_scale, out=out)
        elif self.fault == "widened" and grad.dtype == torch.bfloat16:
            out.add_(1e-3)
        elif self.fault == "rounded" and out_16bit is not None:
            out_16bit.view(torch.int16).copy_(out.to(torch.float32).view(torch.int32) // 2**16)


@pytest.mark.parametrize("fault", ["twice", "widened", "rounded"])
def test_a_compiled_kernel_with_other_bits_is_rejected(fault: str) -> None:
    assert agrees(TorchSteps(), TorchSteps())
    assert not agrees(Wrong(fault), TorchSteps())


@pytest.mark.parametrize("wrong", ["shape", "dtype", "out_16bit", "u", "no u"])
def test_c_is_never_called_with_vectors_that_do_not_fit(wrong: str) -> None:
    steps = compiled_steps()
    if steps is None:
        pytest.skip("no C compiler, or not one whose bits are torch's")
    ones, double = torch.ones(8), torch.ones(8, dtype=torch.float64)
    step, u = (HeavyBallStep(0.9, 1.0), ones.clone()) if wrong in ("u", "no u") else (SGDStep(1.0), None)
    out, out_16bit = ones.clone(), None
    if wrong == "shape":
        out = torch.ones(7)
    elif wrong == "dtype":
        out = double
    elif wrong == "out_16bit":
        out_16bit = torch.ones(8, dtype=torch.float16)
    else:
        u = double if wrong == "u" else None
    with pytest.raises(AssertionError, match=r"^(SGDStep|HeavyBallStep)\("):
        steps(step, ones, u, ones, out, out_16bit)


def test_vectors_that_c_cannot_read_are_left_to_torch() -> None:
    steps = compiled_steps()
    if steps is None:
        pytest.skip("no C compiler, or not one whose bits are torch's")
    strided = torch.arange(8.0)[::2]
    lazily = torch._neg_view(torch.arange(4.0))  # pyright: ignore[reportPrivateImportUsage,reportPrivateUsage] # how conj() of an imaginary part comes about
    w = torch.full((4,), 2.0)
    for grad, expected in ((strided, [2.0, 0, -2, -4]), (lazily, [2.0, 3, 4, 5])):
        out, u = torch.full((4,), torch.nan), torch.zeros(4)
        steps(SGDStep(w_scale=1.0), grad, None, w, out)
        assert out.tolist() == expected
        steps(HeavyBallStep(beta=0.5, u_scale=1.0), grad, u, w, out)
        assert out.tolist() == expected
        assert u.tolist() == grad.tolist()
        steps(OrMoStep(scale=1.0, shifts=1, beta=0.5, u_scale=1.0, w_scale=1.0), grad, u.zero_(), w, out)
        assert out.tolist() == expected
        assert u.tolist() == grad.tolist()
