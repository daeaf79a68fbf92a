"""Configuration and command line: what composes, what is refused and in which words, and what the help says."""

from __future__ import annotations

import dataclasses
import math
import re
import string
from collections.abc import Iterator
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ormo_rpc import algorithms, build_server
from ormo_rpc.cli import compose, help_text
from ormo_rpc.config.schema import GROUPS, Config, load_config, parse_config, save_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.options import Section
from ormo_rpc.runtimes import run
from ormo_rpc.runtimes.torchrun import Torchrun
from tests.support.processes import PATIENCE_SECONDS, ROOT, launched

CONF = ROOT / "conf"
CUSTOM = {"_target_": "package.function"}

CHOICES = {**{group: set(choices) for group, choices in GROUPS.items()}, "logger": {"none", "wandb"}}
TEXTS = {"checkpoint.resume", "heterogeneity.run", "logger.group", "logger.run_name", "replay.run", "runtime.interface"} | {
    *("server.address", "server.secret_file")
}
"""Keys of a text or none."""
EXPERIMENTS = {path.stem for path in (CONF / "experiment").glob("*.yaml")}

IN_RANGE: dict[str, tuple[list[Any], list[Any]]] = {
    # The range in words: values that are in it, values that are not; whole numbers also serve fields of fractions.
    "a whole number >= 1": ([1, 10**9], [0, -1]),
    "words KIND@WHO:PUSH[:AMOUNT], kinds kill, stop, delay, drop_reply, corrupt": (
        [[], ["kill@1:20", "delay@0:3:2.5"], ["stop@server:100"]],
        [["kill"], ["kill@1:2", "kill@-1:2"]],
    ),
    "a number >= 1": ([1, 10**9], [0, -1]),
    "at least 1": ([1, 10**9], [0, -1]),
    "a whole number >= 0": ([0, 10**9], [-1]),
    "a whole number from 0 to 100": ([0, 1, 100], [-1, 101]),
    "a number >= 0": ([0, 10**9], [-1]),
    "at least 0": ([0, 10**9], [-1]),
    "a number > 0": ([1e-300, 1e9], [0.0, -1.0, math.nan]),
    "a finite number > 0": ([1e-300, 1e9], [0.0, -1.0, math.inf, math.nan]),
    "a finite number >= 0": ([0.0, 1e9], [-1e-300, math.inf, math.nan]),
    "a finite number >= 1": ([1.0, 1e9], [0.999, -1.0, math.inf, math.nan]),
    "a number in [0, 1)": ([0.0, 0.999], [-1e-300, 1.0, math.nan]),
    "a number in (0, 1]": ([1e-300, 1.0], [0.0, 1.001, math.nan]),
    "finite numbers > 0": ([[], [1e-300], [1e9, 1.0]], [[0.0], [1.0, -1.0], [math.inf], [1.0, math.nan]]),
    "at least one finite number >= 0": ([[0.0], [1e9, 0.0]], [[], [-1e-300], [0.0, math.inf], [0.0, math.nan]]),
    "whole numbers >= 0 with finite times >= 0": (
        [{}, {0: 0.0}, {7: 1e9, 2: 1.0}],
        [{0: -1e-300}, {-1: 1.0}, {0: 0.0, 1: math.inf}, {0: 0.0, 1: math.nan}],
    ),
    "rising epochs > 0": ([[], [0.5, 1.0], [3.0, 3.0]], [[0.0], [2.0, 1.0], [math.nan]]),
    "a dotted path such as my_package.my_module.my_function": (["a.b", "a.b.C"], ["", "a", "a.", "a.b c", "a-b.c"]),
}


def sections() -> Iterator[tuple[str, str, type[Section]]]:
    """Every section of the tree, with its group's choice: (path, choice, section); the root has the path ""."""
    yield "", "", Config
    for field in dataclasses.fields(Config):
        if field.name not in GROUPS and not field.metadata:
            yield field.name, "", type(getattr(Config(), field.name))
    for group, choices in GROUPS.items():
        for name, section in choices.items():
            yield group, name, section


def fields() -> Iterator[tuple[str, str, type[Section], dataclasses.Field[Any]]]:
    """Every key that a user can set."""
    for path, choice, section in sections():
        for field in dataclasses.fields(section):
            if field.metadata and not (choice and field.name == "name"):
                yield path, choice, section, field


FIELDS = list(fields())
WITH_RANGE = [item for item in FIELDS if item[3].metadata["valid"] is not None]


def tree(path: str, choice: str, name: str, value: Any) -> dict[str, Any]:
    """The values that a user gives to set one key."""
    if not path:
        return {name: value}
    chosen = {"name": choice, **(CUSTOM if choice == "custom" else {})} if choice else {}
    return {path: {**chosen, name: value}}


def read(config: Config, path: str, name: str) -> Any:
    return getattr(getattr(config, path) if path else config, name)


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    return str(caught.value)


def name_of(item: tuple[str, str, type[Section], dataclasses.Field[Any]]) -> str:
    path, choice, section, field = item
    assert path == section.PATH
    return section.key(field.name) + (f" of {choice}" if choice else "")


# -- what composes -----------------------------------------------------------------------------------------------------


def test_every_group_has_exactly_the_files_of_what_is_registered() -> None:
    found = {folder.name: {path.stem for path in folder.glob("*.yaml")} for folder in CONF.iterdir() if folder.is_dir()}
    assert found == {**CHOICES, "experiment": EXPERIMENTS}
    assert found["algorithm"] == set(algorithms.NAMES)


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in CHOICES for name in sorted(CHOICES[group])])
def test_every_choice_composes_and_comes_back_equal_from_its_file(group: str, name: str, tmp_path: Path) -> None:
    more = [f"{group}.{key}={value}" for key, value in CUSTOM.items()] if name == "custom" else []
    config = compose([f"{group}={name}", *more])
    if group == "logger":
        assert config.logger.mode.value == {"none": "disabled", "wandb": "offline"}[name]
    else:
        assert getattr(config, group).name == name
    # Nothing else differs from the defaults, and a group's options are the defaults of its own class.
    if group in GROUPS:
        chosen = GROUPS[group][name](**(CUSTOM if name == "custom" else {}))
        assert config == dataclasses.replace(Config(), **{group: chosen})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_what_runs_by_default_is_the_schema() -> None:
    assert compose() == Config()
    # Section 3 of the public surface: ormo, async, digits, rpc.
    config = Config()
    chosen = [config.algorithm.name, config.scheduler.name, config.dataset.name, config.model.name, config.runtime.name]
    assert chosen == ["ormo", "async", "digits", "mlp", "rpc"]


@pytest.mark.parametrize("experiment", sorted(EXPERIMENTS))
def test_every_experiment_composes_and_yields_to_the_command_line(experiment: str, tmp_path: Path) -> None:
    config = compose([f"experiment={experiment}", "train.epochs=7", "algorithm=asgd"])
    values = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml")
    for key, value in values.train.items():
        set_to = getattr(config.train, key)
        assert (set_to.value if isinstance(set_to, Enum) else set_to) == (7 if key == "epochs" else value)
    for override in values.defaults:
        ((group, name),) = override.items()
        assert getattr(config, group.removeprefix("override /")).name == name
    assert config.algorithm.name == "asgd"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, min_size=1), inner, max_size=3),
    max_leaves=5,
).filter(lambda value: "$" not in repr(value) and "???" not in repr(value))  # OmegaConf's own signs


@given(
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    milestones=st.lists(st.floats(1e-3, 1e6), max_size=4).map(sorted),
    seed=st.integers(0, 2**63 - 1),
    kwargs=st.dictionaries(st.text(string.ascii_letters, min_size=1), plain_values, max_size=3),
)
def test_every_value_comes_back_from_the_file(
    lr: float, milestones: list[float], seed: int, kwargs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = {
        "seed": seed,
        "train": {"lr": lr, "lr_milestones": milestones},
        "model": {"name": "custom", **CUSTOM, "kwargs": kwargs},
    }
    config = parse_config(values)
    assert (config.seed, config.train.lr, config.train.lr_milestones) == (seed, lr, milestones)
    assert getattr(config.model, "kwargs") == kwargs  # noqa: B009 - of the custom model alone
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    save_config(config, file)
    assert load_config(file) == config


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", WITH_RANGE, ids=name_of)
def test_a_range_ends_where_its_words_say(item: tuple[str, str, type[Section], dataclasses.Field[Any]]) -> None:
    path, choice, section, field = item
    expected = field.metadata["expected"]
    good, bad = IN_RANGE[expected]
    for value in good:
        assert read(parse_config(tree(path, choice, field.name, value)), path, field.name) == value
    for value in bad:
        message = refusal(tree(path, choice, field.name, value))
        assert message == f"{section.key(field.name)}: got {value!r}, expected {expected}"
    if field.default is None:
        assert read(parse_config(tree(path, choice, field.name, None)), path, field.name) is None


def test_every_number_but_these_has_a_range() -> None:
    kinds = (int, float, type(None))
    numbers = {section.key(field.name) for _, _, section, field in FIELDS if type(field.default) in kinds}
    free = numbers - {section.key(field.name) for _, _, section, field in WITH_RANGE}
    assert free == TEXTS


@pytest.mark.parametrize(("path", "choice", "section"), list(sections()), ids=str)
def test_a_typo_is_named_with_its_full_key(path: str, choice: str, section: type[Section]) -> None:
    message = refusal(tree(path, choice, "lerning_rate", 3))
    owner = section.__name__
    assert message == f"{section.key('lerning_rate')}: Key 'lerning_rate' not in '{owner}'"


TYPED = [item for item in FIELDS if not isinstance(item[3].default, str)]


@pytest.mark.parametrize("item", TYPED, ids=name_of)
def test_a_wrong_type_is_named_with_its_full_key(item: tuple[str, str, type[Section], dataclasses.Field[Any]]) -> None:
    path, choice, section, field = item
    if section.key(field.name) in TEXTS:
        value: Any = [1]  # a number would be taken as a text
        reason = r"Cannot convert 'ListConfig' to string: '\[1\]'"
    else:
        value = "much"
        reason = (
            r"Value 'much' of type 'str' could not be converted to (Integer|Float)|Value 'much' is not a valid bool.*|"
            r"Invalid value 'much', expected one of \[.+\]|Invalid value assigned: \w+ is not a (ListConfig|dict).*|"
            r"Cannot assign str to Dict\[(str, Any|int, float)\]"
        )
    message = refusal(tree(path, choice, field.name, value))
    assert re.fullmatch(rf"{re.escape(section.key(field.name))}: ({reason})", message), message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": {"name": "adam"}}, f"algorithm: got 'adam', expected one of {', '.join(algorithms.NAMES)}"),
        ({"train": 3}, "train: got 3, expected keys with their values"),
        ({"model": "mlp"}, "model: got 'mlp', expected keys with their values"),
        ({"train": {"lr": "${nowhere}"}}, "train.lr: Interpolation key 'nowhere' not found"),
        ({"train": {"lr": 1 + 0j}}, "train.lr: Value 'complex' is not a supported primitive type"),
        ({"runtime": {"name": "mpi"}}, "runtime: got 'mpi', expected one of rpc, sim, replay"),
        ({"train": {"epochs": 1.5}}, "train.epochs: Value '1.5' of type 'float' could not be converted to Integer"),
        ({"train": {"lr": None}}, "train.lr: Incompatible value 'None' for field of type 'float'"),
    ],
    ids=str,
)
def test_other_wrong_trees(values: dict[str, Any], message: str) -> None:
    assert refusal(values) == message


@pytest.mark.parametrize("algorithm", ["asgd_da", "ormo_da"])
@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"rule": "mishchenko", "threshold": 0}, "threshold: got 0"),
        ({"rule": "mishchenko", "smoothness": 2.0}, "smoothness: got 2.0"),
        ({"rule": "koloskova", "threshold": 3, "smoothness": 2.0}, "smoothness: got 2.0"),
        ({"rule": "drop", "smoothness": 2.0}, "smoothness: got 2.0"),
    ],
    ids=str,
)
def test_an_option_that_the_delays_algorithm_would_not_use_is_refused(
    algorithm: str, options: dict[str, Any], refused: str
) -> None:
    expected = f"algorithm.{refused}, expected none, as algorithm.rule={options['rule']} does not use it"
    assert refusal({"algorithm": {"name": algorithm, **options}}) == expected
    with pytest.raises(ValueError, match=re.escape(expected)):
        build_server(algorithm=algorithm, params=torch.zeros(1), num_workers=1, **options)


def test_an_interpolation_that_leads_nowhere_is_refused_after_composing() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["train.lr=${nowhere}"])
    assert str(caught.value) == "train.lr: Interpolation key 'nowhere' not found"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.lerning=3",
            r"Could not override 'train\.lerning'\..*: Key 'lerning' not in 'Train' full_key: train\.lerning .*",
        ),
        ("train.lr=much", r"Error merging override train\.lr=much: Value 'much' .* Float full_key: train\.lr .*"),
        ("algorithm=adam", rf"In 'config': Could not find 'algorithm/adam' .* {' '.join(sorted(algorithms.NAMES))} .*"),
        ("+speed=1", r"speed: Key 'speed' not in 'Config'"),
        ("model=custom", r"model\._target_: got '', expected a dotted path .*"),
    ],
)
def test_a_wrong_override_is_one_line_with_its_full_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


def test_a_missing_file_is_a_wrong_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "none.yaml")
    assert str(caught.value) == f"{tmp_path / 'none.yaml'}: there is no such file, expected the config.yaml of a run"


def test_epochs_become_iterations_and_the_scale_divides_the_rate() -> None:
    values = {"lr": 0.6, "lr_schedule": "step", "lr_milestones": [2, 3.5], "lr_gamma": 0.5, "warmup_epochs": 0.25}
    config = parse_config({"workers": 3, "train": {**values, "lr_scaling": "mean"}})
    rate = config.learning_rate(batches_per_epoch=10, total_tickets=100)
    # 0.6 / 3 workers = 0.2; milestones at 2 * 10 and 3.5 * 10; warm-up of round(0.25 * 10) = 2 iterations: 1/2, then all.
    rates = [rate(t) for t in (0, 1, 19, 20, 34, 35)]
    assert rates == pytest.approx([0.1, 0.2, 0.2, 0.1, 0.1, 0.05])
    unscaled = parse_config({"workers": 3, "train": values}).learning_rate(10, 100)
    assert [unscaled(t) for t in (0, 1, 19, 20, 34, 35)] == pytest.approx([3 * value for value in rates])


# -- under torchrun ----------------------------------------------------------------------------------------------------

ELASTIC = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "1",
    "WORLD_SIZE": "3",
    "LOCAL_WORLD_SIZE": "3",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29400",
}
PLACE = Torchrun(rank=1, world_size=3, store="host:29400", attempt=2, agent_store=True, one_machine=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, PLACE),
        ({"LOCAL_WORLD_SIZE": "2"}, dataclasses.replace(PLACE, one_machine=False)),
        ({"LOCAL_WORLD_SIZE": None}, dataclasses.replace(PLACE, one_machine=False)),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, dataclasses.replace(PLACE, agent_store=False)),
        ({"TORCHELASTIC_USE_AGENT_STORE": None}, dataclasses.replace(PLACE, agent_store=False)),
        ({"TORCHELASTIC_RESTART_COUNT": None}, dataclasses.replace(PLACE, attempt=0)),
        ({"TORCHELASTIC_RUN_ID": None}, None),  # RANK and the like alone may be anybody's
    ],
    ids=str,
)
def test_torchrun_tells_a_process_its_place(
    changes: dict[str, str | None], expected: Torchrun | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_torchrun(monkeypatch, **changes)
    assert Torchrun.from_environment() == expected


def under_torchrun(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name, value in {**ELASTIC, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "ranks", "message"),
    [
        ({"runtime": {"name": "sim"}}, 3, "runtime: got sim under torchrun, expected rpc; start it with python launch.py"),
        ({}, 1, "torchrun: got 1 process, expected at least 2; rank 0 serves and the others work"),
        ({"workers": 4}, 3, "workers: got 4, expected 2 under torchrun with 3 processes; leave it out"),
    ],
    ids=str,
)
def test_what_torchrun_cannot_run_is_refused(
    values: dict[str, Any], ranks: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_torchrun(monkeypatch, RANK="0", WORLD_SIZE=str(ranks))
    with pytest.raises(ConfigError) as caught:
        run(parse_config(values), tmp_path / "run")
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


# -- the help ----------------------------------------------------------------------------------------------------------


def test_the_help_has_every_key_with_its_meaning_and_default() -> None:
    lines = [line.strip() for line in help_text().splitlines()]
    for _, _, section, field in FIELDS:
        made = field.default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING
        default: Any = field.default_factory() if made else field.default  # pyright: ignore[reportCallIssue] # it has one
        shown = "none" if default is None else default.value if isinstance(default, Enum) else default
        pattern = rf"{re.escape(section.key(field.name))} +{re.escape(field.metadata['doc'])} \[{re.escape(str(shown))}\]"
        assert any(re.fullmatch(pattern, line) for line in lines), pattern
    for group, choices in GROUPS.items():
        begin = lines.index(group)
        for name in choices:
            assert any(re.fullmatch(rf"{name} +\S.*", line) for line in lines[begin:]), f"{group}={name}"
    for group, names in {"logger": CHOICES["logger"], "experiment": EXPERIMENTS}.items():
        assert any(line.split() == [group, *", ".join(sorted(names)).split()] for line in lines)
    assert max(map(len, help_text().splitlines())) <= 140


# -- the command -------------------------------------------------------------------------------------------------------

COMMANDS = {
    "typo": ["train.lerning=3"],
    "wrong type": ["train.lr=much"],
    "out of range": ["train.lr=-1"],
    "missing data": ["dataset=mnist", "dataset.root=no_such_folder"],
    "help": ["--help"],
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str, Path]]:
    """Exit status, output, errors and run directory of each command; all run at the same time."""
    with ExitStack() as stack:
        started = {
            name: (stack.enter_context(launched("launch.py", f"hydra.run.dir={folder}", *arguments)), folder)
            for name, arguments in COMMANDS.items()
            for folder in [tmp_path_factory.mktemp("launch") / "run"]
        }
        outputs = {name: process.communicate(timeout=PATIENCE_SECONDS) for name, (process, _) in started.items()}
        return {name: (process.returncode, *outputs[name], folder) for name, (process, folder) in started.items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("typo", r"Could not override 'train\.lerning'.*full_key: train\.lerning\n.*"),
        ("wrong type", r"Error merging override train\.lr=much\n.*full_key: train\.lr\n.*"),
        ("out of range", r"launch\.py: train\.lr: got -1\.0, expected a finite number > 0\n"),
        ("missing data", r"launch\.py: dataset\.root: MNIST is not in \S+no_such_folder/MNIST/raw: \S+ is missing; [^\n]*\n"),
    ],
)
def test_a_wrong_command_starts_nothing(name: str, message: str, ended: dict[str, tuple[int, str, str, Path]]) -> None:
    status, out, err, run_dir = ended[name]
    assert re.fullmatch(message, err, re.DOTALL), err
    assert "Traceback" not in err
    assert (status, out) == (2, "")
    # Hydra's own record at most: config.yaml and logs/ would come before the first process.
    assert {path.name for path in run_dir.glob("*")} <= {".hydra"}


def test_the_command_prints_the_help(ended: dict[str, tuple[int, str, str, Path]]) -> None:
    status, out, err, run_dir = ended["help"]
    assert (status, err) == (0, "")
    assert out.strip() == string.Template(help_text()).substitute().strip()
    assert not run_dir.exists()
