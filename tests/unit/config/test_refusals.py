"""Refused configurations: one line with the full key, the given value, and the expected one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_rpc import build_server
from ormo_rpc.algorithms.asgd import ASGD
from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import load_config, parse_config
from ormo_rpc.config.renamed import RENAMED_KEYS, RENAMED_VALUES
from ormo_rpc.config.schema import Config
from ormo_rpc.config.write_conf import sections
from ormo_rpc.errors import ConfigError
from ormo_rpc.loggers.wandb import ENVIRONMENT, ID, PROJECT, TAGS
from ormo_rpc.options import CallsTarget, Section, parts, register
from tests.support.keys import KEYS, Key, default_of, label, tree
from tests.support.registry import temporary_parts

TEXTS = {
    "checkpoint.resume",
    "heterogeneity.run",
    "optimized_metric",
    "replay.run",
    "runtime.interface",
    "server.address",
    "server.secret_file",
    "worker.compile",
} | {f"logger.{name}" for name in ENVIRONMENT if name != "tags"}
"""Keys of a text or none."""

IN_RANGE: dict[str, tuple[list[Any], list[Any]]] = {
    # The range in words: values that are in it, values that are not; whole numbers also serve fields of fractions.
    "a whole number >= 1": ([1, 10**9], [0, -1]),
    "words KIND@WORKER:PUSH[:AMOUNT], kinds kill, stop, delay, drop_reply, corrupt": (
        [[], ["kill@1:20", "delay@0:3:2.5"], ["stop@server:100"], ["kill@1:join"]],
        [["kill"], ["kill@1:2", "kill@-1:2"], ["delay@1:join"]],
    ),
    PROJECT: (["a", "p" * 128, "my project"], ["", "p" * 129, *(f"a{sign}" for sign in "/\\#?%:")]),
    ID: (["a", "i" * 128], ["", "i" * 129, *(f"a{sign}" for sign in ":;,#?/'")]),
    TAGS: ([[], ["a", "t" * 64]], [[""], ["a", "t" * 65]]),
    "a whole number >= 1, or null": ([1, 10**9], [0, -1]),
    "a whole number >= 0": ([0, 10**9], [-1]),
    "a whole number >= 0, and >= 1 for rule=ormo": ([1, 10**9], [-1]),
    "a whole number from 0 to 100": ([0, 1, 100], [-1, 101]),
    "a number > 0": ([1e-300, 1e9], [0.0, -1.0, math.nan]),
    "a number > 0, at most 1e+06": ([1e-300, 1e6], [0.0, -1.0, 1.1e6, math.inf, math.nan]),
    "a finite number > 0": ([1e-300, 1e9], [0.0, -1.0, math.inf, math.nan]),
    "a finite number >= 0": ([0.0, 1e9], [-1e-300, math.inf, math.nan]),
    "a finite number >= 2^-10": ([2**-10, 65536.0], [2**-11, 0.0, math.inf, math.nan]),
    "a finite number >= 1": ([1.0, 1e9], [0.999, -1.0, math.inf, math.nan]),
    "a finite number > 1, or null": ([1.000001, 1e9, None], [1.0, 0.5, -2.0, math.inf, math.nan]),
    "a number in [0, 1]": ([0.0, 0.5, 1.0], [-1e-300, 1.001, math.nan]),
    "a number in [-1, 1]": ([-1.0, 0.0, 1.0], [-1.001, 1.001, math.nan]),
    "a number in [0, 1)": ([0.0, 0.999], [-1e-300, 1.0, math.nan]),
    "a fraction in [0, 1) or a whole number of samples": (
        [0.0, 1e-300, 0.999, 1.0, 360],
        [-1e-300, -1.0, 1.5, math.inf, math.nan],
    ),
    "a whole number of 32 bits": ([-100, 0, 255], [2**31, -(2**31) - 1]),
    "a number in (0, 1), or null": ([1e-300, 0.999], [0.0, 1.0, math.nan]),
    "a number in (0, 1]": ([1e-300, 1.0], [0.0, 1.001, math.nan]),
    "finite numbers > 0": ([[], [1e-300], [1e9, 1.0]], [[0.0], [1.0, -1.0], [math.inf], [1.0, math.nan]]),
    "at least one finite number >= 0": ([[0.0], [1e9, 0.0]], [[], [-1e-300], [0.0, math.inf], [0.0, math.nan]]),
    "whole numbers >= 0 with finite times >= 0": (
        [{}, {0: 0.0}, {7: 1e9, 2: 1.0}],
        [{0: -1e-300}, {-1: 1.0}, {0: 0.0, 1: math.inf}, {0: 0.0, 1: math.nan}],
    ),
    "finite factors >= 0": (
        [{}, {"*.bias": 0.0}, {"a": 1e9, "b": 1.0}],
        [{"*": -1.0}, {"a": 1.0, "b": math.inf}, {"a": math.nan}],
    ),
    "finite numbers, each once": ([[], [-1.0, 0.0], [0.5]], [[0.5, 0.5], [math.inf], [0.5, math.nan]]),
    "auto, cpu, cuda or cuda:N": (["auto", "cpu", "cuda", "cuda:0"], ["gpu", "cuda:", "cuda:-1", "cpu:0"]),
    "cpu, cuda or cuda:N": (["cpu", "cuda", "cuda:0", "cuda:12"], ["auto", "gpu", "cuda:", "cuda:-1", "cpu:0"]),
    "rising epochs > 0": ([[], [0.5, 1.0], [3.0, 3.0]], [[0.0], [2.0, 1.0], [math.nan]]),
}
WITH_RANGE = [
    key
    for key in KEYS
    if key[3].metadata["valid"] is not None and label(key) != "runtime.min_workers of ddp"  # which takes its default alone
]
TYPED = [key for key in KEYS if not isinstance(key[3].default, str)]


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    return str(caught.value)


@pytest.mark.parametrize("key", WITH_RANGE, ids=label)
def test_a_range_ends_where_its_words_say(key: Key) -> None:
    path, part, section, field = key
    expected = field.metadata["expected"]
    good, bad = IN_RANGE[expected]

    def read(value: Any) -> Any:
        config = parse_config(tree(path, part, field.name, value))
        return getattr(getattr(config, path) if path else config, field.name)

    for value in good:
        assert read(value) == value
    for value in bad:
        message = refusal(tree(path, part, field.name, value))
        assert message == f"{section.key(field.name)}: got {value!r}, expected {expected}"
    if field.default is None:
        assert read(None) is None


def test_every_number_has_a_range() -> None:
    numbers = {
        section.key(field.name)
        for _, _, section, field in KEYS
        if type(field.default) in (int, float, type(None)) and field.type != "bool | None"
    }
    with_range = {section.key(field.name) for _, _, section, field in WITH_RANGE}
    assert numbers - with_range == TEXTS - with_range


@pytest.mark.parametrize("key", TYPED, ids=label)
def test_a_wrong_type_is_named_with_its_full_key(key: Key) -> None:
    path, part, section, field = key
    value: Any = [1] if section.key(field.name) in TEXTS else "much"
    message = refusal(tree(path, part, field.name, value))
    assert message.startswith(f"{section.key(field.name)}: got {value!r}, expected ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("path", "part", "section"), [each for each in sections() if not issubclass(each[2], CallsTarget)], ids=str
)
def test_an_unknown_key_is_named_in_full_beside_those_that_there_are(path: str, part: str, section: type[Section]) -> None:
    message = refusal(tree(path, part, "xyzzy", 3))
    assert message.startswith(f"{section.key('xyzzy')}: got an unknown key, ")
    for _, _, owner, field in KEYS:
        assert owner is not section or field.name in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": {"name": "adam"}}, f"algorithm: got 'adam', expected one of {', '.join(parts('algorithm'))}"),
        ({"algorithm": "adam"}, f"algorithm: got 'adam', expected one of {', '.join(parts('algorithm'))}"),
        ({"runtime": {"name": "mpi"}}, "runtime: got 'mpi', expected one of " + ", ".join(parts("runtime"))),
        ({"model": 3}, f"model: got 3, expected keys with their values, or one of {', '.join(parts('model'))}"),
        ({"model": {"name": 3}}, f"model: got 3, expected one of {', '.join(parts('model'))}"),
        (
            {"train.epochs": 1},
            "train.epochs: got a key with a dot; nest it, {'train': {'epochs': 1}}, or pass a list of overrides, "
            "['train.epochs=1']",
        ),
        ({"train": 3}, "train: got 3, expected keys with their values"),
        ({"train": {"momentun": 0.5}}, "train.momentun: got an unknown key; did you mean train.momentum?"),
        ({"model": {"hiden": 5}}, "model.hiden: got an unknown key; did you mean model.hidden?"),
        ({"scheduler": {"name": "ssp", "k": 5}}, "scheduler.k: got an unknown key, expected one of s (of ssp)"),
        ({"heterogeneity": {"factor": 5}}, "heterogeneity.factor: got an unknown key, none has no options"),
        ({"seeed": 1}, "seeed: got an unknown key; did you mean seed?"),
        (
            {"train": {"lr_schedule": "fast"}},
            "train.lr_schedule: got 'fast', expected one of constant, step, cosine or keys with a _target_ among them",
        ),
        (
            {"train": {"lr_schedule": {"size": 3}}},
            "train.lr_schedule: got {'size': 3}, expected one of constant, step, cosine or keys with a _target_ among them",
        ),
        ({"train": {"lr": "${nowhere}"}}, "train.lr: Interpolation key 'nowhere' not found"),
        ({"train": {"lr": 1 + 0j}}, "train.lr: Value 'complex' is not a supported primitive type"),
        ({"train": {"epochs": 1.5}}, "train.epochs: got 1.5, expected a whole number >= 1"),
        ({"train": {"epochs": True}}, "train.epochs: got True, expected a whole number >= 1"),
        ({"train": {"lr": None}}, "train.lr: got None, expected a finite number > 0"),
        ({"worker": {"dummy": "perhaps"}}, "worker.dummy: got 'perhaps', expected true or false"),
    ],
    ids=str,
)
def test_other_wrong_trees(values: dict[str, Any], message: str) -> None:
    assert refusal(values) == message


def test_a_threshold_that_would_stop_all_late_gradients_is_refused() -> None:
    options: dict[str, Any] = {"name": "ormo_da", "threshold": 0}
    message = (
        "algorithm.threshold: got 0, expected at least 1 with algorithm.rule=ormo, which multiplies the learning rate of a "
        "late gradient by it"
    )
    assert refusal({"algorithm": options}) == message
    assert parse_config({"algorithm": {**options, "rule": "drop"}}).algorithm.declared()["threshold"] is not None


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
def test_an_option_that_the_delay_adaptive_rule_does_not_use_is_refused(
    algorithm: str, options: dict[str, Any], refused: str
) -> None:
    expected = f"algorithm.{refused}, expected none, as algorithm.rule={options['rule']} does not use it"
    assert refusal({"algorithm": {"name": algorithm, **options}}) == expected
    with pytest.raises(ValueError, match=re.escape(expected)):
        build_server(algorithm=algorithm, params=torch.zeros(1), num_workers=1, **options)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.momentun=3", r"train\.momentun: got an unknown key; did you mean train\.momentum\?"),
        ("seeed=3", r"seeed: got an unknown key; did you mean seed\?"),
        ("+speed=1", r"speed: got an unknown key; did you mean seed\?"),
        (
            "model.units=1",
            r"model\.units: got an unknown key, expected .* depth, dropout; an option of your own class: \+model\.units=VALUE",
        ),
        ("train.lr=much", "train.lr: got 'much', expected a finite number > 0"),
        ("train.lr=${nowhere}", "train.lr: Interpolation key 'nowhere' not found"),
        ("algorithm=null", f"algorithm: got null, expected one of {', '.join(parts('algorithm'))}"),
        ("experiment=", "experiment: got nothing, expected one of .*"),
        ("algorithm=adam", f"algorithm: got 'adam', expected one of {', '.join(parts('algorithm'))}"),
        ("model=custom", "model._target_: got None with model=custom, expected a dotted path .*"),
        ("model.hiden=1", r"model\.hiden: .* did you mean model\.hidden\? An option of your own class: \+model\.hiden=VALUE"),
        ("bogus", "bogus: expected KEY=VALUE"),
        ("++experiment=fashion_cnn", r"\+\+experiment=fashion_cnn: got a plus before a group; write experiment=fashion_cnn"),
        ("+algorithm=asgd", r"\+algorithm=asgd: got a plus before a group; write algorithm=asgd"),
        ("algorithm.name=asgd", r"algorithm\.name: got asgd, expected algorithm=asgd, which has the options too"),
        (
            "algorithm.name='asgd',ormo",
            r"algorithm\.name: got 'asgd',ormo, expected algorithm=asgd,ormo, which has the options too",
        ),
        (f"algorithm.name={'x' * 300}", "algorithm: got 'x*', expected one of .*"),
        ("train.lr_factors=[1]", r"train\.lr_factors: got a list, expected a dictionary, as in \{KEY: VALUE\}"),
        ("train.lr=[", "no viable alternative at input .*"),
        ("model.kwargs.width=3", r"model\.kwargs\.width: keywords stand beside _target_; use \+model\.width=3"),
        ("model.kwargs={a: 3}", r"model\.kwargs: keywords stand beside _target_; use \+model\.KEY=VALUE for each keyword"),
    ],
)
def test_a_wrong_override_is_one_line_with_its_full_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


def test_a_registered_part_without_its_file_in_conf_is_told_how_to_get_it() -> None:
    with temporary_parts("algorithm"):

        @register("brand_new")
        @dataclass(kw_only=True)
        class BrandNew(ASGD):
            """An algorithm whose file in conf/ was not written yet."""

        with pytest.raises(ConfigError) as caught:
            compose([f"algorithm={BrandNew.name}"])
    assert str(caught.value) == "algorithm: 'brand_new' is registered, but conf/ has no file of it: run make conf"


def test_a_former_key_is_refused_with_the_present_one() -> None:
    for former, present in RENAMED_KEYS.items():
        with pytest.raises(ConfigError, match=rf"^{re.escape(former)}: was renamed; use {re.escape(present)}="):
            compose([f"{former}=x"])
    for (key, former), present in RENAMED_VALUES.items():
        with pytest.raises(ConfigError, match=rf"{re.escape(key)}={re.escape(present)}$"):
            compose([f"{key}={former}"])


def test_a_missing_file_is_a_wrong_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "none.yaml")
    assert str(caught.value) == f"{tmp_path / 'none.yaml'}: there is no such file, expected the config.yaml of a run"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train:\n  : [", "cannot be read as YAML: .*"),
        (b"\0" * 9, "cannot be read as YAML: .*"),
        (b"seed: \xff", ".*can't decode byte 0xff.*"),
        (b"", r"got \{\}, expected keys with their values"),
        (b"- a", r"got \['a'\], expected keys with their values"),
        (b"sed: 3", r"sed: got an unknown key; did you mean seed\?"),
    ],
    ids=["syntax", "zeros", "encoding", "empty", "list", "key"],
)
def test_a_damaged_configuration_is_one_line_with_its_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert re.fullmatch(f"{file}: {message}", str(caught.value)), str(caught.value)


def test_every_default_is_in_its_own_range() -> None:
    for _, _, section, field in KEYS:
        valid = field.metadata["valid"]
        assert valid is None or default_of(field) is None or valid(default_of(field)), section.key(field.name)
    assert Config() == parse_config({})
