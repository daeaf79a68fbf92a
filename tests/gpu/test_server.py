"""The parameter server on a GPU does what it does on the CPU, push by push."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ormo_rpc import train
from ormo_rpc.compression import Encoder, PushFormat
from ormo_rpc.kernels.compiled import fastest_kernel
from ormo_rpc.kernels.host_copies import on_host
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.buffers import ModelBuffers
from ormo_rpc.models.flat import Layout
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event
from ormo_rpc.server.packed_buffers import Reported
from ormo_rpc.server.parameter_server import ParameterServer, Status
from ormo_rpc.server.validation import validate_push
from ormo_rpc.storage.journal import FileJournal, recover
from tests.support.contract import ROWS, same
from tests.support.contract_row import Row

SHAPES = ((8, 8), (5,), ())
DIMENSION = 70
PUSHES = 48
CPU = torch.device("cpu")
MOVED = [("ormo", {}), ("adamw", {}), ("ormo_adamw", {}), ("ringleader", {}), ("easgd", {}), ("halos", {}), ("shifted", {})]
"""Rules of which the state moves from one device to another: vectors, tables by worker, regions, numbers on the CPU."""


def norms() -> ModelBuffers:
    """Return the buffers of some batch norms, one of which averages over all calls, and of one value more."""
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(70), nn.BatchNorm1d(4, momentum=None))
    module.register_buffer("seen", torch.zeros(2))
    return ModelBuffers(module)


class Driven:
    """A server, and the pushes that it is given: the same ones on every device.

    Args:
        device: Of the server.
        name: Of the algorithm.
        options: Of the algorithm.
        dtype: Of the parameters.
        packed: Pushes report all buffers, in their wire form.
        apart: Pushes come from the CPU, every other one where it is even.
    """

    def __init__(
        self,
        device: torch.device,
        name: str,
        options: Mapping[str, Any],
        dtype: torch.dtype = torch.float64,
        *,
        packed: bool = True,
    ) -> None:
        self.device = device
        self.model = norms()
        self.events: list[Event] = []
        start = torch.randn(DIMENSION, generator=torch.Generator().manual_seed(1), dtype=dtype)
        self.server: ParameterServer = build_server(
            algorithm=name,
            params=start.to(device),
            num_workers=3,
            lr=lambda iteration: 0.05 / (1 + iteration // 10),
            total_tickets=PUSHES,
            shapes=SHAPES,
            buffers=RunningBuffers(self.model.tensors, self.model.rules),
            ema=0.9,
            elastic_every=5,
            kernel=fastest_kernel(DIMENSION, device),
            record=self.events.append,
            **options,
        )
        self.packed = packed
        form = PushFormat(params=Layout({"w": torch.zeros(3)}), buffers=self.model.layout, dtype=torch.float32)
        self.encoders = [Encoder(form, device=each) for each in (CPU, device)]
        self.outstanding: list[Reply] = []
        self.number = 0

    def start(self) -> Driven:
        """Start the server."""
        self.outstanding = self.server.start()
        return self

    def run(self, pushes: int) -> Driven:
        """Answer outstanding replies, the newest and older ones, as long as there are some."""
        for _ in range(pushes):
            waiting = [reply for reply in self.outstanding if reply.ticket is not None]
            if not waiting:
                break
            reply = waiting[self.number * 7 % len(waiting)]
            self.outstanding.remove(reply)
            answers = self.server.receive(self.push(reply))
            again = {answer.worker for answer in answers}
            self.outstanding = [each for each in self.outstanding if each.worker not in again] + answers
            assert all(each.params.device == self.device for each in answers)
        return self

    def push(self, reply: Reply, grad: Tensor | None = None) -> Push:
        """Make a push of random numbers; every other one comes from the CPU."""
        assert reply.ticket is not None
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        vectors = self.server.algorithm.VECTORS_PUSHED
        drawn = torch.randn(vectors * DIMENSION, generator=generator, dtype=self.server.params.dtype)
        values = {
            name: torch.tensor(self.number % 3) if name.endswith("tracked") else torch.rand(each.shape, generator=generator)
            for name, each in self.model.tensors.items()
        }
        encoder = self.encoders[self.number % 2]
        if not self.packed and self.number % 4 > 1:
            del values["0.running_var"]
        found = encoder.buffers.write({name: each.to(encoder.device) for name, each in values.items()})
        return Push(
            worker=reply.worker,
            ticket=reply.ticket,
            stamp=reply.stamp,
            grad=(drawn if grad is None else grad).to(encoder.device),
            loss=1.0,
            buffers=found,
            incarnation=reply.incarnation,
        )

    def state(self) -> dict[str, Any]:
        """Return all of the state, on the CPU."""
        return on_host(self.server.state_dict(replies=True))


def numbers(events: list[Event]) -> list[dict[str, Any]]:
    """Return events without times and without what differs by rounding."""
    rounded = ("grad_sum", "elastic", "lr")
    return [{key: value for key, value in event.line().items() if key not in ("seconds", *rounded)} for event in events]


def close(found: Any, expected: Any, what: str) -> None:
    """Compare nested values up to rounding, on the CPU."""
    if isinstance(expected, Tensor):
        if expected.is_floating_point():
            tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{what}: {text}"
            )
        else:
            assert torch.equal(found, expected), what
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), what
        for key in expected:
            close(found[key], expected[key], f"{what}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), what
        for number, each in enumerate(expected):
            close(found[number], each, f"{what}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9), what
    else:
        assert found == expected, what


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_rule_does_what_it_does_on_the_cpu(row: Row, gpu: torch.device) -> None:
    for options in row.variants[:3]:
        here, there = (Driven(device, row.name, options, packed=False).start().run(PUSHES) for device in (gpu, CPU))
        assert numbers(here.events) == numbers(there.events)
        close(here.state(), there.state(), f"{row.name} {options}")


@pytest.mark.parametrize("name", ["asgd", "naive", "shifted", "ormo", "ormo_la", "ormo_da"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rule_whose_step_is_a_kernel_has_the_bits_of_the_cpu(name: str, dtype: torch.dtype, gpu: torch.device) -> None:
    here, there = (Driven(device, name, {}, dtype).start().run(PUSHES) for device in (gpu, CPU))
    assert here.server.algorithm.kernel.name == "triton"
    assert here.server.iteration == PUSHES
    found, expected = here.state(), there.state()
    for key in ("params", "algorithm_state", "buffers", "ema", "members", "assignments"):
        if key == "ema":  # torch's own kernels, whose roundings are others
            close(found[key], expected[key], key)
        else:
            assert same(found[key], expected[key]), key


@pytest.mark.parametrize(("name", "options"), MOVED, ids=lambda each: each if isinstance(each, str) else "")
def test_a_state_moves_between_devices(name: str, options: Mapping[str, Any], gpu: torch.device) -> None:
    for first, second in ((gpu, CPU), (CPU, gpu)):
        began = Driven(first, name, options).start().run(PUSHES // 2)
        file = io.BytesIO()
        torch.save(began.state(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        assert all(each.device == CPU for each in _tensors(saved))
        goes_on = Driven(second, name, options)
        goes_on.server.load_state_dict(saved)
        assert {each.device for each in _tensors(goes_on.server.state_dict(replies=True))} <= {second, CPU}
        assert goes_on.server.params.device == second
        assert same(goes_on.state(), saved)
        goes_on.number = began.number
        replies = [member.reply for member in goes_on.server.members.values() if member.reply is not None]
        order = [reply.worker for reply in began.outstanding]
        goes_on.outstanding = sorted(replies, key=lambda reply: order.index(reply.worker))
        close(goes_on.run(PUSHES).state(), began.run(PUSHES).state(), name)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [each for inner in value.values() for each in _tensors(inner)]
    return [each for inner in value for each in _tensors(inner)] if isinstance(value, (list, tuple)) else []


def test_a_push_waits_for_the_gpu_once_and_its_step_never(gpu: torch.device) -> None:
    driven = Driven(gpu, "ormo", {}, torch.float32).start().run(10)
    driven.number += driven.number % 2  # the next one comes from the GPU
    reply = driven.outstanding.pop()
    push = driven.push(reply)
    assert push.grad.device == gpu
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            validated = driven.server.validate(push)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    texts = [str(each.message) for each in waits]
    assert len([text for text in texts if "synchronizing CUDA operation" in text]) == 1, texts
    assert isinstance(validated.buffers, Reported)
    driven.server.elastic = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        replies = driven.server.commit(push, validated)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [each.worker for each in replies] == [push.worker]


def test_a_gradient_that_is_not_finite_is_rejected(gpu: torch.device) -> None:
    driven = Driven(gpu, "ormo", {}).start().run(5)
    before = driven.server.params.clone()
    reply = driven.outstanding.pop()
    for _ in range(2):  # from the CPU and from the GPU; the repeat finds its ticket answered
        bad = torch.full((DIMENSION,), 1.0, dtype=torch.float64)
        bad[3] = torch.nan
        driven.server.receive(driven.push(reply, bad))
    assert torch.equal(driven.server.params, before)
    assert driven.server.iteration == 5
    assert driven.server.status is Status.running
    assert [event.kind.value for event in driven.events if event.kind.value == "discard"] == ["discard"]


def test_buffers_without_a_rule_are_there_when_a_push_is_checked(gpu: torch.device) -> None:
    size = 20_000_000
    pushed = torch.ones(size).pin_memory()
    push = Push(worker=0, ticket=0, stamp=0, grad=torch.zeros(3).pin_memory(), loss=1.0, buffers={"seen": pushed})
    running = RunningBuffers({"seen": torch.zeros(size)}, device=gpu)
    validated = validate_push(push, torch.zeros(3, device=gpu), running)
    pushed.fill_(7.0)  # its memory is the next push's
    running.update(validated.buffers)
    assert bool((running.current["seen"] == 1).all())


def test_a_journal_is_read_again_on_any_device(gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driven, journal = Driven(gpu, "ormo", {}, torch.float32), FileJournal(tmp_path)
    receive = driven.server.receive

    def noted(push: Push) -> list[Reply]:
        replies = receive(push)
        journal.push(push, rejected=False)
        return replies

    monkeypatch.setattr(driven.server, "receive", noted)
    journal.start(range(3), 0)
    driven.start().run(20)
    journal.close()
    for device in (gpu, CPU):
        again = Driven(device, "ormo", {}, torch.float32)
        assert recover(tmp_path, 0, again.server) == 21
        found, expected = again.state(), driven.state()
        for key in ("params", "algorithm_state", "buffers", "assignments"):
            assert same(found[key], expected[key]), key


def test_a_simulation_with_its_server_on_the_gpu_has_the_bits_of_one_on_the_cpu(gpu: torch.device, tmp_path: Path) -> None:  # noqa: ARG001 - it has to be there
    """With checkpoints, evaluations and the best model; then a replay on the GPU, and resumed runs."""

    def run(device: str, name: str, iterations: int, resume: Path | None = None) -> dict[str, Any]:
        return train(
            {
                "workers": 5,
                "runtime": "sim",
                "logger": "none",
                "model": {"name": "mlp", "hidden": 8},
                "worker": {"device": "cpu"},
                "server": {"device": device},
                "train": {"max_iterations": iterations},
                "checkpoint": {"every": 20, "best": True, **({} if resume is None else {"resume": str(resume)})},
            },
            run_dir=tmp_path / name,
        )

    there, here = (run(device, device, 60) for device in ("cpu", "cuda"))
    assert (there["server_device"], here["server_device"]) == ("cpu", "cuda:0")
    for key in ("final_params_sha256", "final_buffers_sha256", "test_loss", "test_accuracy"):
        assert here[key] == there[key], key
    replayed = train(
        {"runtime": {"name": "replay"}, "replay": {"run": str(tmp_path / "cuda")}, "logger": "none"}, run_dir=tmp_path / "again"
    )
    assert replayed["identical"]
    for device, source in (("cpu", "cuda"), ("cuda", "cpu")):  # a checkpoint of the one is resumed on the other
        resumed = run(device, f"resumed {device}", 60, tmp_path / source / "checkpoints" / "iteration_000000040")
        assert resumed["final_params_sha256"] == there["final_params_sha256"]
