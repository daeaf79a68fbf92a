"""Code of the user's: what other processes can import, what is said of the rest, and programs that call `train`."""

from __future__ import annotations

import functools
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn
from torch.utils.data import TensorDataset

from ormo_rpc import ConfigError, train
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.storage.launch import Launch

HERE = __name__
SIMULATED = {"runtime": "sim", "logger": "none", "workers": 2, "train": {"max_iterations": 6}}
NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(64, num_classes)
    def forward(self, x):
        return self.layer(x.flatten(1))
"""
Modules = Callable[..., None]


class Net(nn.Module):
    """A linear model of the digits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


def net(num_classes: int) -> nn.Module:
    return Net(num_classes)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    """Write modules of the user's, given by name with their text, and make them importable for this test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def write(**texts: str) -> None:
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)

    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) is not None and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({**SIMULATED, **values})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- a call of train() that an import would repeat ---------------------------------------------------------------------


@pytest.mark.parametrize(("group", "target"), [("model", "unguarded.Net"), ("algorithm", "outer.Mine")])
def test_a_module_that_trains_when_it_is_imported_is_refused(group: str, target: str, modules: Modules, tmp_path: Path) -> None:
    configuration = {**SIMULATED, group: {"_target_": target}}
    modules(
        unguarded=f"{NET}\nfrom pathlib import Path\nfrom ormo_rpc import train\n"
        f"with Path({str(tmp_path / 'imports')!r}).open('a') as file:\n    print('once', file=file)\n"
        f"train({configuration!r}, run_dir={str(tmp_path / 'inner')!r})\n",
        outer="from unguarded import Net\nfrom ormo_rpc.algorithms.ormo import OrMo\nclass Mine(OrMo): pass\n",
    )
    with pytest.raises(ConfigError) as caught:
        train(configuration, run_dir=tmp_path / "run")
    assert str(caught.value) == (
        f"train() is called while its module is imported for {group}._target_={target!r}, as every process of a run does; "
        "put the call under if __name__ == '__main__':"
    )
    assert (tmp_path / "imports").read_text() == "once\n"
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "inner").exists()
    assert train({**SIMULATED, "model": Net}, run_dir=tmp_path / "after")["status"] == "completed"  # nothing is left behind


# -- what other processes cannot import --------------------------------------------------------------------------------

IN_MAIN = "Net is defined in __main__, where other processes cannot import it; move it to a module"


@pytest.mark.parametrize("script", ["__main__", "__mp_main__"])
@pytest.mark.parametrize("group", ["model", "dataset", "algorithm", "scheduler", "logger"])
def test_a_target_in_the_script_is_refused_at_once(group: str, script: str) -> None:
    expected = (
        f"{group}._target_: {script}.Net is defined in __main__, where other processes cannot import it; move it to a module"
    )
    assert refusal({group: {"_target_": f"{script}.Net"}}) == expected


def test_a_keyword_in_the_script_is_refused_before_anything_starts(tmp_path: Path) -> None:
    keyword = {"_target_": f"{HERE}.net", "num_classes": {"_target_": "__main__.count"}}
    with pytest.raises(ConfigError, match=r"^model\.num_classes\._target_: __main__\.count is defined in __main__, "):
        train({**SIMULATED, "model": keyword}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def in_script() -> type[nn.Module]:
    return type("Net", (nn.Module,), {"__module__": "__main__", "__qualname__": "Net"})


OBJECT = "{group}: got an object of {kind}, expected plain values, or the class or function that makes it, by its name: "


@pytest.mark.parametrize(
    ("group", "value", "expected"),
    [
        ("model", in_script(), f"model: {IN_MAIN}"),
        ("model", in_script()(), OBJECT.format(group="model", kind="Net")),
        ("model", lambda: Net(3), "model: '<lambda>' cannot be imported by other processes; define it at the top of a module"),
        ("model", functools.partial(net, 3), OBJECT.format(group="model", kind="partial")),
        ("model", Net(3), OBJECT.format(group="model", kind="Net")),
        ("dataset", TensorDataset(torch.zeros(3)), OBJECT.format(group="dataset", kind="TensorDataset")),
        ("dataset", (TensorDataset(torch.zeros(3)),) * 2, OBJECT.format(group="dataset", kind="TensorDataset")),
        ("dataset", {"_target_": f"{HERE}.net", "of": Net(3)}, OBJECT.format(group="dataset", kind="Net")),
    ],
    ids=["class", "object", "lambda", "partial", "module", "data set", "pair", "keyword"],
)
def test_an_object_that_other_processes_cannot_make_is_refused(group: str, value: Any, expected: str) -> None:
    assert refusal({group: value}).startswith(expected)


def test_a_name_that_means_another_object_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = net
    monkeypatch.setattr(sys.modules[HERE], "net", Net)
    assert refusal({"model": given}) == (
        f"model: other processes do not find the given net as {HERE}.net; define it at the top of a module"
    )


@pytest.mark.parametrize("given", [Net, net])
def test_a_class_or_function_of_a_module_is_taken_for_its_name(given: Any, tmp_path: Path) -> None:
    assert train({**SIMULATED, "model": given}, run_dir=tmp_path / "run")["status"] == "completed"
    assert f"_target_: {HERE}.{given.__name__}" in (tmp_path / "run" / "config.yaml").read_text()


# -- modules that cannot be imported -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch\n\ndef x(:\n", "broken.py:3: SyntaxError: invalid syntax"),
        ("import torch\n\nimport not_installed\n", "broken.py:3: ModuleNotFoundError: No module named 'not_installed'"),
        ("from torch import nothing\n", "broken.py:1: ImportError: cannot import name 'nothing' from 'torch'"),
        ("import helper\n", "helper.py:2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('usage: ...')\n", "broken.py:2: SystemExit: usage: ..."),
        ("import json\njson.loads('{')\n", "broken.py:2: JSONDecodeError: "),
        ("raise ValueError('two\\nlines')\n", "broken.py:1: ValueError: two lines"),
    ],
)
@pytest.mark.parametrize("group", ["model", "algorithm"])
def test_a_module_that_fails_is_named_with_the_line(
    group: str, text: str, expected: str, modules: Modules, tmp_path: Path
) -> None:
    modules(broken=text, helper="\n1 / 0\n")
    message = refusal({group: {"_target_": "broken.Net"}})
    assert message.startswith(f"{group}._target_: 'broken.Net' cannot be imported: {tmp_path / ''}/{expected}")


def test_a_module_that_is_not_found_may_lack_its_folder() -> None:
    assert refusal({"model": {"_target_": "no_such.Net"}}) == (
        "model._target_: 'no_such.Net' cannot be imported: No module named 'no_such'; is its folder on PYTHONPATH?"
    )


# -- the program that calls train() ------------------------------------------------------------------------------------


def test_train_works_within_an_application_of_hydra_which_it_leaves_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("rate: 0.05\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        for number in range(2):
            rate = hydra.compose("own", [f"rate=0.{number + 1}"]).rate
            options = ["runtime=sim", "logger=none", "train.max_iterations=6", "workers=2", f"train.lr={rate}"]
            train(options, run_dir=tmp_path / str(number))
            with pytest.raises(ConfigError):
                train(["train.lr=much"])
        assert GlobalHydra.instance().hydra is theirs
        assert "lr: 0.2\n" in (tmp_path / "1" / "config.yaml").read_text()


@pytest.mark.slow
def test_simulations_in_threads_at_once_are_those_of_each_alone(tmp_path: Path) -> None:
    def go(seed: int, name: str) -> None:
        options = [*("runtime=sim", "logger=none", "workers=2", "model.dropout=0.5", "train.max_iterations=60"), f"seed={seed}"]
        hashes[name, seed] = train(options, run_dir=tmp_path / f"{name}{seed}")["final_params_sha256"]

    hashes: dict[tuple[str, int], str] = {}
    for seed in range(3):
        go(seed, "alone")
    threads = [threading.Thread(target=go, args=(seed, "together")) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert [hashes["together", seed] for seed in range(3)] == [hashes["alone", seed] for seed in range(3)]
    assert len(set(hashes.values())) == 3


def test_train_leaves_the_calling_program_as_it_was(tmp_path: Path) -> None:
    def state() -> list[Any]:
        root = logging.getLogger()
        return [
            *(torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate(), torch.get_num_threads()),
            *(root.handlers[:], root.level, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
            *(Path.cwd(), dict(os.environ), sys.path[:], sys.argv[:], threading.active_count()),
        ]

    torch.set_num_threads(2)
    try:
        before = state()
        train({**SIMULATED, "runtime": {"name": "sim", "threads": 1}, "model": {"dropout": 0.5}}, run_dir=tmp_path)
        assert state() == before
    finally:
        torch.set_num_threads(1)


def test_a_run_from_python_records_what_it_was_given(tmp_path: Path) -> None:
    train({**SIMULATED, "train": {"max_iterations": 6, "lr": 0.125}, "model": Net}, run_dir=tmp_path / "values")
    train(["runtime=sim", "logger=none", "train.max_iterations=6", "train.lr=0.125"], run_dir=tmp_path / "words")
    common = ["runtime=sim", "logger=none"]
    assert Launch.read(tmp_path / "values").overrides == [*common, "workers=2", "train.max_iterations=6", "train.lr=0.125"]
    assert Launch.read(tmp_path / "words").overrides == [*common, "train.max_iterations=6", "train.lr=0.125"]
    assert Launch.read(tmp_path) == Launch()
