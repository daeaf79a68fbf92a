"""Changes that invalidate finished runs of the race, and changes that do not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from experiments.race import versions
from experiments.race.versions import run_version
from ormo_rpc.composing import compose

pytestmark = pytest.mark.slow  # hydra composes a hundred configurations

RUNS = {
    "ormo": ("algorithm=ormo",),
    "local_sgd": ("algorithm=local_sgd", "algorithm.local_steps=2"),
    "partial": ("algorithm=ormo", "scheduler=partial", "scheduler.k=2"),
    "convolutions": ("algorithm=ormo", "model=cnn"),
}


@pytest.fixture(autouse=True)
def _not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_version", versions._version.__wrapped__)  # pyright: ignore[reportPrivateUsage]


@pytest.fixture
def before() -> dict[str, str]:
    return {name: run_version(overrides) for name, overrides in RUNS.items()}


def changed(before: dict[str, str]) -> list[str]:
    """The runs whose version is no longer that of before."""
    return [name for name, overrides in RUNS.items() if run_version(overrides) != before[name]]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("_local_steps.py", ["local_sgd"]),  # which imports it
        ("partial.py", ["partial"]),
        ("steps.py", ["ormo", "partial", "convolutions"]),  # local SGD averages
        ("base.py", []),
        ("mlp.py", []),
    ],
)
def test_the_source_of_rules_schedulers_and_steps_counts(
    module: str, expected: list[str], before: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self: read(self) + ("\nCHANGED = 1\n" if self.name == module else ""))
    assert changed(before) == expected


@pytest.mark.parametrize(
    ("section", "option", "expected"),
    [
        ("model", {"hidden": 999}, ["ormo", "local_sgd", "partial"]),
        ("train", {"weight_decay": 0.01}, [*RUNS]),
        ("train", {"clip_norm": None, "lr_factors": {}}, []),  # off, as they are
        ("dataset", {"root": "elsewhere"}, []),
        ("runtime", {"compute_seconds": 0.5}, [*RUNS]),
        ("runtime", {"threads": 2}, []),
        ("logger", {"progress": False}, []),
    ],
)
def test_the_defaults_of_what_determines_a_run_count(
    section: str, option: dict[str, Any], expected: list[str], before: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(overrides: tuple[str, ...]) -> Any:
        config = compose(overrides)
        part = getattr(config, section)
        known = {key: value for key, value in option.items() if key != "hidden" or hasattr(part, key)}
        return dataclasses.replace(config, **{section: dataclasses.replace(part, **known)})

    monkeypatch.setattr(versions, "compose", other)
    assert changed(before) == expected


def test_options_that_are_overridden_anyway_do_not_matter_but_those_of_the_rule() -> None:
    ormo = run_version(("algorithm=ormo",))
    assert run_version(("algorithm=ormo", "train.lr=0.5", "seed=3", "workers=7")) == ormo
    assert run_version(("algorithm=ormo", "algorithm.momentum_correction=true")) != ormo
    assert run_version(("algorithm=ormo_da",)) != ormo
    settings = [run_version(("algorithm=ormo", f"experiment=paper_cifar10_k{workers}_het")) for workers in (16, 64)]
    assert len({ormo, *settings}) == 3, "workers of an experiment's file count"
