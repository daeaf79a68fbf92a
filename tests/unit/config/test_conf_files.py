"""The folder ``conf/`` and the help say what can be set: every group, name and key, with its default and meaning."""

from __future__ import annotations

import re
from enum import Enum

import pytest
from omegaconf import OmegaConf

from ormo_rpc.config.help import help_text, list_of_keys
from ormo_rpc.config.schema import GROUPS
from ormo_rpc.config.write_conf import conf_dir, rendered
from ormo_rpc.options import parts
from tests.support.keys import KEYS, default_of

NOT_WRITTEN = ("config.yaml", "experiment/", "hparams_search/", "hydra/")


def test_the_files_are_those_that_the_schema_writes() -> None:
    found = {str(path.relative_to(conf_dir())): path.read_text() for path in conf_dir().rglob("*.yaml")}
    written = rendered()
    assert {name for name in found if not name.startswith(NOT_WRITTEN)} == set(written), "run `make conf`"
    for name, text in written.items():
        assert found[name] == text, f"conf/{name} is not what the schema says; run `make conf`"


def test_a_file_has_every_key_of_its_part_with_its_default() -> None:
    for path, part, section, field in KEYS:
        values = OmegaConf.load(conf_dir() / (f"{path}/{part}.yaml" if part else "settings.yaml"))
        default = default_of(field)
        node = OmegaConf.select(values, section.key(field.name) if not part else field.name, throw_on_missing=True)
        assert node == (default.value if isinstance(default, Enum) else default), section.key(field.name)


@pytest.mark.parametrize("command", ["python launch.py", "ormo-rpc"])
def test_the_help_fits_on_a_screen_and_names_every_group_and_part(command: str) -> None:
    lines = help_text(command).splitlines()
    assert lines[2].split()[: len(command.split())] == command.split()
    assert len(lines) <= 52
    assert max(map(len, lines)) <= 110
    text = " ".join(help_text().split())
    for group in (*GROUPS, "experiment"):
        names = list(parts(group)) if group in GROUPS else sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        shown = list(dict.fromkeys("paper_*" if name.startswith("paper_") else name for name in names))  # a large family
        assert f" {group} {', '.join(shown)} " in text, group
    assert "--help-all" in text


def test_the_long_help_has_every_key_with_its_meaning_and_default() -> None:
    lines = [line.strip() for line in list_of_keys().splitlines()]
    for _, _, section, field in KEYS:
        default = default_of(field)
        shown = "none" if default is None else default.value if isinstance(default, Enum) else default
        pattern = rf"{re.escape(section.key(field.name))} +{re.escape(field.metadata['doc'])} \[{re.escape(str(shown))}\]"
        assert any(re.fullmatch(pattern, line) for line in lines), pattern
