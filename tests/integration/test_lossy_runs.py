"""Runs over a lossy wire: simulated, replayed, interrupted and joined again to the bit; parameters sent rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ormo_rpc import ConfigError, Push, build_server, train
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.algorithms.dc_asgd import DCASGD
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.kernels.compiled import fastest_kernel
from ormo_rpc.kernels.pool import WORTH_POOLING
from ormo_rpc.options import parts
from ormo_rpc.runtimes.job import Job
from ormo_rpc.storage.checkpoint import complete
from ormo_rpc.storage.run_directory import read_trace
from ormo_rpc.worker.worker import Worker
from tests.integration.test_resume import changed, check_resumed

FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {"wire": {"dtype": "bf16"}},
    "fp16": {"wire": {"dtype": "fp16"}},
    "topk": {"compression": {"name": "topk", "ratio": 0.02}},
    "topk without feedback": {"compression": {"name": "topk", "ratio": 0.1, "error_feedback": False}},
    "powersgd": {"compression": {"name": "powersgd", "rank": 1}},
    "powersgd bf16": {"compression": {"name": "powersgd", "rank": 2}, "wire": {"dtype": "bf16"}},
    "params": {"wire": {"params": "bf16"}},
    "both ways": {"compression": {"name": "topk", "ratio": 0.1}, "wire": {"dtype": "fp16", "params": "bf16"}},
}
BASE: dict[str, Any] = {
    "runtime": {"name": "sim"},
    "logger": {"name": "none", "progress": False},
    "model": {"hidden": 8},
    "train": {"max_iterations": 60, "lr": 0.01},
    "heterogeneity": {"name": "gamma"},
    "workers": 4,
}


def replayed(run_dir: Path, source: Path) -> dict[str, Any]:
    return train(["runtime=replay", f"replay.run={source}", "logger=none"], run_dir=run_dir)


@pytest.mark.parametrize("name", FORMATS)
def test_a_simulated_run_is_replayed_to_the_bit(name: str, tmp_path: Path) -> None:
    config = changed(BASE, **FORMATS[name])
    recorded = train(config, run_dir=tmp_path / "run")
    assert (recorded["status"], recorded["iterations"]) == ("completed", 60)
    again = replayed(tmp_path / "again", tmp_path / "run")
    assert again["identical"] is True
    assert again["final_params_sha256"] == recorded["final_params_sha256"]
    exact = train(BASE, run_dir=tmp_path / "exact")
    assert exact["final_params_sha256"] != recorded["final_params_sha256"]
    assert (exact["wire"], recorded["wire"]) == ("exact", parse_config(config).wire_form)


@pytest.mark.parametrize("algorithm", parts("algorithm"))
def test_every_algorithm_runs_over_a_lossy_wire_both_ways(algorithm: str, tmp_path: Path) -> None:
    config = changed(
        BASE,
        algorithm={"name": algorithm},
        train={"max_iterations": 30, "lr": 0.001},
        compression={"name": "powersgd", "rank": 1},
        wire={"dtype": "bf16", "params": "bf16"},
    )
    for name, wire_alone in (("all", config), ("bf16", {**config, "compression": {"name": "none"}})):
        recorded = train(wire_alone, run_dir=tmp_path / name)
        assert (recorded["status"], recorded["iterations"]) == ("completed", 30)
    assert replayed(tmp_path / "again", tmp_path / "all")["identical"] is True


@pytest.mark.parametrize("name", ["topk", "powersgd bf16", "both ways"])
def test_an_interrupted_and_resumed_run_over_a_lossy_wire_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    config = changed(
        BASE,
        runtime={"name": "sim", "joins": {7: 0.9, 1: 1.2}, "leaves": {1: 0.7}},
        checkpoint={"every": 13, "keep": 100},
        **FORMATS[name],
    )
    whole = train(config, run_dir=tmp_path / "whole")
    *sources, _ = complete(tmp_path / "whole")
    assert len(sources) >= 3
    for source in sources:
        check_resumed(tmp_path / "whole", whole, config, source, tmp_path / source.name)
        assert replayed(tmp_path / f"{source.name} again", tmp_path / source.name)["identical"] is True
    another = {**config, "compression": {"name": "none"}, "checkpoint": {"resume": str(sources[0])}}
    with pytest.raises(
        ConfigError, match=r"\Acheckpoint\.resume: compression: got compression=none .*, expected compression=(topk|powersgd) "
    ):
        train(another, run_dir=tmp_path / "another")


def test_a_worker_that_joins_again_begins_with_an_empty_compression_state(tmp_path: Path) -> None:
    # A ticket takes 0.12 s with both ways: the push of the third one would arrive at 0.36 s, when its sender is another one.
    config = changed(
        BASE,
        runtime={"name": "sim", "joins": {1: 0.355}, "leaves": {1: 0.35}, "latency_seconds": [0.01]},
        heterogeneity={"name": "none"},
        **FORMATS["topk"],
    )
    calls: list[tuple[str, int | None]] = []
    forget = Worker.forget

    def noted(self: Worker, worker: int | None = None) -> None:
        calls.append(("kept" if worker in self.state_dict() else "empty", worker))
        forget(self, worker)
        assert worker not in self.state_dict()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "forget", noted)
        recorded = train(config, run_dir=tmp_path / "run")
    assert calls == [("kept", 1), ("empty", 1)]  # leaving, joining
    kinds = [event["event"] for event in read_trace(tmp_path / "run")[1]]
    assert kinds.index("leave") < kinds.index("join")
    assert kinds.count("apply") == 60
    assert "discard" not in kinds  # what it had under way never arrived
    assert "repeat" not in kinds
    assert recorded["status"] == "completed"
    assert replayed(tmp_path / "again", tmp_path / "run")["identical"] is True


def test_pushes_that_the_algorithm_discards_are_encoded_all_the_same(tmp_path: Path) -> None:
    config = changed(
        BASE,
        algorithm={"name": "ringmaster", "delay_threshold": 3},
        heterogeneity={"name": "one_slow"},
        **FORMATS["powersgd"],
    )
    recorded = train(config, run_dir=tmp_path / "run")
    assert recorded["discarded"] > 0
    assert replayed(tmp_path / "again", tmp_path / "run")["identical"] is True


@pytest.mark.parametrize("name", ["fp16", "topk", "powersgd bf16", "both ways"])
def test_a_diverging_run_over_a_lossy_wire_is_replayed(name: str, tmp_path: Path) -> None:
    config = changed(BASE, train={"max_iterations": 60, "lr": 1e30}, **FORMATS[name])
    recorded = train(config, run_dir=tmp_path / "run")
    assert recorded["status"] == "diverged"
    assert replayed(tmp_path / "again", tmp_path / "run")["identical"] is True


@pytest.mark.parametrize("name", ["bf16", "topk", "both ways"])
def test_the_quadratic_travels_over_the_same_wire(name: str, tmp_path: Path) -> None:
    base = changed(BASE, runtime={"name": "sim", "gradient": "quadratic", "dimension": 50}, train={"max_iterations": 300})
    config = changed(base, checkpoint={"every": 70, "keep": 100}, **FORMATS[name])
    whole = train(config, run_dir=tmp_path / "whole")
    assert whole["final_params_sha256"] != train(base, run_dir=tmp_path / "exact")["final_params_sha256"]
    assert replayed(tmp_path / "again", tmp_path / "whole")["identical"] is True
    check_resumed(tmp_path / "whole", whole, config, complete(tmp_path / "whole")[1], tmp_path / "resumed")


def test_a_smaller_push_takes_a_link_less_time(tmp_path: Path) -> None:
    links = {"latency_seconds": [0.25], "bandwidth": [160.0], "compute_seconds": 1.0}
    config = {
        "runtime": {"name": "sim", "gradient": "quadratic", "dimension": 20, **links},
        "logger": BASE["logger"],
        "train": {"max_iterations": 3, "lr": 0.001},
        "workers": 1,
    }
    found = {
        name: train({**config, **more}, run_dir=tmp_path / name)["virtual_seconds"]
        for name, more in {
            "params": {"wire": {"params": "bf16"}},
            "topk": {"compression": {"name": "topk", "ratio": 0.1}, "wire": {"dtype": "bf16"}},
        }.items()
    }
    # 160 bytes a second: 20 values of 4 bytes 0.5 s, of 2 bytes 0.25 s; 2 of 2 bytes with indices of 4: 12 bytes, 0.075 s.
    # Three tickets, each 1 s and two latencies of 0.25 s, and both messages.
    assert found == pytest.approx({"params": 3 * (1.5 + 0.25 + 0.5), "topk": 3 * (1.5 + 0.5 + 0.075)})


# -- one job, both sides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ormo", "orlomo", "heloco", "ringleader", "ringmaster_lmo"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_server_of_a_job_reads_what_its_worker_sends(name: str, algorithm: str) -> None:
    job = Job(parse_config(changed(BASE, algorithm={"name": algorithm}, **FORMATS[name])))
    places: list[Tensor] = []

    def allocate(size: int) -> Tensor:
        places.append(torch.zeros(size, dtype=torch.uint8))
        return places[-1]

    worker, form, server = job.worker(allocate), job.push_format(), job.server(lambda _: None, lambda: 0.0)
    assert [place.numel() for place in places] == [form.size]
    assert worker.wire is places[0]
    replies = {reply.worker: reply for reply in server.start()}
    for number in (0, 1, 0, 2, 0):
        push = worker.compute(replies[number])
        assert worker.payload.data_ptr() == places[0].data_ptr()
        came = worker.payload.view(torch.uint8).clone()
        grad, buffers = form.unpack(came, torch.empty(form.length))
        assert torch.equal(grad, push.grad)
        assert buffers.keys() == push.buffers.keys()
        for reply in server.receive(push):
            replies[reply.worker] = reply


# -- parameters handed out in bf16 -------------------------------------------------------------------------------------


def start(dimension: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(dimension, generator=torch.Generator().manual_seed(8), dtype=dtype)


@pytest.mark.parametrize("algorithm", ["ormo", "pnm"])  # one that replaces its parameters, and one that writes to them
def test_sent_parameters_are_rounded_and_those_of_the_server_are_not(algorithm: str) -> None:
    dimension = WORTH_POOLING // 2 + 3  # long enough for a pool of bf16
    blanks: list[int] = []
    kernel = fastest_kernel(dimension)
    empty = kernel.empty

    def counted(like: Tensor) -> Tensor:
        vector = empty(like)
        if vector.dtype == torch.bfloat16:
            blanks.append(vector.data_ptr())
        return vector

    kernel.empty = counted
    server = build_server(
        algorithm=algorithm, params=start(dimension), num_workers=3, lr=0.1, sent_dtype=torch.bfloat16, kernel=kernel
    )
    replies = server.start()
    assert all(reply.params is replies[0].params for reply in replies)  # one serves all of a stamp
    assert len(blanks) == 1
    assert torch.equal(replies[0].params, start(dimension).bfloat16())
    assert torch.equal(server.state_dict()["params"], start(dimension))
    first = replies[0].params.clone()
    for number in range(9):
        worker, grad = number % 3, start(dimension) * (number + 1)
        (replies[worker],) = server.receive(
            Push(worker=worker, ticket=replies[worker].ticket or 0, stamp=replies[worker].stamp, grad=grad)
        )
        if number == 0:
            assert torch.equal(replies[1].params, first)  # it never changes
        assert replies[worker].params.dtype == torch.bfloat16
        assert torch.equal(replies[worker].params, server.params.bfloat16())
        assert not torch.equal(replies[worker].params.float(), server.params)
        assert torch.equal(server.state_dict()["params"], server.params)
    assert len(set(blanks)) < len(blanks)  # memory that is used again
    final = server.stop()
    assert final == []
    (final,) = server.receive(Push(worker=0, ticket=replies[0].ticket or 0, stamp=replies[0].stamp, grad=start(dimension)))
    assert (final.ticket, final.params.dtype) == (None, torch.bfloat16)


def test_further_vectors_are_rounded_too() -> None:
    server = build_server(algorithm="orlomo", params=start(7), num_workers=1, lr=0.1, sent_dtype=torch.bfloat16)
    (reply,) = server.start()
    (reply,) = server.receive(Push(worker=0, ticket=0, stamp=0, grad=torch.cat([start(7), 2 * start(7)])))
    dtype, shape = reply.params.dtype, reply.params.shape
    assert (dtype, shape) == (torch.bfloat16, (14,))
    assert torch.equal(reply.params[:7], server.params.bfloat16())
    assert reply.params[7:].any()


def test_an_algorithm_gets_the_rounded_parameters_that_its_worker_got(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    step: Callable[..., None] = DCASGD.step

    def noted(self: DCASGD, grad: Tensor, lr: float, context: PushContext) -> None:
        assert context.sent is not None
        seen.append(context.sent.clone())
        step(self, grad, lr, context)

    monkeypatch.setattr(DCASGD, "step", noted)
    server = build_server(algorithm="dc_asgd", params=start(5, torch.float64), num_workers=2, sent_dtype=torch.bfloat16)
    replies = server.start()
    handed_out = [reply.params.clone() for reply in replies]
    for worker in (0, 1):
        server.receive(Push(worker=worker, ticket=worker, stamp=0, grad=start(5, torch.float64)))
    assert [sent.dtype for sent in seen] == [torch.float64] * 2
    assert all(torch.equal(sent, out.double()) for sent, out in zip(seen, handed_out, strict=True))


def test_a_gradient_is_taken_at_the_rounded_parameters() -> None:
    exact, rounded = (Job(parse_config(changed(BASE, wire={"params": name}))) for name in ("float32", "bf16"))
    reply = rounded.server(lambda _: None, lambda: 0.0).start()[0]
    other = exact.server(lambda _: None, lambda: 0.0).start()[0]
    assert reply.params.dtype == torch.bfloat16
    object.__setattr__(other, "params", other.params.bfloat16().float())
    before = reply.params.clone()
    grad = exact.worker().compute(other).grad
    for worker in (rounded.worker(), rounded.worker()):
        assert torch.equal(worker.compute(reply).grad, grad)
    assert torch.equal(reply.params, before)
