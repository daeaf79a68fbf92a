"""The job of a run, loaded in a preloader's process: here in one that is thrown away."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.runtimes.distributed.preloading.forking import apart
from ormo_rpc.runtimes.distributed.preloading.load import Loading
from ormo_rpc.runtimes.linux import LINUX
from ormo_rpc.runtimes.programs import preloader
from tests.support import changing

pytestmark = pytest.mark.skipif(not LINUX, reason="processes are forked on Linux alone")
PRINTING = """
import sys
from tests.support import changing
OUT = sys.stdout
print("imported")
def data():
    print("made", file=OUT)
    return changing.data()
"""


def request(config: str, folder: Path) -> dict[str, Any]:
    """The request of a launcher."""
    return {
        "config": config,
        "starts_server": True,
        "path": [str(folder), *sys.path],
        "directory": str(folder),
        "environment": {**os.environ, "OMP_NUM_THREADS": "1"},
        "default_dtype": "float32",
    }


def test_a_module_that_keeps_a_standard_stream_at_its_import_can_write_to_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As `logging.basicConfig` does. What it prints at the import is not shown, since the launcher has."""
    (tmp_path / "printing.py").write_text(PRINTING)
    values = {**changing.CONFIG, "runtime": "rpc", "dataset": {"_target_": f"{changing.HERE}.data"}}
    text = parse_config(values).yaml.replace(f"{changing.HERE}.data", "printing.data")

    def load() -> dict[str, Any]:
        sys.stdout = os.fdopen(1, "w", closefd=False)
        return Loading(request(text, tmp_path), lambda: "").run()

    assert "refused" not in apart(load)
    assert capfd.readouterr().out == "made\n"


@pytest.mark.parametrize("runtime", ["ddp", "rpc"])
def test_what_each_rank_would_import_by_itself_is_imported_once_before_they_are_forked(runtime: str, tmp_path: Path) -> None:
    def load() -> dict[str, Any]:
        imported, import_module = list[str](), importlib.import_module

        def noting(name: str, package: str | None = None) -> ModuleType:
            imported.append(name)
            return import_module(name, package)

        importlib.import_module = noting
        Loading(request(parse_config({"runtime": runtime}).yaml, tmp_path), lambda: "").run()
        return {"found": "torch._dynamo" in imported}

    assert apart(load)["found"] == (runtime == "ddp")


def test_the_program_of_a_preloader_can_be_imported_without_effect() -> None:
    """As multiprocessing does for a process that it spawns from a fork, for a data loader, say."""
    gc.enable()
    importlib.reload(preloader)
    assert gc.isenabled()
