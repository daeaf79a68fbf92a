"""Models and data sets that have changed since a checkpoint or a record was written: refused with what differs."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from ormo_rpc import ConfigError, evaluate, train
from ormo_rpc.config.parsing import parse_config
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.session import Session
from ormo_rpc.runtimes.simulator import InlineExecutor
from ormo_rpc.storage import checkpoint
from tests.support import changing

FIRST, SECOND = "first.weight float32 (3, 3), first.bias float32 (3,)", "second.weight float32 (3, 3), second.bias float32 (3,)"
SWAPPED = f"model: parameters: {{mine}}: {FIRST}, {SECOND}; {{others}}: {SECOND}, {FIRST}"
THIRD = "model: parameters: {mine}: none of them; {others}: third.weight float32 (3, 3), third.bias float32 (3,)"


def crc(first: int) -> int:
    """The checksum of 16 labels, spread evenly from the first to the last one, as 64-bit integers."""
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    labels = [(row.index(max(row)) + first) % 3 for row in inputs.tolist()]
    return zlib.crc32(struct.pack("<16q", *(labels[int(number * 63 / 15)] for number in range(16))))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "layers that changed places": ({"LAYERS": ("second", "first")}, SWAPPED),
    "a further layer": ({"LAYERS": ("first", "second", "third")}, THIRD),
    "a frozen value": ({"FROZEN_VALUE": 1.5}, "model: scale: the values of {mine} and of {others} differ"),
    "more samples": ({"SAMPLES": 72}, "dataset: training samples: {mine}: 64; {others}: 72"),
    "fewer samples in as many batches": ({"SAMPLES": 60}, "dataset: training samples: {mine}: 64; {others}: 60"),
    "other labels": ({"LABELS_FIRST": 1}, f"dataset: checksum of labels: {{mine}}: {crc(0)}; {{others}}: {crc(1)}"),
}


def apply(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in change.items():
        monkeypatch.setattr(changing, name, value)


def session(run_dir: Path, incarnation: int, **options: Any) -> Session:
    """Open the session of a server's process in a run directory, and close its records."""
    config = parse_config({**changing.CONFIG, "runtime": {"name": "rpc"}, "checkpoint": {"journal": True, **options}})
    run_dir.mkdir(exist_ok=True)
    (run_dir / "trace.jsonl").touch()
    made = Session(Job(config), run_dir, InlineExecutor(), InlineExecutor(), lambda: 1.5, began=0.0)
    try:
        made.open(incarnation=incarnation)
    finally:
        made.directory.close()
    return made


def halves(scale: float, folder: str) -> tuple[TensorDataset, TensorDataset]:
    """Two equal sets."""
    half = TensorDataset(scale * torch.ones(8, 3) if folder else torch.empty(0), torch.arange(8) % 2)
    return half, half


halves_again = halves
OWN = f"{__name__}.halves"


def small() -> torch.nn.Module:
    """A linear layer."""
    return torch.nn.Linear(3, 2)


def resuming(source: Path, **more: Any) -> dict[str, Any]:
    return {**changing.CONFIG, "checkpoint": {"resume": str(source)}, **more}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 16 gradients, with a checkpoint of iteration 12."""
    run_dir = tmp_path_factory.mktemp("recorded") / "run"
    train(changing.CONFIG, run_dir=run_dir)
    return run_dir


@pytest.fixture
def middle(recorded: Path) -> Path:
    """That checkpoint."""
    found = checkpoint.complete(recorded)[0]
    assert checkpoint.iteration_of(found) == 12
    return found


# -- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("loaded", [False, True], ids=["before the start", "when it is loaded"])
def test_a_checkpoint_of_another_model_or_data_set_is_refused(
    what: str, loaded: bool, middle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, difference = CHANGES[what]
    apply(change, monkeypatch)
    again = tmp_path / "again"
    with pytest.raises(ConfigError) as caught:
        _ = session(again, 0, resume=str(middle)) if loaded else train(resuming(middle), run_dir=again)
    said = difference.format(mine="the checkpoint", others="this run")
    assert str(caught.value) == f"checkpoint.resume: {said}; resume with model and data as they were in {middle}"
    assert loaded == again.exists()


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (
            {"_target_": f"{OWN}_again"},
            f"dataset._target_: got {OWN}_again, expected {OWN}",
        ),
        ({"scale": 100.0}, "dataset.scale: got 100.0, expected 1.0"),
        ({"collate": "pad"}, "dataset.collate: got pad, expected default"),
        ({"folder": "elsewhere"}, ""),
    ],
)
def test_data_of_ones_own_that_other_keys_make_are_refused(dataset: dict[str, Any], said: str, tmp_path: Path) -> None:
    own = {"_target_": f"{__name__}.halves", "scale": 1.0, "folder": "here"}
    options: dict[str, Any] = {"runtime": "sim", "logger": "none", "workers": 2, "model": {"_target_": f"{__name__}.small"}}
    train({**options, "dataset": own, "train": {"max_iterations": 4}}, run_dir=tmp_path / "first")
    more = {"checkpoint": {"resume": str(tmp_path / "first")}, "train": {"max_iterations": 8}}
    again = {**options, **more, "dataset": {**own, **dataset}}
    if said:
        with pytest.raises(ConfigError, match=re.escape(f"checkpoint.resume: {said}, as ")):
            train(again, run_dir=tmp_path / "again")
    else:
        assert train(again, run_dir=tmp_path / "again")["iterations"] == 8


def test_an_unchanged_model_ends_with_the_bits_of_the_uninterrupted_run(recorded: Path, middle: Path, tmp_path: Path) -> None:
    resumed = train(resuming(middle), run_dir=tmp_path / "again")
    whole = json.loads((recorded / "summary.json").read_text())
    for key in ("final_params_sha256", "final_buffers_sha256", "iterations"):
        assert resumed[key] == whole[key]


def test_a_checkpoint_of_an_earlier_format_is_refused_with_a_line(middle: Path, tmp_path: Path) -> None:
    manifest = middle / "manifest.json"
    content = manifest.read_text()
    old = {key: value for key, value in json.loads(content).items() if key != "fingerprint"}
    manifest.write_text(json.dumps({**old, "format": 2}))
    try:
        with pytest.raises(ConfigError) as caught:
            train(resuming(middle), run_dir=tmp_path / "again")
    finally:
        manifest.write_text(content)
    text = f"{middle}: format: got 2, expected 3; another version of ormo_rpc wrote it; take another checkpoint"
    assert str(caught.value) == text


def test_a_run_directory_with_earlier_formats_only_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "iteration_000000004"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(ConfigError, match=r"without an intact checkpoint, .*; .*: format: got 2, expected 3; another version"):
        checkpoint.locate(tmp_path)


# -- the length of a run -------------------------------------------------------------------------------------------------

QUADRATIC: dict[str, Any] = {"runtime": {"name": "sim", "gradient": "quadratic", "dimension": 4}, "logger": {"name": "none"}}


@pytest.mark.parametrize("runtime", ["sim", "rpc"])
@pytest.mark.parametrize("shorter", [{"epochs": 1}, {"max_iterations": 5}], ids=str)
def test_a_run_that_is_to_be_shorter_than_its_checkpoint_is_refused(
    runtime: str, shorter: dict[str, Any], middle: Path, tmp_path: Path
) -> None:
    config = resuming(middle, runtime={"name": runtime}, train={**changing.TRAIN, **shorter})
    with pytest.raises(ConfigError) as caught:
        train(config, run_dir=tmp_path / "again")
    end = shorter.get("max_iterations", 8)  # an epoch has 64 samples in batches of 8
    text = f"checkpoint.resume: got iteration 12, and the run ends at {end}; raise train.epochs (or train.max_iterations)"
    assert str(caught.value) == text
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("gradient", ["quadratic", "noise"])
def test_a_synthetic_run_that_is_to_be_shorter_is_refused(gradient: str, tmp_path: Path) -> None:
    base = {**QUADRATIC, "runtime": {**QUADRATIC["runtime"], "gradient": gradient}}
    train({**base, "train": {"max_iterations": 12}}, run_dir=tmp_path / "run")
    more = {"checkpoint": {"resume": str(tmp_path / "run")}}
    with pytest.raises(ConfigError, match=r"^checkpoint\.resume: got iteration 12, and the run ends at 9; raise train\.epochs"):
        train({**base, **more, "train": {"max_iterations": 9}}, run_dir=tmp_path / "again")
    longer = {**base, **more, "train": {"max_iterations": 20}}
    with pytest.raises(
        ConfigError, match=r"^checkpoint\.resume: model: parameters: .*: x float32 \(4,\); this run: x float32 "
    ):
        train({**longer, "runtime": {**base["runtime"], "dimension": 5}}, run_dir=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_replay_does_not_resume(recorded: Path, middle: Path, tmp_path: Path) -> None:
    overrides = ["runtime=replay", f"replay.run={recorded}", f"checkpoint.resume={middle}"]
    with pytest.raises(ConfigError) as caught:
        train(overrides, run_dir=tmp_path / "again")
    text = f"checkpoint.resume: got {middle} with runtime=replay, expected None: a replay begins as its run did"
    assert str(caught.value) == text


# -- replay --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", CHANGES)
def test_a_replay_of_another_model_or_data_set_is_refused(
    what: str, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, difference = CHANGES[what]
    apply(change, monkeypatch)
    with pytest.raises(ConfigError) as caught:
        train(["runtime=replay", f"replay.run={recorded}"], run_dir=tmp_path / "again")
    said = difference.format(mine="the recorded run", others="this replay")
    assert str(caught.value) == f"replay.run: {said}; replay with model and data as they were in {recorded}"


def test_an_unchanged_run_is_replayed(recorded: Path, tmp_path: Path) -> None:
    assert train(["runtime=replay", f"replay.run={recorded}"], run_dir=tmp_path / "again")["identical"] is True


# -- evaluation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [("first", "third"), ("first",)], ids=str)
def test_evaluating_another_model_ends_with_both_lists(
    layers: tuple[str, ...],
    middle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(changing, "LAYERS", layers)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(middle)])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2
    now = "third.weight float32 (3, 3), third.bias float32 (3,)" if "third" in layers else "none of them"
    said = f"{middle}: model: parameters: the checkpoint: {SECOND}; now: {now}; evaluate it with the model that was trained"
    assert capsys.readouterr().err == f"evaluate: {said}\n"


def test_a_model_whose_layers_changed_places_is_evaluated_by_name(middle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, before = evaluate.evaluate_checkpoint(middle)
    monkeypatch.setattr(changing, "LAYERS", ("second", "first"))
    assert evaluate.evaluate_checkpoint(middle)[1] == before


# -- a restarted server ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", CHANGES)
def test_a_restarted_server_refuses_a_journal_of_another_model(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = session(tmp_path / "run", 0)
    assert isinstance(first.job, Job)
    worker = first.job.worker()
    (reply, _) = first.server.start([0, 1])
    first.journal.start([0, 1], 0)
    push = worker.compute(reply)
    first.server.receive(push)
    first.journal.push(push, rejected=False)
    first.journal.close()
    second = session(tmp_path / "run", 1)
    second.journal.close()
    assert second.server.iteration == 1  # unchanged, it goes on
    change, difference = CHANGES[what]
    apply(change, monkeypatch)
    with pytest.raises(ConfigError) as caught:
        session(tmp_path / "run", 2)
    said = difference.format(mine="the run as it began", others="the restarted server")
    assert str(caught.value) == f"{tmp_path / 'run'}: {said}; do not change model and data while a run lasts"


# -- models that differ each time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["sim", "rpc"])
@pytest.mark.parametrize("buffer", [False, True], ids=["frozen", "buffer"])
def test_values_that_nothing_seeds_are_refused_with_their_name(runtime: str, buffer: bool, tmp_path: Path) -> None:
    model = {"_target_": f"{changing.HERE}.fresh_entropy", "buffer": buffer}
    with pytest.raises(ConfigError) as caught:
        train({**changing.CONFIG, "runtime": {"name": runtime}, "model": model}, run_dir=tmp_path / "run")
    pattern = (
        r"model: backbone\.weight: the values of the first model and of the second differ, although .*; draw from torch, .*"
    )
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_second_construction_of_a_job_must_be_that_of_the_first() -> None:
    """The evaluator has the model that the server read, and the exporter another one, whatever builds them."""
    model = {"_target_": f"{changing.HERE}.fresh_entropy"}
    job = Job(dataclasses.replace(parse_config({**changing.CONFIG, "model": model})))
    job.server(lambda _: None, lambda: 0.0)
    job.evaluator()
    with pytest.raises(ValueError, match=r"^model: backbone\.weight: the values of the first model and of the second differ"):
        job.exporter()


def test_two_processes_with_other_labels_have_other_fingerprints() -> None:
    """The function draws them anew, so that a worker would train on others than the server evaluates."""
    config = {**changing.CONFIG, "dataset": {"_target_": f"{changing.HERE}.unseeded_data"}}
    first, second = (Job(parse_config(config)).fingerprint() for _ in range(2))
    said = first.difference(second, "the server", "this worker", buffer_values=False)
    assert re.fullmatch(r"dataset: checksum of labels: the server: \d+; this worker: \d+", said or ""), said


def test_frozen_values_of_seeded_sources_are_those_that_are_evaluated(tmp_path: Path) -> None:
    """The accuracy of the summary is that of the checkpoint, which any later process evaluates."""
    config = {**changing.CONFIG, "model": {"_target_": f"{changing.HERE}.seeded_sources"}}
    summary = train(config, run_dir=tmp_path / "run")
    found, again = evaluate.evaluate_checkpoint(tmp_path / "run")
    assert again.test["accuracy"] == summary["test_accuracy"]
    assert again.test["loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    state = torch.load(found / "model.pt", weights_only=True)
    fresh = Job(parse_config(config)).model().module.state_dict()
    assert torch.equal(state["backbone.weight"], fresh["backbone.weight"])
