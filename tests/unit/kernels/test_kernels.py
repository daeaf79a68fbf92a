"""The steps in one pass: the bits of the plain torch operations, in C and in chunks, by one thread and by several; the pool."""

from __future__ import annotations

import functools
import gc
import platform
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ormo_rpc import Push, build_server
from ormo_rpc.kernels import compiled, threads
from ormo_rpc.kernels import steps as torch_steps
from ormo_rpc.kernels.compiled import agrees, compiled_steps, fastest_kernel
from ormo_rpc.kernels.kernel import Kernel
from ormo_rpc.kernels.pool import WORTH_POOLING, Pool
from ormo_rpc.kernels.steps import CHUNK, HeavyBallStep, OrMoStep, SGDStep, Step, Steps, TorchSteps
from ormo_rpc.kernels.threads import Threaded

LENGTHS = [1, 17, 1_000, 3 * CHUNK + 5, 13 * CHUNK + 5]  # the last one is so long that C stores past the caches


@pytest.fixture(params=["torch", "C", "torch, 3 threads", "C, 3 threads"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Every implementation; vectors are cut into chunks, and handed to three threads, at lengths that a test can afford."""
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
"""Of the parameters, and of the gradient."""
SHIFTS = [(1.0, 0), (1.0, 1), (0.3, 0), (0.3, 4)]
"""The factor of the momentum in an ordered step, and its number of shifts."""
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
        """As `ormo_rpc.algorithms.ormo` has it."""
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
        """As `ormo_rpc.algorithms.naive` has it."""
        u.mul_(0.9).add_(grad, alpha=0.07)
        w.sub_(u)

    check(functools.partial(steps, HeavyBallStep(beta=0.9, u_scale=0.07)), plain, dtypes, length=length, offset=offset)


@pytest.mark.parametrize(("length", "dtypes", "offset"), [case[:3] for case in CASES])
def test_a_plain_step_is_that_of_the_algorithm_and_of_an_ordered_one_without_momentum(
    steps: Steps, length: int, dtypes: tuple[torch.dtype, torch.dtype], offset: int
) -> None:
    def plain(grad: Tensor, u: Tensor, w: Tensor) -> None:  # noqa: ARG001 - there is no momentum
        """As `ormo_rpc.algorithms.asgd` has it."""
        w.sub_(grad, alpha=0.07)

    def run(grad: Tensor, u: Tensor, w: Tensor, out: Tensor, out_16bit: Tensor | None) -> None:  # noqa: ARG001 - likewise
        steps(SGDStep(w_scale=0.07), grad, None, w, out, out_16bit)

    check(run, plain, dtypes, length=length, offset=offset)

    def ordered(grad: Tensor, u: Tensor, w: Tensor, out: Tensor, out_16bit: Tensor | None) -> None:
        # 0^0 = 1: the gradient's own weight in u is eta, and u is forgotten by the next shift.
        zero = torch.zeros_like(u)
        steps(OrMoStep(scale=1.0, shifts=1, beta=0.0, u_scale=0.07, w_scale=0.07), grad, zero, w, out, out_16bit)

    check(ordered, plain, dtypes, length=length, offset=offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_widened_exactly(steps: Steps, dtype: torch.dtype) -> None:
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


def test_a_compiler_that_is_missing_or_fails_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for compiler in ("/no/such/compiler", "false"):
        compiled_steps.cache_clear()
        monkeypatch.setenv("CC", compiler)
        assert compiled_steps() is None
    compiled_steps.cache_clear()
    assert caplog.text.count("could not be compiled") == 2


def test_a_compiler_whose_bits_are_others_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if compiled_steps() is None:
        pytest.skip("no C compiler, or not one whose bits are torch's")
    compiled_steps.cache_clear()
    # What a compiler does that rounds the product by itself.
    rounded = "-D__builtin_fmaf(a,b,c)=((a)*(b)+(c))"
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-mno-avx", rounded))
    assert compiled_steps() is None
    compiled_steps.cache_clear()
    assert "would give other bits" in caplog.text


@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx"])  # vectors of half the length, and none
def test_the_bits_are_the_same_on_other_processors(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled_steps() is None or platform.machine() != "x86_64":
        pytest.skip("no C compiler, or not one whose bits are torch's, or another family of processors")
    compiled_steps.cache_clear()
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, without))
    steps = compiled_steps()
    compiled_steps.cache_clear()
    assert steps is not None
    test_every_number_of_16_bits_is_widened_exactly(steps, torch.bfloat16)
    test_every_number_of_16_bits_is_widened_exactly(steps, torch.float16)
    test_numbers_are_rounded_to_the_nearest_with_ties_to_even(steps)


@pytest.mark.parametrize(
    ("torch_threads", "dimension", "divided"), [(1, 2 * CHUNK, 0), (3, 2 * CHUNK, 3), (3, 2 * CHUNK - 1, 0)]
)
def test_very_long_vectors_are_divided_among_as_many_threads_as_torch_may_have(
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

    def __call__(
        self, step: Step, grad: Tensor, u: Tensor | None, w: Tensor, out: Tensor, out_16bit: Tensor | None = None
    ) -> None:
        super().__call__(step, grad, u, w, out, out_16bit)
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


# ------------------------------------------------------------------------------------------------------------------ the server


@pytest.mark.parametrize("algorithm", ["ormo", "ormo_da", "asgd", "naive", "shifted", "fedbuff"])
def test_a_server_has_the_bits_of_torch_and_few_vectors_with_any_kernel(algorithm: str) -> None:
    dimension = WORTH_POOLING // 4 + 3  # long enough for a pool; float32
    pools: list[Pool] = []

    def empty(like: Tensor) -> Tensor:
        if not pools:
            pools.append(Pool(like.numel(), like.dtype))
        return pools[0].take()

    steps = compiled_steps() or TorchSteps()
    kernels = [Kernel(), fastest_kernel(dimension), Kernel(name="mine", steps=steps, empty=empty)]
    servers = [
        build_server(
            algorithm=algorithm, params=torch.ones(dimension), num_workers=3, lr=lambda t: 0.1 / (t + 1), kernel=kernel
        )
        for kernel in kernels
    ]
    generator, order = torch.Generator().manual_seed(0), [0, 1, 1, 2, 0, 1, 1, 1, 1, 0, 2]
    held = [{reply.worker: reply for reply in server.start()} for server in servers]
    before: list[tuple[Tensor, Tensor]] = []
    for number, worker in enumerate(order):
        if number == 6:  # a loaded state goes on alike, and what was handed out before stays
            before = [(reply.params, reply.params.clone()) for replies in held for reply in replies.values()]
            for server, replies in zip(servers, held, strict=True):
                server.load_state_dict(server.state_dict(replies=True))
                assert server.params.data_ptr() not in [reply.params.data_ptr() for reply in replies.values()]
        grad = torch.randn(dimension, generator=generator)
        for server, replies in zip(servers, held, strict=True):
            reply = replies.pop(worker)
            assert reply.ticket is not None
            push = Push(worker=worker, ticket=reply.ticket, stamp=reply.stamp, grad=grad)
            del reply
            replies |= {reply.worker: reply for reply in server.receive(push)}
        for server, replies in zip(servers, held, strict=True):
            assert torch.equal(server.params, servers[0].params)
            assert torch.equal(replies[worker].params, server.params)
            if server.algorithm.OUT_OF_PLACE:
                assert replies[worker].params.data_ptr() == server.params.data_ptr(), "the parameters are the snapshot"
        if number == 6:
            assert all(torch.equal(params, copy) for params, copy in before)
            before.clear()
    gc.collect()
    # The replies of 3 workers, the step's own new vector, and two more while a state is loaded and held by this test.
    assert len(pools[0].made) <= 6
    assert pools[0].lent <= 4


@pytest.mark.parametrize("sent_dtype", [None, torch.bfloat16])
def test_with_memory_reserved_no_step_has_to_make_any(sent_dtype: torch.dtype | None) -> None:
    dimension, num_workers = WORTH_POOLING, 4
    pools: dict[torch.dtype, Pool] = {}

    def empty(like: Tensor) -> Tensor:
        return pools.setdefault(like.dtype, Pool(like.numel(), like.dtype)).take()

    server = build_server(
        params=torch.ones(dimension), num_workers=num_workers, kernel=Kernel(empty=empty), sent_dtype=sent_dtype
    )
    server.snapshots.reserve(num_workers)
    made = {dtype: len(pool.made) for dtype, pool in pools.items()}
    assert sum(made.values()) == num_workers + (1 if sent_dtype is None else 3)
    held = {reply.worker: reply for reply in server.start()}
    for worker in (0, 1, 2, 3, 3, 2, 1, 0, 1, 1):
        reply = held.pop(worker)
        assert reply.ticket is not None
        push = Push(worker=worker, ticket=reply.ticket, stamp=reply.stamp, grad=torch.ones(dimension))
        del reply
        held |= {reply.worker: reply for reply in server.receive(push)}
    assert {dtype: len(pool.made) for dtype, pool in pools.items()} == made


# ------------------------------------------------------------------------------------------------------------------- the pool


@pytest.mark.parametrize("dimension", [3, 1_000_000])
def test_pooled_memory_is_reused_only_after_its_last_reference(dimension: int) -> None:
    pool = Pool(dimension, torch.float32)
    first = pool.take()
    address = first.data_ptr()
    assert address % 64 == 0
    view = first.detach()[1:]  # shares the memory, and knows nothing of the tensor that it was made from
    array = first.numpy()
    del first
    gc.collect()
    assert pool.take().data_ptr() != address
    del view
    gc.collect()
    assert pool.take().data_ptr() != address
    del array
    gc.collect()
    held = [pool.take() for _ in range(2)]
    assert address in [vector.data_ptr() for vector in held]
    assert len(pool.made) == 2
    assert pool.lent == 2


def test_pooled_memory_freed_in_other_threads_is_reused_once() -> None:
    pool = Pool(64, torch.float64)
    torn: list[str] = []

    def use(number: int) -> None:
        for turn in range(300):
            vector = pool.take()
            vector.fill_(number + turn / 1000)
            if not bool((vector == number + turn / 1000).all()):
                torn.append(f"{number}: {turn}")

    workers = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=30)
        assert not worker.is_alive()
    gc.collect()
    assert torn == []
    assert pool.lent == 0
    assert len(pool.made) <= 8, "two for each thread, at most: the one that it fills and the one that it lets go"
