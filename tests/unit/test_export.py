"""Exported models, loaded by plain PyTorch and by safetensors into the plain module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from typing_extensions import override

from ormo_rpc import build_server
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.export import export, main
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.storage import best, checkpoint

CONFIG = parse_config({"workers": 2})


class Tied(nn.Module):
    """Tied weights, a transposed (not contiguous) buffer, an integer, an empty one, and one that no state_dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).T)
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens)))


def checkpointed(run_dir: Path, model: nn.Module, iteration: int = 7, *, average: float | None = None) -> nn.Module:
    """Write a checkpoint of a model, and one of its values plus a number as its average."""
    run_dir.mkdir(exist_ok=True)
    flat = FlatModel(model)
    params, buffers = flat.flat_params(), flat.buffers.copy()
    state = {**build_server(params=params, num_workers=1).state_dict(), "iteration": iteration}
    ema = None if average is None else flat.state_dict(params + average, buffers)
    checkpoint.write(run_dir, state, flat.state_dict(params, buffers), CONFIG, keep=3, ema=ema)
    flat.bind(params)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def fresh(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    made = kind()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    return made


@pytest.mark.parametrize("ending", ["pt", "pth"])
def test_a_state_dict_for_pytorch_is_loaded_by_the_plain_module(ending: str, tmp_path: Path) -> None:
    model = checkpointed(tmp_path / "run", Tied())
    done = export(tmp_path / "run", tmp_path / f"model.{ending}")
    assert (done.iteration, done.averaged, done.tensors) == (7, False, len(model.state_dict()))
    other = fresh(Tied)
    other.load_state_dict(torch.load(tmp_path / f"model.{ending}", weights_only=True))
    assert same(model, other)


def test_safetensors_are_loaded_by_the_plain_module_with_its_tied_weights(tmp_path: Path) -> None:
    model = checkpointed(tmp_path / "run", Tied())
    file = tmp_path / "model.safetensors"
    export(tmp_path / "run", file)
    other = fresh(Tied)
    assert load_model(other, file) == (set(), [])
    assert same(model, other)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "iteration": "7", "head.weight": "embedding.weight"}
    assert "head.weight" not in load_file(file)
    assert load_file(file)["turned"].equal(model.state_dict()["turned"])


def test_a_model_without_ties_is_loaded_by_name(tmp_path: Path) -> None:
    def small() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model = checkpointed(tmp_path / "run", small())
    export(tmp_path / "run", tmp_path / "model.safetensors")
    other = small()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same(model, other)


def test_a_part_of_another_tensor_and_other_dtypes_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    state = {
        "whole": whole,
        "part": whole[2:5],
        "column": whole.view(3, 4)[:, 1],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "flag": torch.tensor([True]),
    }
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    server = {**build_server(params=torch.ones(2), num_workers=1).state_dict(), "iteration": 1}
    checkpoint.write(run_dir, server, state, CONFIG, keep=1)
    export(run_dir, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert sorted(loaded) == sorted(state)
    assert all(torch.equal(loaded[name], value) and loaded[name].dtype is value.dtype for name, value in state.items())


class Extra(nn.Module):
    """Has extra state, which is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"calls": 3}


def test_extra_state_goes_to_pytorch_and_is_refused_for_safetensors(tmp_path: Path) -> None:
    model = checkpointed(tmp_path / "run", Extra())
    with pytest.raises(
        ConfigError, match=r"^--output: _extra_state of the model is a dict, which safetensors cannot hold, .*pt$"
    ):
        export(tmp_path / "run", tmp_path / "model.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run"], "nothing is left"
    export(tmp_path / "run", tmp_path / "model.pt")
    other = Extra()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other.layer.weight, model.get_parameter("layer.weight"))


def value(file: Path) -> float:
    return torch.load(file, weights_only=True)["bias"].item()


def test_the_moving_average_is_exported_where_it_is_evaluated(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    nn.init.constant_(model.bias, 0.5)
    checkpointed(tmp_path / "run", model, average=2.0)
    wanted = {None: 2.5, True: 2.5, False: 0.5}
    for averaged, expected in wanted.items():
        done = export(tmp_path / "run", tmp_path / f"{averaged}.pt", averaged=averaged)
        assert (value(tmp_path / f"{averaged}.pt"), done.averaged) == (expected, averaged is not False)
    checkpointed(tmp_path / "plain", nn.Linear(2, 1))
    with pytest.raises(ConfigError, match=r"^--ema: .* has no moving average of the parameters; a run with evaluate\.ema="):
        export(tmp_path / "plain", tmp_path / "no.pt", averaged=True)


@pytest.mark.parametrize("evaluated", ["parameters", "ema"])
def test_the_best_model_is_exported_from_its_run_or_a_checkpoint(evaluated: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    checkpointed(run_dir, nn.Linear(2, 1))
    with pytest.raises(ConfigError, match=r"^--best: .* has no model of its best evaluation; .*checkpoint\.best=true"):
        export(run_dir, tmp_path / "no.pt", best_model=True)
    record = best.Record(metric="val_loss", value=0.25, iteration=3, evaluated=evaluated, test={"loss": 0.5})
    best.write(run_dir, record, {"bias": torch.tensor(9.0)}, {}, CONFIG, Fingerprint())
    assert best.read(run_dir) == record
    sources = {run_dir: True, run_dir / "checkpoints" / "iteration_000000007": True, run_dir / "checkpoints" / "best": False}
    for number, (source, flag) in enumerate(sources.items()):
        done = export(source, tmp_path / f"{number}.pt", best_model=flag)
        assert (value(tmp_path / f"{number}.pt"), done.iteration, done.averaged) == (9.0, 3, evaluated == "ema")
    wrong = evaluated != "ema"
    message = "^--ema: .* has no moving average" if wrong else "^--parameters: .* has the moving average alone"
    with pytest.raises(ConfigError, match=message):
        export(run_dir, tmp_path / "no.pt", best_model=True, averaged=wrong)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    checkpointed(tmp_path / "run", nn.Linear(2, 1))
    with pytest.raises(ConfigError, match=r"^--output: got .*model\.onnx, expected a file that ends with one of \.pt, \.pth, "):
        export(tmp_path / "run", tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match=r"^.*nowhere: got a path without an intact checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "model.pt")
    for ending in ("pt", "safetensors"):
        with pytest.raises(ConfigError, match=r"^--output: .*/no_such/model\.\w+ cannot be written: "):
            export(tmp_path / "run", tmp_path / "no_such" / f"model.{ending}")
    (tmp_path / "model.pt").write_text("mine")
    with pytest.raises(ConfigError, match=r"^--output: .*model\.pt exists; give another name, or --overwrite$"):
        export(tmp_path / "run", tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_text() == "mine"
    export(tmp_path / "run", tmp_path / "model.pt", overwrite=True)
    assert value(tmp_path / "model.pt") is not None
    (checkpoint.complete(tmp_path / "run")[-1] / "model.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="damaged"):
        export(tmp_path / "run", tmp_path / "damaged.pt")


def test_the_command_says_what_it_has_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpointed(tmp_path / "run", nn.Linear(2, 1), average=1.0)
    main([str(tmp_path / "run"), "--output", str(tmp_path / "model.safetensors")])
    source = tmp_path / "run" / "checkpoints" / "iteration_000000007"
    expected = f"{tmp_path / 'model.safetensors'}: 2 tensors with 3 elements, moving average at iteration 7 of {source}\n"
    assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "run"), "--output", str(tmp_path / "model.safetensors")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("export: --output: ")


@pytest.mark.slow
def test_it_is_a_command_of_the_console_script_too(tmp_path: Path) -> None:
    checkpointed(tmp_path / "run", nn.Linear(2, 1))
    for number, command in enumerate((["ormo_rpc", "export"], ["ormo_rpc.export"])):
        words: list[Any] = [sys.executable, "-m", *command, tmp_path / "run", "--output", tmp_path / f"{number}.safetensors"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "2 tensors with 3 elements, parameters at iteration 7" in done.stdout
    assert json.loads(json.dumps(sorted(load_file(tmp_path / "0.safetensors")))) == ["bias", "weight"]
