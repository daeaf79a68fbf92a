"""The tuning of the race, its store and its plan."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.race import __main__ as command
from experiments.race.contenders import CONTENDERS, Unit, variants_of
from experiments.race.earlier import earlier_rows, version
from experiments.race.figures import Row, time_to
from experiments.race.runs import QUIET, Missing, Record, Store
from experiments.race.setup import CELLS, DEFAULT_MOMENTUM, SETTINGS, Race, Setup
from experiments.race.tuning import Tried, Tuned, tune
from experiments.race.units import CHOICE, collected, content, lacking, outcome, planned_runs, units
from experiments.race.versions import run_version
from ormo_rpc.algorithms.ormo_la import OrMoLA
from ormo_rpc.composing import compose
from ormo_rpc.errors import ConfigError
from ormo_rpc.schedulers.partial import Partial
from tests.support.race import DIGITS, SMALL, made


def test_a_target_is_reached_by_the_mean_of_evaluations_in_a_row() -> None:
    found = Record(
        status="completed",
        iterations=[1, 2, 3, 4],
        seconds=[1.0, 2.0, 3.0, 4.0],
        accuracy=[0.86, 0.89, 0.85, 0.875],
        cpu_seconds=0.0,
    )
    # Means of three: 0.8667 at 3 s, 0.8717 at 4 s; a single one has 0.87 at 2 s.
    assert [found.time_to(0.87, smooth) for smooth in (1, 3)] == [2.0, 4.0]
    assert found.time_to(0.88, 3) is None
    assert dataclasses.replace(found, status="diverged").time_to(0.87, 1) is None
    assert found.last(2) == pytest.approx(0.8625)
    assert time_to({"status": "completed", "seconds": found.seconds, "accuracy": [8600, 8900, 8500, 8750]}, 0.87, 3) == 4.0


def test_a_rate_beyond_the_edge_is_tried_while_the_best_is_there() -> None:
    setup = dataclasses.replace(SMALL, rates={4: (0.04, 0.02, 0.08)}, beyond=3, tuning_target=0.87, smooth=1)
    tuned = tune(lambda rate, _seed, _limit: made(abs(math.log2(rate / 0.16)) + 1), setup, 4)
    assert sorted(tuned.tried) == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32])
    assert tuned.best == pytest.approx(0.16)


def test_without_a_time_the_last_accuracy_chooses() -> None:
    setup = dataclasses.replace(SMALL, rates={4: (0.04, 0.02, 0.08)}, tuning_target=0.87, smooth=1)
    assert tune(lambda rate, _seed, _limit: made(accuracy=0.8 - abs(rate - 0.04)), setup, 4).best == 0.04


@given(
    st.lists(
        st.tuples(st.one_of(st.none(), st.integers(1, 9)), st.one_of(st.none(), st.integers(1, 9))), min_size=1, max_size=5
    )
)
def test_cutting_off_what_cannot_win_changes_no_choice(times: list[tuple[int | None, int | None]]) -> None:
    setup = dataclasses.replace(
        SMALL, rates={4: tuple(map(float, range(len(times))))}, beyond=0, tuning_target=0.87, smooth=1, tuning_seeds=(0, 1)
    )

    def run(rate: float, seed: int, limit: float) -> Record:
        time = times[int(rate)][seed]
        return made(None if time is None or time > limit else time)

    whole = Tuned({float(n): Tried([*map(_float, each)], [0.5], cut=False) for n, each in enumerate(times)})
    found = tune(run, setup, 4)
    assert found.rank[0] == whole.rank[0]
    assert math.isinf(whole.rank[0]) or found.best == whole.best


def _float(value: int | None) -> float | None:
    return None if value is None else float(value)


def test_a_changed_rule_is_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("experiments.race.runs.simulate", lambda *_: made(1.0))
    store, overrides = Store(tmp_path, "data"), ("algorithm=ormo", "workers=4")
    assert store.run(overrides, "test") == store.run(overrides, "test")
    assert store.made == 1
    with pytest.raises(Missing):
        Store(tmp_path, None).run(overrides, "validation")
    monkeypatch.setattr("experiments.race.runs.run_version", lambda _overrides: "changed")
    store.run(overrides, "test")
    assert store.made == 2


@pytest.mark.slow
def test_a_unit_is_tuned_run_and_reported_and_not_run_again(tmp_path: Path) -> None:
    store, unit = Store(tmp_path, "data"), Unit("one_slow", 4, "ddp")
    row = outcome(unit, SMALL, store)
    assert store.made == 2 + 3  # two rates, three seeds
    assert {run["seed"] for run in row["runs"]} == {0, 1, 2}
    rows = collected([unit, Unit("one_slow", 4, "ormo")], SMALL, Store(tmp_path, None), {})
    assert rows == {unit: row}
    # A fourth seed that was run is reported as well.
    outcome(unit, dataclasses.replace(SMALL, seeds=(0, 1, 2, 3)), store)
    assert [run["seed"] for run in collected([unit], SMALL, Store(tmp_path, None), {})[unit]["runs"]] == [0, 1, 2, 3]
    store.made -= 1
    # Another setting has the same updates: nothing is run.
    outcome(Unit("exponential", 4, "ddp"), SMALL, store)
    outcome(Unit("one_slow", 4, "ddp_proportional"), SMALL, store)
    assert store.made == 5


def test_a_contender_with_the_updates_of_another_takes_its_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("experiments.race.runs.simulate", lambda *_: made(1.0, 2.0))
    unit, model = (Unit("one_slow", 4, name) for name in ("ddp_proportional_nesterov", "ddp_nesterov"))
    store = Store(tmp_path, "data")
    row = outcome(model, SMALL, store)
    other = next(rate for rate in SMALL.rates[4] if rate != row["rate"])  # the best one of another machine
    found = outcome(unit, SMALL, store, model={**row, "rate": other})
    assert (found["rate"], [*found["tuning"][""]]) == (other, [f"{other:g}"])
    assert found["validation_time"] < row["validation_time"], "at its own times"
    assert collected([unit], SMALL, store, {model: {**row, "rate": other}})[unit]["rate"] == other
    assert outcome(unit, SMALL, store)["rate"] == row["rate"], "tuned where the other is not"
    # Where speeds do not last it is the other one: nothing is run.
    alike, model = (dataclasses.replace(each, setting="exponential") for each in (unit, model))
    row = {**outcome(model, SMALL, store), "rate": other}
    assert outcome(alike, SMALL, Store(tmp_path / "none", None), model=row) == {**row, "contender": alike.contender}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Results of another machine, whose folder of runs is not here."""
    there = dataclasses.replace(made(1.0, 2.0), machine="there")
    monkeypatch.setattr("experiments.race.runs.simulate", lambda *_: there)
    chosen = [Unit("one_slow", 4, name) for name in ("ormo", "local_sgd")]
    for unit in chosen:
        outcome(unit, SMALL, Store(tmp_path / "there", "data"))
    return written(content(chosen, SMALL, Store(tmp_path / "there", None), {}))


def written(found: dict[str, Any]) -> dict[str, Any]:
    """Results as they are read again."""
    return json.loads(json.dumps(found))


def counted(results: dict[str, Any], setup: Setup = SMALL, **options: Any) -> dict[Unit, Row]:
    """The rows of results that count."""
    return earlier_rows(Path("race.json"), results, setup, **options)


def test_a_race_goes_on_from_the_results_of_another_machine(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    earlier, store = counted(results), Store(tmp_path / "here", "data")
    assert written(content([*earlier], SMALL, Store(tmp_path / "here", None), earlier)) == results
    ormo = next(unit for unit in earlier if unit.contender == "ormo")
    more = dataclasses.replace(SMALL, seeds=(0, 1, 2, 3))
    assert planned_runs(ormo, more, earlier[ormo]) == {("one_slow", 4, ("algorithm=ormo",), 4, "test", 3)}
    # A fourth seed is run, with the rate that was chosen there.
    here = dataclasses.replace(made(1.0, 2.0), machine="here")
    monkeypatch.setattr("experiments.race.runs.simulate", lambda *_: here)
    found = outcome(ormo, more, store, earlier[ormo])
    assert store.made == 1
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2, 3]
    assert found["machines"] == ["here", "there"]
    assert {key: found[key] for key in CHOICE} == {key: earlier[ormo][key] for key in CHOICE}
    # Results grow by what the folder of runs has, and lose nothing where it has less, whatever number of seeds is asked for.
    for seeds in ((0,), (0, 1, 2, 3, 4, 5)):
        setup = dataclasses.replace(SMALL, seeds=seeds)
        grown = collected([*earlier], setup, Store(tmp_path / "here", None), earlier)
        assert [len(row["runs"]) for row in grown.values()] == [4, 3]
    assert lacking(earlier[ormo], more) == {3}


@pytest.mark.parametrize(
    "other",
    [{"epochs": 3}, {"job": (*SMALL.job, "model.bias=false")}, {"tuning_seeds": (8,)}, {"rates": {4: (0.1,)}}],
    ids=lambda other: str(*other),
)
def test_results_of_another_job_are_refused_or_replaced(results: dict[str, Any], other: dict[str, Any]) -> None:
    setup = dataclasses.replace(SMALL, **other)
    with pytest.raises(
        ConfigError, match=rf"race\.json: got 2 of 2 rows with other {next(iter(other))}, such as one_slow, K = 4"
    ):
        counted(results, setup)
    assert counted(results, setup, replace=True) == {}
    # What is reported alone does not matter.
    assert len(counted(results, dataclasses.replace(SMALL, seeds=(0, 9), target=0.1, targets=(0.1,)))) == 2


def test_rows_count_only_with_their_rule_variants_times_and_held_out_samples(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(**options: Any) -> list[str]:
        return [unit.contender for unit in counted(results, replace=True, **options)]

    assert kept() == ["ormo", "local_sgd"]
    assert kept(most=100) == []
    for key, gone in (("contender", "gone"), ("setting", "gone"), ("version", None)):
        odd = {**results, "rows": [{**results["rows"][0], key: gone}, results["rows"][1]]}
        assert [unit.contender for unit in counted(odd, replace=True)] == ["local_sgd"]
        with pytest.raises(ConfigError, match="got 1 of 2 rows"):
            counted(odd)
    changes: list[tuple[str, Any, list[str]]] = [
        ("run_version", lambda rule: "new" if "algorithm=ormo" in rule else run_version(rule), ["local_sgd"]),
        ("round_ends", lambda *_, **__: [1.0], ["ormo"]),
        ("draws", lambda *_: lambda _worker: 0.5, ["local_sgd"]),
        ("code_of", lambda _module: "new", []),
    ]
    for name, change, expected in changes:
        with monkeypatch.context() as patched:
            patched.setattr(f"experiments.race.earlier.{name}", change)
            assert kept() == expected, name
    with pytest.raises(
        ConfigError, match=r"got 1 of 2 rows of rules, variants or times that have changed since, such as .* ormo, "
    ):
        counted({**results, "rows": [{**results["rows"][0], "version": "old"}, results["rows"][1]]})
    # The same rule with other clocks is another contender.
    for setting, one, other in (("one_slow", "ddp", "ddp_proportional"), ("gamma", "m_sync", "m_sync_cancel")):
        assert version(Unit(setting, 4, one), SMALL) != version(Unit(setting, 4, other), SMALL)


def test_a_subset_of_the_race_loses_nothing_of_its_results(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del results  # for its simulation alone
    monkeypatch.setattr(command, "RACE", Race(name="race", setup=SMALL, cells=(("one_slow", 4),)))
    for number, contender in enumerate(("ormo", "local_sgd")):
        words = ["--contenders", contender, "--store", str(tmp_path / str(number)), "--into", str(tmp_path), "--seeds", "1"]
        monkeypatch.setattr("sys.argv", ["race", *words])
        command.main()
    found = json.loads((tmp_path / "race.json").read_text())
    assert [row["contender"] for row in found["rows"]] == ["ormo", "local_sgd"]
    assert "one_slow" in (tmp_path / "race.md").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_record_of_which_a_crash_has_left_a_part_is_made_again(tmp_path: Path) -> None:
    overrides = (*DIGITS, "workers=4", "train.max_iterations=2")
    store = Store(tmp_path / "store", str(tmp_path))
    expected = store.run(overrides, "test")
    (file,) = store.folder.iterdir()
    for left in ("", file.read_text()[:-20], "{}"):
        file.write_text(left)
        with pytest.raises(Missing):
            Store(store.folder, None).run(overrides, "test")
    assert store.run(overrides, "test").accuracy == expected.accuracy
    assert store.made == 2


def test_processes_write_files_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written, replace = list[str](), Path.replace

    def noted(self: Path, target: Path) -> Path:
        written.append(self.name)
        return replace(self, target)

    monkeypatch.setattr("experiments.race.runs.simulate", lambda *_: made(1.0))
    monkeypatch.setattr(Path, "replace", noted)
    Store(tmp_path, str(tmp_path)).run(DIGITS, "test")  # forked ones may have the same objects at the same addresses
    assert written[0].endswith(f".{os.getpid()}")


@pytest.mark.parametrize("words", [["--seeds", "0"], ["--processes", "-1"]])
def test_numbers_that_are_none_are_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["race", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert f"argument {words[0]}: got {words[1]}, expected a whole number >= 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "--report: "), ("{", "Expecting"), ("[1]", "got results without momenta, "), ("{}", "got results without ")],
)
def test_a_report_without_results_is_one_clear_line(
    content: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "race.json").write_text(content)
    monkeypatch.setattr("sys.argv", ["race", "--report", "--into", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("experiments.race: ")
    assert str(tmp_path / "race.json") in line
    assert expected in line


def test_a_race_without_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.root: FashionMNIST is not in"):
        Store(tmp_path / "store", str(tmp_path)).run((*SMALL.job[1:], "dataset=fashion_mnist"), "test")


def test_every_cell_has_every_contender() -> None:
    assert {(setting, workers) for setting in SETTINGS for workers in (4, 16, 64)} == set(CELLS)
    assert len(CELLS) == len(set(CELLS))
    found = [unit.contender for unit in units([("none", 4), ("gamma", 4)], ["ormo_da", "ormo", "ddp"])]
    assert found == ["ddp", "ormo", "ddp", "ormo", "ormo_da", "ormo_da"]


def test_workers_that_are_answered_together_are_all_but_one_half_or_a_quarter() -> None:
    found = {workers: variants_of("ormo_la_partial", workers, [0.9]) for workers in (4, 16)}
    assert {workers: [each.name for each in variants] for workers, variants in found.items()} == {
        4: ["k = 3", "k = 2", "k = 1"],
        16: ["k = 15", "k = 8", "k = 4"],
    }
    for variant in found[16]:
        config = compose((*QUIET, *variant.overrides))
        assert (config.algorithm, config.scheduler) == (OrMoLA(), Partial(k=int(variant.name.removeprefix("k = "))))
        assert (variant.members, variant.divisor, variant.clock) == (16, 16, None)


def test_each_momentum_makes_a_variant_and_the_default_one_has_the_runs_of_the_race() -> None:
    one = CONTENDERS["m_sync_nesterov"].variants(4)
    assert [each.name for each in variants_of("m_sync_nesterov", 4, (0.9,))] == [each.name for each in one]
    found = variants_of("m_sync_nesterov", 4, (0.9, 0.95))
    assert [each.name for each in found[:3]] == ["m = 3, momentum 0.9", "m = 3, momentum 0.95", "m = 2, momentum 0.9"]
    assert [each.overrides[len(one[0].overrides) :] for each in found[:2]] == [(), ("train.momentum=0.95",)]
    assert compose(found[0].overrides).train.momentum == DEFAULT_MOMENTUM
    assert compose(found[1].overrides).train.momentum == 0.95


def test_runs_that_settings_have_in_common_are_planned_once() -> None:
    ddp, alike, ormo = (
        planned_runs(Unit(*each), SMALL, None) for each in (("none", 4, "ddp"), ("gamma", 4, "ddp"), ("none", 4, "ormo"))
    )
    # Two rates with one tuning seed, and three reported seeds.
    assert [len(each) for each in (ddp, ddp | alike, ddp | ormo)] == [5, 8, 10]
