"""PyTorch is loaded at its first use: no command is checked, refused or explained by loading it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LAZY = "from ormo_rpc.lazy_import import is_loaded, make_lazy\nmake_lazy('torch')\nmake_lazy('numpy')\n"


def run(code: str) -> str:
    """Run code in a new interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", LAZY + code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_every_part_is_composed_and_checked_without_pytorch() -> None:
    printed = run(
        "from ormo_rpc.composing import compose\n"
        "from ormo_rpc.config.schema import GROUPS\n"
        "from ormo_rpc.options import parts\n"
        "from ormo_rpc.errors import ConfigError\n"
        "tried = 0\n"
        "for group in GROUPS:\n"
        "    for name in parts(group):\n"
        "        try:\n"
        "            compose([f'{group}={name}'])\n"
        "        except ConfigError as error:\n"
        "            assert 'expected' in str(error), error\n"
        "        assert not is_loaded('torch') and not is_loaded('numpy'), (group, name)\n"
        "        tried += 1\n"
        "print(tried > 40)\n"
    )
    assert printed == "True"


def test_public_names_and_their_modules_are_attributes_of_the_package() -> None:
    uses = "ormo_rpc.errors.ConfigError is ormo_rpc.ConfigError, ormo_rpc.training.train is ormo_rpc.train"
    assert run(f"import ormo_rpc\nprint({uses}, hasattr(ormo_rpc, 'nothing'))\n") == "True True False"


@pytest.mark.parametrize(
    "words",
    [
        *(["train.lr=-1"], ["nonsense=1"], ["algorithm=nonsense"], ["--help"], ["--help-all"]),
        *(["launch", "--help"], ["launch", "missing.py"], ["launch", "train.lr=-1", __file__]),
    ],
)
def test_a_command_is_refused_or_explained_without_pytorch(words: list[str]) -> None:
    printed = run(
        "import contextlib, io, sys\n"
        "from ormo_rpc.main import main\n"
        f"sys.argv = ['launch.py', *{words}]\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main()\n"
        "print(is_loaded('torch') or is_loaded('numpy'))\n"
    )
    assert printed == "False"


def test_the_launcher_of_a_live_run_is_imported_without_pytorch() -> None:
    assert (
        run("import ormo_rpc.runtimes.distributed.launcher.run\nprint(is_loaded('torch') or is_loaded('numpy'))\n") == "False"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        "import torch; torch.nn",
        "import torch, torch.distributed as dist; assert torch.distributed is dist",
        "import torch.nn as nn; import torch; assert torch.nn is nn",
        "from torch.nn import Linear; import torch; assert torch.nn.Linear is Linear",
        "import torch.utils.data as data; import torch; assert torch.utils.data is data",
        "import numpy.random as random; import torch, numpy; torch.nn; assert numpy.random is random",
    ],
)
def test_each_form_of_import_gives_the_one_module(use: str) -> None:
    printed = run(
        f"{use}\n"
        "import importlib, sys\n"
        "assert is_loaded('torch') and type(torch).__name__ == 'module'\n"
        "assert importlib.import_module('torch.nn').Linear is torch.nn.modules.linear.Linear\n"
        "loaders = {type(sys.modules[name].__spec__.loader).__name__ for name in ('torch', 'torch.nn', 'torch.utils.data')}\n"
        "print(torch.ones(2).sum().item(), *loaders)\n"
    )
    assert printed == "2.0 SourceFileLoader"


def test_a_module_that_has_been_imported_stays_as_it_is() -> None:
    assert run("import json, sys\nmake_lazy('json')\nprint(sys.modules['json'] is json, is_loaded('json'))\n") == "True True"


def test_a_module_that_is_not_there_is_refused() -> None:
    assert (
        run("try:\n    make_lazy('no_such_module')\nexcept ModuleNotFoundError as error:\n    print(error.name)\n")
        == "no_such_module"
    )


def test_a_module_that_another_thread_executes_is_not_loaded_yet(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import sys\nsys.executing.set()\nsys.go_on.wait(60)\nvalue = 1\n")
    assert (
        run(
            "import sys, threading\n"
            f"sys.path.insert(0, {str(tmp_path)!r})\n"
            "sys.executing, sys.go_on = threading.Event(), threading.Event()\n"
            "make_lazy('slow')\n"
            "import slow\n"
            "thread = threading.Thread(target=lambda: slow.value)\n"
            "thread.start()\n"
            "sys.executing.wait(60)\n"
            "before = is_loaded('slow')\n"
            "sys.go_on.set()\n"
            "thread.join()\n"
            "print(before, is_loaded('slow'))\n"
        )
        == "False True"
    )


def test_threads_that_use_a_lazy_package_at_once_find_all_of_it(tmp_path: Path) -> None:
    package = tmp_path / "slow"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys\nbegun = 1\nsys.executing.set()\nsys.others.wait(0.5)\nfrom slow import part\nvalue = part.value\n"
        "def __getattr__(name):\n    if name == 'computed':\n        return 3\n    raise AttributeError(name)\n"
    )
    (package / "part.py").write_text("value = 2\n")
    assert (
        run(
            "import sys, threading\n"
            f"sys.path.insert(0, {str(tmp_path)!r})\n"
            "sys.executing, sys.others = threading.Event(), threading.Event()\n"
            "make_lazy('slow')\n"
            "import slow\n"
            "found = []\n"
            "def use(code):\n"
            "    names = {'slow': slow}\n"
            "    exec(code, names)\n"
            "    found.append(names['it'])\n"
            "uses = ['it = slow.value', 'import slow; it = slow.value', 'from slow import value as it',\n"
            "        'from slow.part import value as it', 'it = slow.computed - 1']\n"
            "threads = [threading.Thread(target=use, args=(code,)) for code in uses]\n"
            "threads[0].start()\n"
            "sys.executing.wait(60)\n"
            "for thread in threads[1:]:\n"
            "    thread.start()\n"
            "for thread in threads:\n"
            "    thread.join(60)\n"
            "print(found, type(slow).__name__, type(slow.__spec__.loader).__name__)\n"
        )
        == "[2, 2, 2, 2, 2] module SourceFileLoader"
    )
