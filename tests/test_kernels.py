"""The steps in one pass: the bits of the plain torch operations, in C and in chunks, by one thread and by several; the pool."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ormo_rpc import Push, build_server
from ormo_rpc.kernels import compiled, threads
from ormo_rpc.kernels import steps as torch_steps
from ormo_rpc.kernels.compiled import CompiledSteps, agrees, compiled_steps, fastest_kernel
from ormo_rpc.kernels.pool import WORTH_POOLING, Pool
from ormo_rpc.kernels.steps import CHUNK, Kernel, Steps, TorchSteps
from ormo_rpc.kernels.threads import Threaded

LENGTHS = [1, 17, 1_000, 3 * CHUNK + 5, 13 * CHUNK + 5]  # the last one is so long that C stores past the caches
DTYPES = [torch.float32, torch.float64]


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
    run: Callable[[Tensor, Tensor, Tensor, Tensor], None], plain: Callable[[Tensor, Tensor, Tensor], None], *where: Any
) -> None:
    """Compare a step with plain operations over whole vectors, which work on parameters in place; gradient and w stay."""
    grad, u, w, out = vectors(*where)
    expected_u, expected_w, before = u.clone(), w.clone(), (grad.clone(), w.clone())
    plain(grad, expected_u, expected_w)
    run(grad, u, w, out)
    assert torch.equal(u, expected_u)
    assert torch.equal(out, expected_w)
    assert torch.equal(grad, before[0])
    assert torch.equal(w, before[1])


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("scale", "shifts"), [(1.0, 0), (1.0, 1), (0.3, 0), (0.3, 4)])
def test_an_ordered_step_is_that_of_the_rule_to_the_bit(
    steps: Steps, scale: float, shifts: int, length: int, dtype: torch.dtype, offset: int
) -> None:
    def plain(grad: Tensor, u: Tensor, w: Tensor) -> None:
        """As `ormo_rpc.algorithms.ormo` has it."""
        u.mul_(scale)
        for _ in range(shifts):
            w.sub_(u, alpha=0.9)
            u.mul_(0.9)
        u.add_(grad, alpha=0.9**2 * 0.07)
        w.sub_(grad, alpha=2.71 * 0.07)

    def run(grad: Tensor, u: Tensor, w: Tensor, out: Tensor) -> None:
        steps.ordered(grad, u, w, out, scale=scale, shifts=shifts, beta=0.9, into_u=0.9**2 * 0.07, into_w=2.71 * 0.07)

    check(run, plain, length, dtype, offset)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_heavy_ball_step_is_that_of_the_rule_to_the_bit(steps: Steps, length: int, dtype: torch.dtype, offset: int) -> None:
    def plain(grad: Tensor, u: Tensor, w: Tensor) -> None:
        """As `ormo_rpc.algorithms.naive` has it."""
        u.mul_(0.9).add_(grad, alpha=0.07)
        w.sub_(u)

    check(lambda g, u, w, out: steps.heavy(g, u, w, out, beta=0.9, into_u=0.07), plain, length, dtype, offset)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_plain_step_is_that_of_the_rule_and_of_an_ordered_one_without_momentum(
    steps: Steps, length: int, dtype: torch.dtype, offset: int
) -> None:
    def plain(grad: Tensor, u: Tensor, w: Tensor) -> None:  # noqa: ARG001 - there is no momentum
        """As `ormo_rpc.algorithms.asgd` has it."""
        w.sub_(grad, alpha=0.07)

    check(lambda g, _, w, out: steps.plain(g, w, out, into_w=0.07), plain, length, dtype, offset)

    def ordered(grad: Tensor, u: Tensor, w: Tensor, out: Tensor) -> None:
        # 0^0 = 1: the gradient's own weight in u is eta, and u is forgotten by the next shift.
        steps.ordered(grad, u.zero_(), w, out, scale=1.0, shifts=1, beta=0.0, into_u=0.07, into_w=0.07)
        u.copy_(vectors(length, dtype, offset)[1])

    check(ordered, plain, length, dtype, offset)


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


def test_other_bits_are_noticed() -> None:
    class Wrong(TorchSteps):
        def plain(self, grad: Tensor, w: Tensor, out: Tensor, *, into_w: float) -> None:
            torch.sub(w, grad * into_w, out=out)  # rounds twice

    assert agrees(TorchSteps(), TorchSteps())
    assert not agrees(Wrong(), TorchSteps())


@pytest.mark.parametrize("wrong", ["shape", "dtype"])
def test_c_is_never_called_with_vectors_that_do_not_fit(wrong: str) -> None:
    steps = compiled_steps()
    if steps is None:
        pytest.skip("no C compiler, or not one whose bits are torch's")
    assert isinstance(steps, CompiledSteps)
    grad, w = torch.ones(8), torch.ones(8)
    out = {"shape": torch.ones(7), "dtype": torch.ones(8, dtype=torch.float64)}[wrong]
    with pytest.raises(AssertionError, match=r"^plain: "):
        steps.plain(grad, w, out, into_w=1.0)


def test_vectors_that_c_cannot_read_are_left_to_torch() -> None:
    steps = compiled_steps()
    if steps is None:
        pytest.skip("no C compiler, or not one whose bits are torch's")
    strided = torch.arange(8.0)[::2]
    lazily = torch._neg_view(torch.arange(4.0))  # pyright: ignore[reportPrivateImportUsage,reportPrivateUsage] # how conj() of an imaginary part comes about
    for grad, expected in ((strided, [2.0, 0, -2, -4]), (lazily, [2.0, 3, 4, 5])):
        out, u = torch.full((4,), torch.nan), torch.zeros(4)
        steps.plain(grad, torch.full((4,), 2.0), out, into_w=1.0)
        assert out.tolist() == expected
        steps.heavy(grad, u, torch.full((4,), 2.0), out, beta=0.5, into_u=1.0)
        assert out.tolist() == expected
        assert u.tolist() == grad.tolist()
        steps.ordered(grad, u.zero_(), torch.full((4,), 2.0), out, scale=1.0, shifts=1, beta=0.5, into_u=1.0, into_w=1.0)
        assert out.tolist() == expected
        assert u.tolist() == grad.tolist()


# ------------------------------------------------------------------------------------------------------------------ the server


@pytest.mark.parametrize("algorithm", ["ormo", "ormo_da", "asgd", "naive", "shifted", "fedbuff"])
def test_a_server_has_the_bits_of_torch_and_few_vectors_with_any_kernel(algorithm: str) -> None:
    dimension = WORTH_POOLING // 4 + 3  # long enough for a pool; float32
    pools: list[Pool] = []

    def blank(like: Tensor) -> Tensor:
        if not pools:
            pools.append(Pool(like.numel(), like.dtype))
        return pools[0].take()

    steps = compiled_steps() or TorchSteps()
    kernels = [Kernel(), fastest_kernel(dimension), Kernel(name="mine", steps=steps, blank=blank)]
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
            if server.rule.OUT_OF_PLACE:
                assert replies[worker].params.data_ptr() == server.params.data_ptr(), "the parameters are the snapshot"
        if number == 6:
            assert all(torch.equal(params, copy) for params, copy in before)
            before.clear()
    gc.collect()
    # The replies of 3 workers, the step's own new vector, and two more while a state is loaded and held by this test.
    assert len(pools[0].made) <= 6
    assert pools[0].lent <= 4


# ------------------------------------------------------------------------------------------------------------------- the pool


@pytest.mark.parametrize("dimension", [3, 1_000_000])
def test_memory_is_lent_again_when_nobody_sees_it_and_not_before(dimension: int) -> None:
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


def test_memory_comes_back_from_other_threads_and_none_is_lent_twice() -> None:
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
