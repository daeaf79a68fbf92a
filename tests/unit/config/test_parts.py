"""Parts of a user's own, by ``_target_``, and parts as objects: the resulting configuration, its saved form, and refusals."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from ormo_rpc import Algorithm, PushContext, train
from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import load_config, parse_config, parse_text, save_config
from ormo_rpc.config.saving import to_tree
from ormo_rpc.data import CustomData
from ormo_rpc.errors import ConfigError
from ormo_rpc.models import MLP, CustomModel
from ormo_rpc.options import option, positive
from ormo_rpc.options.instantiate import instantiate
from ormo_rpc.worker.heterogeneity import Heterogeneity, OneSlow

HERE = __name__
SLEEPY = f"{HERE}.Sleepy"


class Mood(Enum):
    """An option's choices."""

    good = "good"
    bad = "bad"


@dataclass(frozen=True, kw_only=True)
class Sleepy(Heterogeneity):
    """A user's own heterogeneity, outside of the package."""

    naps: float = option(2.0, "how long", valid=positive, expected="a finite number > 0")
    mood: Mood = Mood.good
    folder: Path | None = None

    @override
    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:
        return 1 + self.naps


@dataclass(frozen=True, kw_only=True)
class Greedy(Sleepy):
    """A user's own heterogeneity with an option that has no default."""

    needed: int


@dataclass(frozen=True, kw_only=True)
class Factored(Heterogeneity):
    """A user's own law with an option of a part of the package, with another default."""

    factor: float = option(2.0, "how many times slower")

    @override
    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:
        return self.factor


class Undecorated(Sleepy):
    """A user's own law that has forgotten the decorator."""

    slumber: float = option(2.0, "how long")


class Redeclared(Sleepy):
    """A user's own law whose other default does not count, without the decorator."""

    naps: float = 5.0


class Positional(Sleepy):
    """A user's own law that cannot be made of its options."""

    def __init__(self, naps: int) -> None: ...


@dataclass(kw_only=True)
class Damped(Algorithm):
    """A user's own algorithm, outside of the package."""

    factor: float = option(0.5, "part of each gradient that counts")

    @override
    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:
        self.params.sub_(grad, alpha=self.factor * lr)


def network(
    input_shape: tuple[int, ...], num_classes: int, *, hidden: int = 3, activation: nn.Module | None = None
) -> nn.Module:
    return nn.Sequential(nn.Linear(input_shape[0], hidden), activation or nn.ReLU(), nn.Linear(hidden, num_classes))


def saved_and_loaded(config: Any, folder: Path) -> Any:
    save_config(config, folder / "config.yaml")
    return load_config(folder / "config.yaml")


# -- classes ------------------------------------------------------------------------------------------------------------


def test_a_class_from_outside_is_chosen_by_its_path_alone_and_its_options_stand_beside_it(tmp_path: Path) -> None:
    config = compose([f"heterogeneity._target_={SLEEPY}", "+heterogeneity.naps=3", "+heterogeneity.mood=bad"])
    assert config.heterogeneity == Sleepy(naps=3.0, mood=Mood.bad)
    assert to_tree(config)["heterogeneity"] == {"_target_": SLEEPY, "naps": 3.0, "mood": "bad", "folder": None}
    assert saved_and_loaded(config, tmp_path) == config
    assert config.heterogeneity.name == "Sleepy"


def test_beside_a_target_the_options_of_the_named_part_count_only_where_they_were_changed() -> None:
    chosen = ["heterogeneity=one_slow", f"heterogeneity._target_={SLEEPY}"]
    assert compose(chosen).heterogeneity == Sleepy()
    with pytest.raises(ConfigError) as caught:
        compose([*chosen, "heterogeneity.factor=3"])
    assert str(caught.value) == "heterogeneity.factor: got an unknown key, expected one of naps, mood, folder (of Sleepy)"


@pytest.mark.slow
@pytest.mark.parametrize("override", ["heterogeneity.factor=10", "++heterogeneity.factor=1e1", "heterogeneity={factor: 10}"])
def test_beside_a_target_a_typed_option_counts_although_the_named_part_has_that_default(override: str) -> None:
    chosen = ["heterogeneity=one_slow", f"heterogeneity._target_={HERE}.Factored"]
    assert OneSlow().factor == 10
    assert compose([*chosen, override]).heterogeneity == Factored(factor=10.0)
    assert compose(chosen).heterogeneity == Factored(factor=2.0)


def test_beside_a_callable_a_typed_keyword_counts_although_the_named_part_has_that_default() -> None:
    assert compose([f"model._target_={HERE}.network", "model.hidden=128"]).model == CustomModel(
        _target_=f"{HERE}.network", kwargs={"hidden": 128}
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"_target_": f"{HERE}.Undecorated"},
            f"heterogeneity.slumber: {HERE}.Undecorated declares it but is no dataclass; write @dataclass(kw_only=True) above "
            "the class",
        ),
        (
            {"_target_": f"{HERE}.Redeclared", "naps": 3},
            f"heterogeneity.naps: {HERE}.Redeclared declares it but is no dataclass; write @dataclass(kw_only=True) above the "
            "class",
        ),
        (
            {"_target_": f"{HERE}.Positional"},
            f"heterogeneity._target_: '{HERE}.Positional' cannot be made: Positional.__init__() missing 1 required positional "
            "argument: 'naps'",
        ),
        ({"_target_": SLEEPY, "nap": 1}, "heterogeneity.nap: got an unknown key; did you mean heterogeneity.naps?"),
        ({"_target_": SLEEPY, "naps": 0}, "heterogeneity.naps: got 0.0, expected a finite number > 0"),
        ({"_target_": SLEEPY, "mood": "grim"}, "heterogeneity.mood: got 'grim', expected one of good, bad"),
        ({"_target_": f"{HERE}.Greedy"}, "heterogeneity.needed: got nothing, expected a whole number"),
        (
            {"_target_": "torch.nn.Linear"},
            "heterogeneity._target_: 'torch.nn.Linear' is <class 'torch.nn.modules.linear.Linear'>, expected a subclass of "
            "ormo_rpc.worker.heterogeneity.Heterogeneity",
        ),
        (
            {"_target_": "ormo_rpc.worker.heterogeneity.Heterogeneity"},
            "heterogeneity._target_: 'ormo_rpc.worker.heterogeneity.Heterogeneity' is abstract, expected a class that has "
            "slowdown",
        ),
        (
            {"_target_": f"{HERE}.Sleeepy"},
            f"heterogeneity._target_: '{HERE}.Sleeepy' cannot be imported: module '{HERE}' has no attribute 'Sleeepy'",
        ),
        (
            {"_target_": "Sleepy"},
            "heterogeneity._target_: got 'Sleepy', expected a dotted path such as my_package.my_module.my_function",
        ),
        ({"_target_": 3}, "heterogeneity._target_: got 3, expected a dotted path such as my_package.my_module.my_function"),
    ],
    ids=str,
)
def test_a_target_that_does_not_fit_is_refused_in_one_line(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"heterogeneity": value})
    assert str(caught.value) == message


def test_an_algorithm_from_outside_trains(tmp_path: Path) -> None:
    # Half of the gradient at twice the learning rate is plain asynchronous SGD.
    run = {"workers": 2, "runtime": "sim", "logger": "none", "train": {"max_iterations": 20, "lr": 0.25}}
    custom = train({**run, "algorithm": Damped(factor=0.5)}, run_dir=tmp_path / "ours")
    builtin = train({**run, "algorithm": "asgd", "train": {"max_iterations": 20, "lr": 0.125}}, run_dir=tmp_path / "theirs")
    assert custom["algorithm"] == "Damped"
    assert custom["final_params_sha256"] == builtin["final_params_sha256"]
    assert load_config(tmp_path / "ours" / "config.yaml").algorithm == Damped(factor=0.5)


# -- objects ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("one_slow", OneSlow()),
        (OneSlow, OneSlow()),
        (OneSlow(factor=3.0), OneSlow(factor=3.0)),
        ({"name": "one_slow", "factor": 3}, OneSlow(factor=3.0)),
        (Sleepy, Sleepy()),
        (Sleepy(naps=1.0, folder=Path("a/b")), Sleepy(naps=1.0, folder=Path("a/b"))),
        ({"_target_": Sleepy, "naps": 1, "folder": "a/b"}, Sleepy(naps=1.0, folder=Path("a/b"))),
    ],
    ids=repr,
)
def test_names_classes_objects_and_keys_may_stand_for_a_part(value: Any, expected: Heterogeneity, tmp_path: Path) -> None:
    config = parse_config({"heterogeneity": value})
    assert config.heterogeneity == expected
    assert type(config.heterogeneity) is type(expected)
    assert saved_and_loaded(config, tmp_path) == config


def test_a_registered_class_is_saved_by_its_name() -> None:
    assert to_tree(parse_config({"model": MLP(hidden=3)}))["model"] == {"name": "mlp", "hidden": 3, "depth": 1, "dropout": 0.0}


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        ("__main__", "Mine", "Mine is defined in __main__, where other processes cannot import it; move it to a module"),
        (HERE, "f.<locals>.Mine", "'f.<locals>.Mine' cannot be imported by other processes; define it at the top of a module"),
    ],
)
def test_a_class_that_other_processes_cannot_import_is_refused(module: str, name: str, reason: str) -> None:
    unimportable = type("Mine", (Sleepy,), {"__module__": module, "__qualname__": name})
    for value in (unimportable(), unimportable):
        with pytest.raises(ConfigError) as caught:
            parse_config({"heterogeneity": value})
        assert str(caught.value) == f"heterogeneity: {reason}"


def test_a_part_of_another_group_and_an_option_that_cannot_be_saved_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model: got OneSlow\(.*\), expected keys with their values, or one of cnn, .*$"):
        parse_config({"model": OneSlow()})
    with pytest.raises(ConfigError, match=r"^model\.act: got ReLU\(\), expected a plain value, one that config.yaml can hold$"):
        parse_config({"model": CustomModel(_target_=f"{HERE}.network", kwargs={"act": nn.ReLU()})})


# -- callables ----------------------------------------------------------------------------------------------------------


def test_a_model_may_be_any_callable_with_its_keywords_beside_it(tmp_path: Path) -> None:
    config = compose([f"model._target_={HERE}.network", "+model.activation={_target_: torch.nn.Tanh}", "model.hidden=5"])
    assert config.model == CustomModel(
        _target_=f"{HERE}.network", kwargs={"hidden": 5, "activation": {"_target_": "torch.nn.Tanh"}}
    )
    made = config.model.build((4,), 2)
    assert [type(layer) for layer in made.children()] == [nn.Linear, nn.Tanh, nn.Linear]
    assert saved_and_loaded(config, tmp_path) == config
    assert parse_config({"model": {"_target_": network, "hidden": 5}}).model == CustomModel(
        _target_=f"{HERE}.network", kwargs={"hidden": 5}
    )


def test_the_keywords_of_a_recorded_run_are_read_from_where_they_stood() -> None:
    recorded = f"""
        dataset: {{name: custom, root: data, download: false, verify: true, _target_: {HERE}.network, kwargs: {{count: 3}}}}
        model: {{name: custom, _target_: {HERE}.network, kwargs: {{hidden: 7}}}}
    """
    config = parse_text(recorded)
    assert config.model == CustomModel(_target_=f"{HERE}.network", kwargs={"hidden": 7})
    assert config.dataset == CustomData(_target_=f"{HERE}.network", kwargs={"count": 3})


def test_keywords_in_their_former_place_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.kwargs: keywords stand beside _target_; use \+model\.hidden=7$"):
        parse_config({"model": {"_target_": f"{HERE}.network", "kwargs": {"hidden": 7}}})


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "builtins.dict", "a": 1, "b": [1, {"c": 2}]},
        {
            "_target_": "builtins.dict",
            "inner": {"_target_": "builtins.dict", "x": {"_target_": "fractions.Fraction", "numerator": 3}},
        },
        {"_target_": "builtins.dict", "items": [{"_target_": "fractions.Fraction", "numerator": 3}]},
        {"_target_": "fractions.Fraction.from_float", "f": 0.5},
    ],
    ids=str,
)
def test_a_target_means_what_it_means_to_hydra(node: dict[str, Any]) -> None:
    keywords = {key: value for key, value in node.items() if key != "_target_"}
    assert instantiate("model", node["_target_"], keywords) == hydra.utils.instantiate(node)


def test_options_beside_a_target_are_saved_where_they_are_not_the_defaults() -> None:
    target = {"_target_": "torch.utils.data.TensorDataset"}
    assert to_tree(parse_config({"dataset": target}))["dataset"] == target
    given = {**target, "collate": "pad", "pad_values": {"input": 1.0}}
    assert to_tree(parse_config({"dataset": given}))["dataset"] == given
