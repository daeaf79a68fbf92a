"""The real wandb, offline or without a server to reach, and the agent of a sweep."""

from __future__ import annotations

import math
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from ormo_rpc.loggers.metrics import METRICS
from ormo_rpc.loggers.wandb import ENVIRONMENT
from ormo_rpc.storage.checkpoint import FOLDER
from ormo_rpc.storage.run_directory import read_metrics
from tests.support.processes import CALM, PATIENCE_SECONDS, ROOT, launch, launched, processes, summary, wait_until
from tests.support.wandb_files import offline_runs
from tests.support.wandb_server import wandb_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SMALL = ("runtime=sim", "workers=2", "model.hidden=8", "train.max_iterations=60")
NOWHERE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789abcdef" * 3}
"""A server of wandb that does not answer, and a key in the form of one."""
VARIABLES = {
    "WANDB_PROJECT": "theirs",
    "WANDB_ENTITY": "their_team",
    "WANDB_NAME": "their name",
    "WANDB_RUN_GROUP": "their group",
    "WANDB_JOB_TYPE": "their job",
    "WANDB_TAGS": "one,two",
    "WANDB_NOTES": "their notes",
    "WANDB_RUN_ID": "theirid",
}


def home(folder: Path) -> dict[str, str]:
    """Variables with which nobody is logged in."""
    quiet = {"WANDB_ERROR_REPORTING": "false"}  # of errors to wandb itself, which takes another dozen seconds
    return {"HOME": str(folder), "NETRC": str(folder / "no_netrc"), "WANDB_CONFIG_DIR": str(folder), **quiet}


NOBODY = ("unshare", "--user", "--map-user=54321", "--map-group=54321", "env", "-u", "HOME")
"""Runs a command without a home directory, as a user whom the system does not know."""


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*NOBODY, "true"], capture_output=True).returncode != 0,
    reason="there are no namespaces of users",
)
def test_nobody_without_a_home_directory_trains_without_wandb(tmp_path: Path) -> None:
    command = [*NOBODY, sys.executable, "launch.py", f"hydra.run.dir={tmp_path}", *SMALL]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE_SECONDS)
    assert ended.returncode == 0, ended.stderr
    warning, result, _ = ended.stdout.splitlines()
    assert warning.startswith("wandb is left out, metrics.jsonl has every row: RuntimeError: ")
    assert result.startswith("completed: ")
    assert read_metrics(tmp_path)


def test_wandbs_variables_reach_the_run_and_options_win(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    variables = {**VARIABLES, "WANDB_DIR": str(elsewhere), "WANDB_MODE": "offline"}
    assert set(variables) == set(ENVIRONMENT.values())
    status, _, err = launch(tmp_path / "silent", *SMALL, env=variables)
    assert (status, err) == (0, "")
    assert offline_runs(tmp_path / "silent") == []
    (made,) = offline_runs(elsewhere)
    run = made.run
    assert (run.project, run.entity, run.display_name, run.run_group) == ("theirs", "their_team", "their name", "their group")
    assert (run.job_type, list(run.tags), run.notes, run.run_id) == ("their job", ["one", "two"], "their notes", "theirid")

    named = [f"logger.{name}={name}" for name in ENVIRONMENT if name not in ("mode", "tags", "directory")]
    given = (*named, "logger.mode=offline", "logger.tags=[mine]", f"logger.directory={tmp_path / 'mine'}")
    status, _, err = launch(tmp_path / "given", *SMALL, *given, env={**variables, "WANDB_MODE": "online"})
    assert (status, err) == (0, "")
    (made,) = offline_runs(tmp_path / "mine")
    run = made.run
    assert (run.project, run.entity, run.display_name, run.run_group) == ("project", "entity", "run_name", "group")
    assert (run.job_type, list(run.tags), run.notes, run.run_id) == ("job_type", ["mine"], "notes", "run_id")


@pytest.mark.parametrize(
    ("override", "variables", "fault"),
    [
        ("logger.project=p", {"WANDB_SWEEP_ID": "sweep1"}, "no key was found"),  # online, since the sweep waits for results
        ("logger.mode=online", {"WANDB_API_KEY": "short"}, r"WANDB_API_KEY invalid: .*"),
    ],
)
def test_online_without_a_key_is_refused_before_anything_starts(
    override: str, variables: Mapping[str, str], fault: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    status, out, err = launch(run_dir, override, env={**home(tmp_path), **variables})
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    advice = "log in with `wandb login`, or set WANDB_API_KEY, or use logger.mode=offline or logger=none"
    assert re.fullmatch(f"launch.py: logger.mode: got online, but {fault}; {advice}", line), line
    assert "short" not in err
    assert {path.name for path in run_dir.glob("*")} <= {".hydra"}


def test_a_server_that_cannot_be_reached_does_not_end_the_run_and_nothing_tells_the_key(tmp_path: Path) -> None:
    options = (*SMALL, "logger.mode=online", "logger.timeout_seconds=2")
    status, out, err = launch(tmp_path / "run", *options, env={**home(tmp_path), **NOWHERE})
    assert status == 0, err
    assert "wandb cannot be reached, so the run is logged offline" in out + err
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (made,) = offline_runs(offline)
    assert made.summary["status"] == "completed"
    key = NOWHERE["WANDB_API_KEY"]
    told = [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert (told, key in out + err) == ([], False)


def test_a_server_of_wandb_that_answers_no_more_neither_ends_nor_holds_up_the_run(tmp_path: Path) -> None:
    with wandb_server() as server:
        variables = {**home(tmp_path), "WANDB_BASE_URL": server.address, "WANDB_API_KEY": NOWHERE["WANDB_API_KEY"]}
        began = time.monotonic()
        status, out, err = launch(tmp_path / "run", *SMALL, "logger.mode=online", "logger.timeout_seconds=3", env=variables)
        assert (status, out.partition(":")[0]) == (0, "completed"), err
        assert server.silent.is_set()  # since the first rows came
        assert time.monotonic() - began < PATIENCE_SECONDS
    assert server.runs[0]["displayName"].startswith("ormo-async-2w-seed0 runtime=sim")
    (made,) = offline_runs(tmp_path / "run")  # what an online run keeps as well, for `wandb sync`
    assert made.summary["status"] == "completed"
    assert made.rows[-1]["iteration"] == 60


def test_runs_of_one_program_and_its_own_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("""
import sys, threading
import wandb
from ormo_rpc import train
own = wandb.init(mode="offline", project="own", settings=wandb.Settings(silent=True))
def go(number):
    train([f"seed={number}", *sys.argv[1:]], run_dir=f"run{number}")
threads = [threading.Thread(target=go, args=(number,)) for number in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert wandb.run is own
own.log({"mine": 1})
own.finish()
""")
    with launched("program.py", *SMALL, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}) as process:
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
    for number in range(2):
        (made,) = offline_runs(tmp_path / f"run{number}")
        assert (made.config["seed"], made.summary["status"]) == (number, "completed")
        assert {row["iteration"] for row in made.rows} >= {2, 60}
        for key, name, best in (("test_accuracy", "max", max), ("test_loss", "min", min)):
            values = [row[key] for row in made.rows if key in row]
            assert made.summary[key] == {name: best(values), "last": values[-1]}
    (own,) = offline_runs(tmp_path / "wandb")
    assert (own.run.project, [row["mine"] for row in own.rows]) == ("own", [1])


def test_a_resumed_run_continues_the_wandb_run(tmp_path: Path) -> None:
    status, _, err = launch(tmp_path / "first", *SMALL, "checkpoint.every=20")
    assert status == 0, err
    checkpoint = tmp_path / "first" / FOLDER / "iteration_000000040"
    status, _, err = launch(tmp_path / "second", *SMALL[:-1], "train.max_iterations=80", f"checkpoint.resume={checkpoint}")
    assert status == 0, err
    parts = [*offline_runs(tmp_path / "first"), *offline_runs(tmp_path / "second")]
    assert len({part.run.run_id for part in parts}) == 1
    reached = [[row["iteration"] for row in part.rows] for part in parts]
    # Two workers push at each moment, and share its row. Rows 42 to 60 come again, from the second run, at their iterations,
    # which are the x axis: none is lost.
    assert [(min(each), max(each)) for each in reached] == [(2, 60), (42, 80)]


@pytest.mark.live
def test_a_server_that_is_killed_continues_its_wandb_run(tmp_path: Path) -> None:
    options = (
        *CALM,
        "workers=1",
        "train.max_seconds=8",
        "train.epochs=10000",
        "checkpoint.every_seconds=0.3",
        "logger.log_iterations=5",
    )
    with launched("launch.py", f"hydra.run.dir={tmp_path}", *options) as process:
        server = processes(tmp_path)["server"]
        wait_until(lambda: list((tmp_path / FOLDER).glob("iteration_*")), "a checkpoint")
        os.kill(server, 9)
        wait_until(lambda: processes(tmp_path)["server"] != server, "a new server")
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert summary(tmp_path)["incarnations"] == 2
    # What wandb's process had not yet written has died with the server; the second part has it from metrics.jsonl.
    *_, last = parts = offline_runs(tmp_path)
    assert {part.run.run_id for part in parts if part.run is not None} == {(tmp_path / "wandb_id").read_text()}
    assert last.summary["status"] == "completed"
    iterations = {row["iteration"] for row in last.rows}
    assert {row["iteration"] for row in read_metrics(tmp_path)} <= iterations
    assert min(iterations) <= 5


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_the_runs_of_a_sweep_say_what_they_differ_in_and_are_one_group(tmp_path: Path) -> None:
    sweep = ("-m", "train.lr=0.01,0.03", f"hydra.sweep.dir={tmp_path / 'day' / 'time'}", "logger.run_name=null")
    with launched("launch.py", *sweep, *SMALL) as process:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    runs = offline_runs(tmp_path)
    common = "runtime=sim model.hidden=8 train.max_iterations=60"
    assert [made.run.display_name for made in runs] == [
        f"ormo-async-2w-seed0 train.lr={rate} {common}" for rate in ("0.01", "0.03")
    ]
    assert {made.run.run_group for made in runs} == {"day_time"}


def drawn(parameters: Mapping[str, Any], chance: random.Random) -> dict[str, dict[str, Any]]:
    """Draw a value of each parameter, in the form in which wandb's server sends them to an agent."""

    def value(spec: Mapping[str, Any]) -> Any:
        if "value" in spec:
            return spec["value"]
        if "values" in spec:
            return chance.choice(spec["values"])
        assert spec["distribution"] == "log_uniform_values"
        return math.exp(chance.uniform(math.log(spec["min"]), math.log(spec["max"])))

    return {name: {"value": value(spec)} for name, spec in parameters.items()}


def test_wandbs_agent_runs_the_sweep_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent itself, given the commands that wandb's server would send it."""
    from wandb.wandb_agent import Agent

    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    assert sweep["metric"]["name"] in METRICS
    variables = {
        "WANDB_DIR": str(tmp_path),
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "sweep123",
        "WANDB_PROJECT": "of_the_sweep",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)  # the agent sets both in this process
    monkeypatch.delenv("WANDB_SWEEP_PARAM_PATH", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch.py").symlink_to(ROOT / "launch.py")
    agent = Agent(api=None, queue=queue.Queue(), sweep_id="sweep123")

    def run_for_the_agent(run_id: str, args: Mapping[str, Any]) -> None:
        # Agent.run and its loop, which ask wandb's server, set and do no more than this.
        agent._sweep_command = [*sweep["command"], f"hydra.run.dir={tmp_path / 'runs' / run_id}", *SMALL]  # pyright: ignore[reportPrivateUsage] # see above
        command = {"type": "run", "run_id": run_id, "program": sweep["program"], "args": args}
        assert "exception" not in agent._process_command(command)  # pyright: ignore[reportPrivateUsage] # see above
        child: subprocess.Popen[bytes] = agent._run_processes[run_id]._popen  # pyright: ignore[reportPrivateUsage] # see above
        assert child.wait(PATIENCE_SECONDS) == 0

    given = drawn(sweep["parameters"], random.Random(1))
    run_for_the_agent("first", given)
    # A run that diverges is a result, with status 0: the agent stops after three failures.
    run_for_the_agent("second", {**given, "train.lr": {"value": 1e30}})

    runs = {made.run.run_id: made for made in offline_runs(tmp_path)}
    assert runs.pop("second").summary["status"] == "diverged"
    (made,) = runs.values()
    values = {name: each["value"] for name, each in given.items()}
    assert (made.run.run_id, made.run.sweep_id) == ("first", "sweep123")
    assert (made.run.run_group, made.run.project) == ("sweep123", "of_the_sweep")
    assert made.config["train"]["lr"] == pytest.approx(values["train.lr"])
    assert made.config["train"]["momentum"] == values["train.momentum"]
    assert made.config["seed"] == values["seed"]
    assert {name: made.config[name] for name in values if "." in name} == {
        name: value for name, value in values.items() if "." in name
    }
    assert f"train.lr={values['train.lr']}" in made.run.display_name
    metric = made.summary[sweep["metric"]["name"]]
    assert metric == [row["val_loss"] for row in read_metrics(tmp_path / "runs" / "first") if "val_loss" in row][-1]
