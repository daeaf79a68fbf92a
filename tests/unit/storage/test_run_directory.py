"""The run directory: claimed once, JSON in every file, and summaries and evictions of earlier versions."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.rendezvous.secret import new_secret, write_secret
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.counters import RunCounters
from ormo_rpc.storage.launch import Launch
from ormo_rpc.storage.run_directory import RunDirectory, read_trace, rows_so_far, write_json
from ormo_rpc.storage.summary import Summary, extend_summary, identity, read_summary, unfinished_summary, write_summary
from tests.support.processes import PATIENCE_SECONDS, ROOT


def test_a_directory_is_used_once(tmp_path: Path) -> None:
    RunDirectory.claim(tmp_path)
    assert (tmp_path / "trace.jsonl").read_bytes() == b""
    directory = RunDirectory(tmp_path)
    directory.write_header(seed=3)
    transports = {1: {"transport": "shm", "reason": "one machine"}}
    directory.write_processes(11, {1: 13, 0: 12}, "127.0.0.1:9", control="rpc", start="fork", transports=transports)
    directory.close()
    with pytest.raises(ConfigError) as caught:
        RunDirectory.claim(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: got the directory of an earlier run, expected a new one; continue that run with "
        f"checkpoint.resume={tmp_path}"
    )
    header = json.loads((tmp_path / "trace.jsonl").read_text())
    assert (header["event"], header["version"], header["seed"]) == ("header", 1, 3)
    assert (header["torch"], header["threads"]) == (torch.__version__, torch.get_num_threads())
    assert {"commit", "python", "cpu", "capability"} <= header.keys()
    assert json.loads((tmp_path / "processes.json").read_text()) == {
        "server": 11,
        "workers": {"0": 12, "1": 13},
        "address": "127.0.0.1:9",
        "control": "rpc",
        "start": "fork",
        "transports": {"1": {"transport": "shm", "reason": "one machine"}},
    }
    assert read_summary(tmp_path) is None


@pytest.mark.parametrize("how", ["deleted", "moved", "emptied", "replaced"])
def test_a_run_directory_that_is_gone_is_noticed_and_not_made_again(how: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunDirectory.claim(path)
    directory = RunDirectory(path)
    directory.write_header()
    directory.flush()
    if how == "moved":
        path.rename(tmp_path / "elsewhere")
    elif how == "emptied":
        for file in path.iterdir():
            file.unlink()
    else:
        shutil.rmtree(path)
    if how == "replaced":
        RunDirectory.claim(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunFailed, match=f"^the run directory {path} is gone: it was deleted, moved or replaced"):
        directory.flush()
    if how != "replaced":
        with pytest.raises(RunFailed, match="is gone"):
            write_summary(path, Summary(status="completed"))
        if how != "emptied":
            with pytest.raises(FileNotFoundError):
                checkpoint.write(path, {"iteration": 1}, {}, parse_config({}), keep=1)
    directory.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_the_disk_has_no_room_for_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; it was left half under its temporary name."""
    write_json(tmp_path / "plan.json", {"jobs": 1})
    former, (soft, hard) = (tmp_path / "plan.json").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_json(tmp_path / "plan.json", {"jobs": 2})
        with pytest.raises(OSError, match="File too large"):
            Launch(overrides=("a=1",)).write(tmp_path)
        with pytest.raises(ConfigError, match="File too large"):
            write_secret(tmp_path / "secret", new_secret())
        with pytest.raises(OSError, match="File too large"):
            checkpoint.write(tmp_path, {"iteration": 1}, {}, parse_config({}), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "plan.json").read_bytes() == former
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / "plan.json"]


OWN_MOUNTS = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
"""Runs a command that may mount file systems, which nobody else sees."""


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*OWN_MOUNTS, "mount -t tmpfs none /mnt"], capture_output=True).returncode != 0,
    reason="there are no namespaces of users, or no file system can be mounted in one",
)
def test_counters_on_a_full_disk_are_an_error_and_no_death(tmp_path: Path) -> None:
    """The server was killed by SIGBUS at its first update, and so was each of its replacements."""
    begin = f"RunCounters(pathlib.Path({str(tmp_path)!r})).begin(0, 0.0)"
    script = f"import pathlib; from ormo_rpc.storage.counters import RunCounters; {begin}"
    disk = f"mount -t tmpfs -o size=16k none {tmp_path} && head -c 16384 /dev/zero > {tmp_path}/full"
    command = [*OWN_MOUNTS, f'{disk} && exec "$0" -c "$1"', sys.executable, script]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (1, "OSError: [Errno 28] No space left on device")


def test_one_of_two_processes_that_claim_a_directory_at_once_gets_it(tmp_path: Path) -> None:
    together = threading.Barrier(2)

    def claim(path: Path) -> bool:
        together.wait(PATIENCE_SECONDS)
        try:
            RunDirectory.claim(path)
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(2) as both:
        for number in range(50):
            assert sorted(both.map(claim, [tmp_path / "runs" / str(number)] * 2)) == [False, True]


def test_nan_and_infinity_are_null_in_every_file(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    row = {"iteration": 3, "loss": math.nan, "rate": math.inf, "eta": -math.inf, "momentum": 0.5, "reason": None}
    directory.write_event(Event(Kind.apply, 1.5, row))
    directory.write_metrics(row)
    directory.close()
    best = {"metric": "test_psnr", "value": math.inf, "iteration": 3, "path": ""}
    write_summary(tmp_path, Summary(train_loss=math.nan, updates_per_second=math.inf, delay_mean=0.5, best=best))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    trace, metrics, summary = (
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
        for name in ("trace.jsonl", "metrics.jsonl", "summary.json")
    )
    expected = {**row, "loss": None, "rate": None, "eta": None}
    assert trace == {"event": "apply", "seconds": 1.5, **expected}
    assert metrics == expected
    assert (summary["train_loss"], summary["updates_per_second"], summary["delay_mean"]) == (None, None, 0.5)
    assert summary["best"] == {**best, "value": None}


def test_truncated_files_report_their_new_lengths(tmp_path: Path) -> None:
    """Otherwise a second crash would truncate a file to a length beyond its end, that is, fill it up with zeros."""
    first = RunDirectory(tmp_path)
    for iteration in range(10):
        first.write_metrics({"iteration": iteration})
    first.close()
    second = RunDirectory(tmp_path)
    half = (tmp_path / "metrics.jsonl").stat().st_size // 2
    second.truncate(0, half)
    assert second.sync() == (0, half)
    second.close()


def test_evictions_are_read_under_their_former_name_too(tmp_path: Path) -> None:
    (tmp_path / "losses.jsonl").write_text('{"worker": 1}\n')
    directory = RunDirectory(tmp_path)
    assert directory.read_evictions() == [{"worker": 1}]
    directory.write_evictions([{"worker": 2}, {"worker": 0}])
    assert (tmp_path / "evictions.jsonl").read_text() == '{"worker": 2}\n{"worker": 0}\n'
    with (tmp_path / "evictions.jsonl").open("a") as torn:
        torn.write('{"worker": 3, "rea')
    assert directory.read_evictions() == [{"worker": 1}, {"worker": 2}, {"worker": 0}]
    directory.close()


def test_counters_survive_the_process_and_count_what_a_new_one_does_not_have(tmp_path: Path) -> None:
    first = RunCounters(tmp_path)
    first.begin(0, time.monotonic())
    first.set_iterations(25, 4.0)
    second = RunCounters(tmp_path)
    assert (second.iterations, second.incarnations, second.rolled_back) == (25, 1, 0)
    second.begin(20, time.monotonic())
    third = RunCounters(tmp_path)
    assert (third.iterations, third.incarnations, third.rolled_back) == (20, 2, 5)
    third.set_start_seconds(2.5)
    fourth = RunCounters(tmp_path)
    fourth.set_start_seconds(9.0)  # the first ticket was handed out before
    assert (RunCounters(tmp_path).start_seconds, RunCounters.incarnations_of(tmp_path)) == (2.5, 2)


def test_the_time_of_the_last_gradient_is_that_of_the_process_that_applied_it(tmp_path: Path) -> None:
    began = time.monotonic() - 100
    first = RunCounters(tmp_path)
    first.begin(0, began)
    assert first.updated_seconds == pytest.approx(100, abs=5), "no gradient: since the process began"
    first.set_iterations(25, 40.0)
    recovered = RunCounters(tmp_path)
    recovered.begin(25, began)
    assert (recovered.updated_seconds, RunCounters(tmp_path).updated_seconds) == (40.0, 40.0)
    undone = RunCounters(tmp_path)
    undone.begin(24, began)
    assert undone.updated_seconds == pytest.approx(100, abs=5)


def test_a_run_that_is_started_again_began_with_its_first_start(tmp_path: Path) -> None:
    now = time.monotonic()
    assert RunCounters.began(tmp_path, now) == now, "there is no file"
    RunCounters(tmp_path)
    assert RunCounters.began(tmp_path, now) == now, "no server has begun"
    RunCounters(tmp_path).begin(0, now - 30)
    assert RunCounters.began(tmp_path, now) == pytest.approx(now - 30, abs=1)
    RunCounters(tmp_path).begin(5, now)
    assert RunCounters.began(tmp_path, now) == pytest.approx(now - 30, abs=1)
    assert RunCounters.began(tmp_path, now - 60) == now - 60, "the system's clock was set back in between"


def test_the_end_lasts_until_the_other_processes_have_ended(tmp_path: Path) -> None:
    RunDirectory.claim(tmp_path)
    content = write_summary(tmp_path, Summary(status="completed", wall_seconds=5.0, start_seconds=3.0, end_seconds=0.5))
    extended = extend_summary(tmp_path, content, 5.25)
    assert extended == read_summary(tmp_path) == {**content, "wall_seconds": 5.25, "end_seconds": 0.75}
    never_began = extend_summary(tmp_path, Summary(status="interrupted", wall_seconds=5.0).to_dict(), 6.0)
    assert (never_began["wall_seconds"], never_began["end_seconds"]) == (6.0, None)
    shutil.rmtree(tmp_path)
    assert extend_summary(tmp_path, content, 6.0)["end_seconds"] == 1.5  # told, though it cannot be written


def test_every_key_of_the_summary_is_documented_and_none_by_default() -> None:
    assert all(field.metadata["doc"] for field in dataclasses.fields(Summary))
    content = Summary().to_dict()
    assert list(content)[:2] == ["status", "reason"]
    assert set(content.values()) == {None}


def test_the_summary_of_a_run_without_a_server_has_what_the_configuration_determines(tmp_path: Path) -> None:
    config = parse_config({"workers": 3, "seed": 7, "algorithm": {"name": "asgd"}})
    RunDirectory.claim(tmp_path)
    content = write_summary(tmp_path, unfinished_summary(config, "failed", "no port is free", 2.5))
    assert content == read_summary(tmp_path)
    known = {"status": "failed", "reason": "no port is free", "wall_seconds": 2.5, **identity(config)}
    assert {key: value for key, value in content.items() if value is not None} == known
    assert (known["algorithm"], known["num_workers"], known["wire"]) == ("asgd", 3, "exact")


def test_a_summary_of_an_earlier_version_is_read_under_the_present_keys(tmp_path: Path) -> None:
    former = {"status": "completed", "server_lives": 2, "losses": [{"worker": 1}], "of_long_ago": 3}
    (tmp_path / "summary.json").write_text(json.dumps(former))
    content = read_summary(tmp_path) or {}
    assert content == {"status": "completed", "incarnations": 2, "evictions": [{"worker": 1}], "of_long_ago": 3}
    assert Summary.from_dict(content).incarnations == 2


@pytest.mark.parametrize("content", [None, b"", b'{"event": "header"}\n{"event": "sta', b"\xff", b"\0" * 9])
def test_a_damaged_trace_is_refused_with_its_name(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{file}: "):
        read_trace(tmp_path)


def test_a_damaged_summary_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'summary.json'}: cannot be read: "):
        read_summary(tmp_path)


def test_a_torn_row_does_not_count_while_the_run_lasts(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_metrics({"iteration": 1})
    directory.write_metrics({"iteration": 2})
    directory.close()
    assert rows_so_far(tmp_path) == [{"iteration": 1}, {"iteration": 2}]
    os.truncate(tmp_path / "metrics.jsonl", (tmp_path / "metrics.jsonl").stat().st_size - 3)
    assert rows_so_far(tmp_path) == [{"iteration": 1}]


def test_a_directory_is_released_only_where_nothing_has_begun(tmp_path: Path) -> None:
    RunDirectory.claim(tmp_path)
    RunDirectory.release(tmp_path)
    RunDirectory.release(tmp_path)
    RunDirectory.claim(tmp_path)
    (tmp_path / "trace.jsonl").write_text("{}\n")
    RunDirectory.release(tmp_path)
    with pytest.raises(ConfigError, match="the directory of an earlier run"):
        RunDirectory.claim(tmp_path)
