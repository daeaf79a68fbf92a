"""The folders that experiments write to."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import common
from tests.support.pages import ROOT


def test_pictures_of_the_repository_s_results_go_to_docs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert common.pictures(Path("results")) == common.pictures(ROOT / "results") == ROOT / "docs"
    assert common.pictures(tmp_path) == tmp_path


def test_a_folder_of_results_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert common.folder(tmp_path / "a" / "b").is_dir()
    with pytest.raises(SystemExit, match=r"^--into: .*file/new'; expected a folder, or where one can be made$"):
        common.folder(tmp_path / "file" / "new")
