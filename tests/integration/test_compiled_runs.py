"""Runs whose passes are compiled: the bits of eager ones where a backend leaves operations as they are; few compilations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from ormo_rpc import train
from ormo_rpc.errors import ConfigError
from ormo_rpc.messages import no_buffers
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.models.passes import Passes
from ormo_rpc.worker.forward import compile_forward, compiled
from tests.support.precision import Normed

MODELS = "tests.support.precision"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Forget what other tests have compiled."""
    dynamo.reset()
    yield
    dynamo.reset()


def counting(name: str) -> CompileCounterWithBackend:
    """A backend that counts its graphs, and leaves them as they are."""
    counter = CompileCounterWithBackend("eager")
    dynamo.register_backend(counter, name=name)
    return counter


def options(model: str = "Normed", **more: Any) -> dict[str, Any]:
    training = {"epochs": 2, "batch_size": 100, "lr": 0.05, "max_iterations": 40, **more.pop("train", {})}
    chosen = {"_target_": f"{MODELS}.{model}"}
    return {"workers": 2, "runtime": "sim", "logger": "none", "model": chosen, "train": training, **more}


@pytest.mark.slow
def test_a_compiled_run_has_the_bits_of_an_eager_one_and_compiles_once_for_each_kind_of_batch(tmp_path: Path) -> None:
    counter = counting("counting_run")
    plain = train(options(), run_dir=tmp_path / "plain")
    found = train(options(worker={"compile": "counting_run"}), run_dir=tmp_path / "compiled")
    for entry in ("final_params_sha256", "final_buffers_sha256", "test_loss", "train_loss"):
        assert found[entry] == plain[entry]
    # 1,437 samples: 14 batches of 100 and one of 37 an epoch. In the trial one graph, in the worker one and one of any size.
    assert counter.frame_count == 3
    again = train(["runtime=replay", f"replay.run={tmp_path / 'compiled'}", "logger=none"], run_dir=tmp_path / "again")
    assert again["identical"] is True


@pytest.mark.slow
def test_autocast_is_compiled_as_well(tmp_path: Path) -> None:
    plain = train(options("Shared", worker={"autocast": "bf16"}), run_dir=tmp_path / "plain")
    found = train(options("Shared", worker={"autocast": "bf16", "compile": "eager"}), run_dir=tmp_path / "compiled")
    assert found["final_params_sha256"] == plain["final_params_sha256"]


@pytest.mark.slow
def test_inductor_is_within_rounding_of_eager_with_the_same_draws() -> None:
    module, twin = Normed(), Normed()
    twin.load_state_dict(module.state_dict())
    compile_forward(module, "inductor")
    inputs = torch.rand(8, 1, 8, 8)
    found: list[torch.Tensor] = []
    for each in (module, twin):
        torch.manual_seed(0)
        outputs = each(inputs)
        outputs.square().sum().backward()
        found += [outputs, *(parameter.grad for parameter in each.parameters() if parameter.grad is not None), each.average]
    half = len(found) // 2
    for ours, expected in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_parameters_in_other_memory_need_no_new_code() -> None:
    counter = counting("counting_memory")
    model = FlatModel(Normed())
    passes = Passes(model)
    with compiled(model.module, "counting_memory"):
        for ticket in range(4):
            passes.begin(no_buffers())
            model.bind(torch.full((model.params.size,), 0.1 * ticket))
            passes.begin_pass()
            model.module(torch.rand(8, 1, 8, 8)).sum().backward()
            passes.end_pass()
            passes.collect()
    assert counter.frame_count == 1
    model.module(torch.rand(3, 1, 8, 8))  # it is not compiled any more
    assert counter.frame_count == 1


@pytest.mark.slow
def test_each_of_many_models_of_a_process_is_compiled_for_itself() -> None:
    counter = counting("counting_models")
    models = [FlatModel(Normed()) for _ in range(10)]  # torch keeps 8 of a class, unless they are isolated
    for model in models:
        compile_forward(model.module, "counting_models")
    for _ in range(2):
        for model in models:
            model.module(torch.rand(4, 1, 8, 8))
    assert counter.frame_count == 10


def test_an_unknown_backend_is_refused_before_anything_starts(tmp_path: Path) -> None:
    message = (
        r"^worker\.compile: got indoctor, expected a backend of torch\.compile, such as .*: InvalidBackend: .*'indoctor'.*$"
    )
    with pytest.raises(ConfigError, match=message):
        train(options(worker={"compile": "indoctor"}), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_fails_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    def failing(*_: object) -> Any:
        raise RuntimeError("No working C++ compiler found\nin any of the usual places")

    dynamo.register_backend(failing, name="failing")
    message = (
        r"^model: .*Normed on training batch 0 of digits: worker\.compile=failing cannot compile the pass: RuntimeError: No "
        r"working C\+\+ compiler found in any of the usual places; with null it runs as it is \(inputs .*\)$"
    )
    with pytest.raises(ConfigError, match=message):
        train(options(worker={"compile": "failing"}), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
