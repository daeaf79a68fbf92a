"""Scripts of the user's that call `train`: processes that import them, threads, other working directories, and Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import textwrap
from pathlib import Path

import pytest
import torch

from ormo_rpc.storage import checkpoint
from tests.support.processes import ROOT, descendants, gone, launched, wait_until

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]

NET = """
    from torch import nn
    print("my_net is imported", flush=True)
    class Net(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.layer = nn.Linear(64, num_classes)
        def forward(self, x):
            return self.layer(x.flatten(1))
"""


def script(folder: Path, name: str, text: str) -> str:
    """Write a script of the user's, beside a module with a model."""
    folder.mkdir(exist_ok=True)
    (folder / "my_net.py").write_text(textwrap.dedent(NET))
    (folder / name).write_text(textwrap.dedent(text))
    return str(folder / name)


def run(path: str, cwd: Path) -> tuple[int, str, str]:
    """Run a script to its end in a working directory; return its exit status, standard output and standard error."""
    cwd.mkdir(exist_ok=True)
    with launched(path, cwd=cwd, env={"PYTHONPATH": str(ROOT)}) as process:
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


def test_a_script_without_a_guard_is_refused_with_the_reason_as_its_last_line(tmp_path: Path) -> None:
    path = script(
        tmp_path / "code",
        "unguarded.py",
        """
        from my_net import Net as Other
        from ormo_rpc import train
        class Net(Other):
            pass
        train(["model._target_=unguarded.Net", "workers=2", "logger=none", "train.epochs=1"])
        """,
    )
    status, _, err = run(path, tmp_path / "elsewhere")
    assert status == 1
    assert err.splitlines()[-1] == (
        "ormo_rpc.errors.ConfigError: train() is called while its module is imported for model._target_='unguarded.Net', as "
        "every process of a run does; put the call under if __name__ == '__main__':"
    )
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_script_trains_again_in_threads_and_in_a_spawned_process(tmp_path: Path) -> None:
    """Its model is beside it, the working directory is another one, where a file has the name of a module of Python's."""
    path = script(
        tmp_path / "code",
        "guarded.py",
        """
        import multiprocessing
        import threading
        import psutil
        from ormo_rpc import train
        from my_net import Net
        def go(name):
            options = {"workers": 1, "logger": "none", "model": Net, "train": {"max_iterations": 20}}
            print(name, train(options)["status"], flush=True)
        if __name__ == "__main__":
            go("first")
            threads = [threading.Thread(target=go, args=(f"thread {number}",)) for number in range(2)]
            spawned = multiprocessing.get_context("spawn").Process(target=go, args=("spawned",))
            for each in (*threads, spawned):
                each.start()
            for each in (*threads, spawned):
                each.join(100)
            left = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
            print("left", [command for command in left if "resource_tracker" not in command])
        """,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "queue.py").write_text("raise ImportError('not the queue of Python')\n")
    status, out, err = run(path, elsewhere)
    assert (status, err) == (0, "")
    lines = [line for line in out.splitlines() if line != "my_net is imported"]
    assert sorted(lines) == ["first completed", "left []", "spawned completed", "thread 0 completed", "thread 1 completed"]
    assert len(list((elsewhere / "outputs").glob("*/*"))) == 4


def test_other_processes_build_the_model_in_the_default_dtype_of_the_script(tmp_path: Path) -> None:
    path = script(
        tmp_path / "code",
        "double.py",
        """
        import torch
        from my_net import Net
        from ormo_rpc import train
        if __name__ == "__main__":
            torch.set_default_dtype(torch.float64)
            for runtime in ("sim", "rpc"):
                options = {"workers": 1, "logger": "none", "model": Net, "train": {"max_iterations": 20}}
                print(train({"runtime": runtime, **options}, run_dir=runtime)["final_params_sha256"], flush=True)
        """,
    )
    status, out, err = run(path, tmp_path / "elsewhere")
    assert (status, err) == (0, "")
    assert len({line for line in out.splitlines() if line != "my_net is imported"}) == 1
    for runtime in ("sim", "rpc"):
        weights = checkpoint.read(checkpoint.locate(tmp_path / "elsewhere" / runtime), "model.pt")
        assert {weight.dtype for weight in weights.values()} == {torch.float64}


def test_an_application_of_hydra_that_changes_the_directory_trains_with_its_own_model(tmp_path: Path) -> None:
    path = script(
        tmp_path / "code",
        "application.py",
        """
        import hydra
        from ormo_rpc import train
        @hydra.main(version_base=None, config_path=None)
        def main(config):
            options = ["workers=1", "logger=none", "model._target_=my_net.Net", "train.max_iterations=20"]
            print(train(options, run_dir="run")["status"])
        if __name__ == "__main__":
            main()
        """,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with launched(path, "+hydra.job.chdir=true", "hydra.run.dir=job", cwd=elsewhere, env={"PYTHONPATH": str(ROOT)}) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out == "my_net is imported\ncompleted\n"
    assert (elsewhere / "job" / "run" / "summary.json").is_file()


def test_ctrl_c_ends_train_with_an_error_and_leaves_no_process(tmp_path: Path) -> None:
    path = script(
        tmp_path / "code",
        "endless.py",
        """
        import signal
        import psutil
        from ormo_rpc import RunFailed, train
        if __name__ == "__main__":
            before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            try:
                train({"workers": 1, "logger": "none", "train": {"epochs": 100000}}, run_dir="run")
            except RunFailed as error:
                print(error, flush=True)
            print("left", psutil.Process().children(recursive=True))
            print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before)
        """,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with launched(path, cwd=elsewhere, env={"PYTHONPATH": str(ROOT)}) as process:
        wait_until(lambda: (elsewhere / "run" / "processes.json").is_file(), "the start")
        family = descendants(process.pid)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert re.fullmatch(r"interrupted by SIGINT; iteration \d+ is kept: .*\nleft \[\]\nTrue\n", out), out
    assert len(family) >= 2
    assert gone(family)


def test_neither_wandb_nor_matplotlib_is_loaded_where_neither_is_used(tmp_path: Path) -> None:
    path = script(
        tmp_path / "code",
        "lean.py",
        """
        import sys
        from ormo_rpc import train
        from ormo_rpc.composing import compose
        options = ["runtime=sim", "logger=none", "train.max_iterations=4", "workers=2"]
        compose([])
        print([name for name in ("wandb", "matplotlib", "sklearn", "torchvision") if name in sys.modules])
        train(options)
        print([name for name in ("wandb", "matplotlib") if name in sys.modules])
        """,
    )
    assert run(path, tmp_path / "elsewhere") == (0, "[]\n[]\n", "")
