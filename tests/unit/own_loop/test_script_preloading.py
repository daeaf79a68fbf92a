"""A script's preloader and its forks: what each finds, and what is said of scripts that fail. The processes are real."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.config.runtimes import StartKind
from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.own_loop.script import Script
from ormo_rpc.runtimes.distributed.launcher.child import EXIT_DONE, EXIT_NO_RESTART
from ormo_rpc.runtimes.linux import LINUX
from tests.support.scripts import JOIN, Launcher, launcher, shared_imports

pytestmark = pytest.mark.skipif(not LINUX, reason="processes are forked on Linux alone")

FACTS = f"""
import json, os, random, sys
from pathlib import Path
import numpy as np, torch
import beside
random.seed(1), np.random.seed(2), torch.manual_seed(3), random.random()
os.environ["SCALE"] = "2"
torch.set_default_dtype(torch.float64)
{JOIN}
class Own:
    def number(self, value: int): ...
facts = [
    sys.argv, __name__, __file__, os.getcwd(), sys.path[0], beside.VALUE, sys.modules["__main__"].Own is Own, Own.__module__,
    random.random(), float(np.random.random()), float(torch.rand(())), os.environ["SCALE"], torch.get_num_threads(),
    Own.number.__annotations__["value"] is int,
]
Path(os.environ["FACTS"], str(os.getpid())).write_text(json.dumps(facts))
"""


@pytest.fixture(autouse=True, scope="module")
def imports() -> Generator[None]:
    with shared_imports():
        yield


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """The script's folder is the current one; what the forks have frozen is thawed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    gc.unfreeze()
    gc.enable()


def script(text: str, *arguments: str) -> Script:
    """A script with this text in the current directory."""
    Path("train.py").write_text(text)
    made = Script(name="train.py", arguments=arguments)
    made.set_module_path()
    return made


def started(text: str, *arguments: str) -> Any:
    """A launcher of a script with this text."""
    return launcher(script(text, *arguments), Path.cwd())


def short(text: str) -> str:
    """A text without the path of the current directory."""
    return text.replace(f"{Path.cwd()}/", "")


def outcome(with_launcher: Launcher) -> tuple[int | None, str]:
    """Exit status of a worker, and how it ended."""
    child = with_launcher.worker()
    return child.exit_code, short(child.outcome())


@pytest.mark.slow
def test_forked_and_spawned_processes_find_what_python_would_give_the_script(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "beside.py").write_text("VALUE = 7")
    monkeypatch.setenv("FACTS", str(here / "facts"))
    for start in (StartKind.auto, StartKind.spawn):
        (here / "facts").mkdir(exist_ok=True)
        with started(FACTS, "--width", "4") as launched:
            launched.load(start)
            assert launched.starts.way == ("fork" if start is StartKind.auto else "spawn: runtime.start=spawn")
            assert outcome(launched) == (EXIT_DONE, f"exited with status {EXIT_DONE}")
            assert outcome(launched)[0] == EXIT_DONE
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "train.py", "--width", "4"], env=environment, check=True)
    *found, plain = [
        json.loads(file.read_text()) for file in sorted((here / "facts").iterdir(), key=lambda it: it.stat().st_mtime)
    ]
    assert found == [plain] * 4
    assert plain[:2] == [["train.py", "--width", "4"], "__main__"]


@pytest.mark.parametrize(("threads", "found"), [(1, 3), (2, 2)])
def test_a_number_of_threads_that_join_asks_for_is_stronger_than_the_script_s(threads: int, found: int) -> None:
    with started(f"import torch\ntorch.set_num_threads(3)\n{JOIN}\nprint(torch.get_num_threads())") as launched:
        launched.load()
        assert launched.worker(threads=threads).exit_code == EXIT_DONE
    assert Path("worker 0").read_text() == f"{found}\n"


PREVENTED = {
    "import threading, time\nthreading.Thread(target=lambda: time.sleep(60), daemon=True, name='mine').start()": (
        "a thread was started while it was loaded: mine at train.py:2"
    ),
    "import subprocess\nsubprocess.Popen(['sleep', '60'])": (
        "a process was started before ormo_rpc.join, which forks could not wait for: pid "
    ),
    "import multiprocessing, time\nmultiprocessing.Process(target=time.sleep, args=[60], daemon=True, name='mine').start()": (
        "a process was started before ormo_rpc.join, which forks could not wait for: mine"
    ),
    "file = open('train.py')": "a file was left open while it was loaded: ",
    "import numpy\ngenerator = numpy.random.default_rng()": (
        "a random generator that may have no seed was made while it was loaded: numpy.random.Generator"
    ),
}


@pytest.mark.parametrize("before", PREVENTED)
def test_where_a_fork_would_not_be_as_a_process_of_its_own_the_script_is_run_again(before: str) -> None:
    with started(f"{before}\n{JOIN}\nprint('behind', flush=True)") as launched:
        launched.load()
        assert short(launched.starts.way).startswith(f"fork, each process runs the script: {PREVENTED[before]}")
        assert outcome(launched)[0] == EXIT_DONE
    assert (Path("worker 0")).read_text() == "behind\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("values = []\nvalues[1]", "train.py:2: IndexError: list index out of range"),
        ("def wrong(\n", "train.py:1: SyntaxError: '(' was never closed"),
        ("import nothing_of_this_name", "train.py:1: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("1", "train.py: it has ended without a call of ormo_rpc.join(model, ...), so there is nothing to run"),
        ("import sys\nsys.exit('no data')", "train.py:2: no data"),
        ("from ormo_rpc.errors import ConfigError\nraise ConfigError('train.lr: no')", "train.lr: no"),
        ("raise KeyboardInterrupt", "train.py:1: KeyboardInterrupt: "),
    ],
)
def test_a_script_that_does_not_join_is_refused_with_its_line(
    text: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with started(text) as launched, pytest.raises(ConfigError) as refused:
        launched.load()
    assert short(str(refused.value)) == message
    shown = short(capfd.readouterr().err)
    if "Error:" in message and "Syntax" not in message:
        assert shown.startswith('Traceback (most recent call last):\n  File "train.py", line')
        assert "ormo_rpc" not in shown
    elif "Error" not in message and "Keyboard" not in message:
        assert shown == ""


def test_a_module_that_is_not_there_is_refused_without_lines_of_ours(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "package").mkdir()
    missing = Script(name="package.missing", module=True)
    missing.set_module_path()
    with launcher(missing, here) as launched, pytest.raises(ConfigError) as refused:
        launched.load()
    assert str(refused.value) == "package.missing: ImportError: No module named package.missing"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("status", [0, 5])
def test_a_script_that_ends_itself_gives_its_exit_status(status: int, capfd: pytest.CaptureFixture[str]) -> None:
    with started(f"import sys\nprint('usage')\nsys.exit({status})") as launched, pytest.raises(SystemExit) as ended:
        launched.load()
    assert ended.value.code == status
    assert capfd.readouterr().out == "usage\n"


def test_a_script_whose_process_dies_is_told() -> None:
    with started("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)") as launched, pytest.raises(RunFailed) as failed:
        launched.load()
    assert str(failed.value) == "the process that loads train.py was lost: it was killed by SIGKILL"


@pytest.mark.parametrize(
    ("behind", "status", "how"),
    [
        ("1 / 0", EXIT_NO_RESTART, "train.py:6: ZeroDivisionError: division by zero"),
        ("child.has_worked = True; 1 / 0", 1, "train.py:6: ZeroDivisionError: division by zero"),
        ("raise MemoryError", 1, "train.py:6: MemoryError (use fewer workers"),
        ("import sys; sys.exit(3)", EXIT_NO_RESTART, "train.py:6: ScriptExit: it has ended itself by sys.exit(3)"),
        ("import sys; sys.exit()", EXIT_DONE, ""),
        ("from ormo_rpc.errors import ServerLost; raise ServerLost('gone')", 66, "train.py:6: ServerLost: gone"),
        ("open('missing')", 1, "train.py:6: FileNotFoundError: [Errno 2] No such file or directory: 'missing'"),
        ("import json; json.loads('{')", EXIT_NO_RESTART, "train.py:6: JSONDecodeError: "),
        ("from ormo_rpc.server.build import build_server as f; f()", EXIT_NO_RESTART, "train.py:6: TypeError: "),
        ("from ormo_rpc.options.imports import locate; locate('a', 'b')", EXIT_NO_RESTART, "ValueError: a._target_: "),
        (
            "child_of_launcher(Config(workers=2))",
            EXIT_NO_RESTART,
            "ConfigError: train.py:6: ormo_rpc.join is called again after train.py:4; expected one call in a script",
        ),
    ],
)
def test_the_reason_of_an_end_behind_join_has_the_line_of_the_script(behind: str, status: int, how: str) -> None:
    """A fault before the first gradient would end a replacement too, unless it is a limit of the machine."""
    with started(f"{JOIN}\n{behind}") as launched:
        launched.load()
        code, words = outcome(launched)
    assert (code, words.startswith(f"exited with status {status}{f': {how}' if how else ''}")) == (status, True), words
    log = short(Path("worker 0").read_text())
    assert log == "" if status == EXIT_DONE else log.startswith('Traceback (most recent call last):\n  File "train.py", line 6')


def test_a_process_that_the_script_forks_may_run_to_its_end() -> None:
    text = f"import os\nif os.fork() > 0:\n    assert os.wait()[1] == 0\n    {JOIN.strip().replace(chr(10), chr(10) + '    ')}"
    with started(text) as launched:
        launched.load()
        assert launched.starts.way == "fork"
        assert outcome(launched)[0] == EXIT_DONE


def test_join_in_a_process_that_the_script_forks_is_refused() -> None:
    forking = f"""
import os
from pathlib import Path
from ormo_rpc.errors import ConfigError
if os.fork() == 0:
    try:
        {JOIN.strip().replace(chr(10), chr(10) + "        ")}
    except ConfigError as error:
        Path("error").write_text(str(error))
    os._exit(0)
os.wait()
{JOIN}
"""
    with started(forking) as launched:
        launched.load()
        assert launched.starts.way == "fork"
    assert short(Path("error").read_text()) == (
        "train.py:9: ormo_rpc.join is called in a process that the script has forked; expected in the script's own process"
    )


def test_files_are_closed_and_functions_for_the_end_called_before_a_child_ends() -> None:
    text = "import atexit\natexit.register(print, 'at the end')\nfile = open('result', 'w')\nfile.write('saved')"
    with started(f"{JOIN}\n{text}") as launched:
        launched.load()
        assert outcome(launched)[0] == EXIT_DONE
    assert Path("result").read_text() == "saved"
    assert Path("worker 0").read_text() == "at the end\n"


def test_a_child_runs_the_script_itself_once_its_preloader_has_died() -> None:
    with started(f"print('before', flush=True)\n{JOIN}") as launched:
        reports = list[str]()
        launched.starts.report = reports.append
        launched.load()
        job = launched.starts._job  # pyright: ignore[reportPrivateUsage] # to kill it
        assert job is not None
        os.kill(job.process.pid, signal.SIGKILL)
        job.process.wait(5.0)
        assert outcome(launched)[0] == EXIT_DONE
    assert Path("worker 0").read_text() == "before\n"
    assert reports == [
        "the preloader with the job was lost: it was killed by SIGKILL; each process runs the script from now on"
    ]


def test_a_script_that_forgets_its_loop_is_no_success() -> None:
    """The launcher would take it for the end of the run."""
    join = "ormo_rpc.join(torch.nn.Linear(1, 1), 'workers=2', total_tickets=3)"
    with started(f"import torch\nimport ormo_rpc\nworker = {join}") as launched:
        launched.load()
        expected = (
            "exited with status 65: train.py:3: ConfigError: the script has ended without a loop over what ormo_rpc.join() "
        )
        assert outcome(launched)[1].startswith(expected)
