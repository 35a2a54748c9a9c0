"""A population on real Ray, its trials being stubs; and what is drawn, clamped and noted, without Ray."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from helpers import Quiet
from ray import tune

from orchestration.common.hashing import digest
from orchestration.search import pbt as population
from orchestration.search.pbt import Population, draws, history, take_note, within
from orchestration.search.pbt_trial import MEMBER, Member, Relay, origin_of, read_member_checkpoint
from orchestration.search.runner import run_search
from orchestration.search.spec import Search
from orchestration.state.trial_log import TrialLog, TrialRecord
from trainers import storage
from trainers.config.jobs import TrainJob

SPACE: dict[str, Any] = {"x": optuna.distributions.FloatDistribution(0.1, 1.0, log=True)}
EPOCHS = 6


def stub(config: dict[str, float], *, runs: str, known: Any, slots: int) -> None:
    """A run that gains its value in each epoch, from the second on at the final sparsity.

    It waits at first for the others that can run beside it.
    """
    begun_by = Path(runs) / "begun"
    begun_by.mkdir(exist_ok=True, parents=True)
    (begun_by / tune.get_context().get_trial_id()).touch()
    while len(list(begun_by.iterdir())) < slots:
        time.sleep(0.1)
    given = tune.get_checkpoint()
    saved = None if given is None else read_member_checkpoint(given)
    member = Member.at_start(tune.get_context().get_trial_id(), config, runs, saved, known)
    run_folder = Path(runs) / member.run
    begun = Path(member.origin) if member.origin and not run_folder.exists() else newest(run_folder)
    done = json.loads((begun / "state").read_text()) if begun.exists() else {"epoch": 0, "sum": 0.0}
    for epoch in range(done["epoch"] + 1, EPOCHS + 1):
        time.sleep(0.3)
        done = {"epoch": epoch, "sum": done["sum"] + config["x"]}
        checkpoint = run_folder / f"checkpoint_{epoch}"  # one each: what another goes on from must not change
        checkpoint.mkdir(parents=True)
        (checkpoint / "state").write_text(json.dumps(done))
        at_end = epoch > 1
        figures = {"score": done["sum"] if at_end else -1.0, "recovery_epochs": epoch - 1, "epoch": epoch}
        kept = {"kept": {"0.5": {"score": done["sum"]}}, "kept_at": f"{run_folder}/kept", "step": epoch}
        content = {"checkpoint": str(checkpoint), "epoch": epoch, "member": member.as_dict()}
        report = {**figures, **kept, MEMBER: member.as_dict()}
        with TemporaryDirectory() as folder:
            (Path(folder) / "member.json").write_text(json.dumps(content))
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def newest(run: Path) -> Path:
    """The newest checkpoint of a stub's run."""
    return max(
        run.glob("checkpoint_*"),
        key=lambda checkpoint: int(checkpoint.name.split("_")[1]),
        default=run / "none",
    )


def searched(folder: Path, *, trials: int, slots: int, **changes: Any) -> tuple[TrialLog, Search]:
    runs = f"{folder}/train"
    log = TrialLog(f"{folder}/trials.json")
    known = {digest(member["values"]): member for member in log.members}
    scheduler = partial(
        Population, SPACE, runs, every=1, share=0.5, epochs=EPOCHS, slots=slots, seed=len(log.trials)
    )
    trial = tune.with_parameters(stub, runs=runs, known=known, slots=slots)
    search = Search(
        name="population",
        trainable=tune.with_resources(trial, {"memory": 1 << 20}),
        space=SPACE,
        trials=trials,
        concurrent=slots,
        storage=f"{folder}/tune",
        seed=0,
        first=[{"x": 0.1}],
        scheduler=scheduler,
        complete=lambda metrics: metrics["epoch"] >= EPOCHS,
        **changes,
    )
    return log, search


@pytest.mark.cluster
@pytest.mark.parametrize(("trials", "slots"), [(3, 3), (2, 1)])
def test_pbt__the_worse_go_on_from_the_better(
    trials: int, slots: int, tune_here: None, tmp_path: Path
) -> None:
    """All at once, or by turns on one place."""
    log, search = searched(tmp_path, trials=trials, slots=slots)
    run_search(search, log, Quiet())
    assert [record.state for record in log.trials] == ["finished"] * trials
    assert sorted(record.number for record in log.trials) == list(range(trials))
    assert log.running == []
    worst = next(record for record in log.trials if record.number == 0)  # it began with the least
    assert worst.metrics["pbt.exploits"] >= 1
    first = worst.metrics["pbt.taken"][0]
    assert first["trial"] in range(1, trials)
    assert first["values"]["x"] > 0.1
    assert worst.score is not None
    assert worst.score > 0.1 * EPOCHS  # as it would have come to by itself
    lived = {one.name for one in (tmp_path / "train").iterdir()} - {"begun", "origins"}
    ended = {Path(str(record.checkpoint)).parent.parent.name for record in log.trials}
    assert lived == ended, "runs that were given up are removed"
    for record in log.trials:
        assert 0.1 <= record.values["x"] <= 1.0
        state = json.loads((newest(Path(str(record.checkpoint)).parent.parent) / "state").read_text())
        assert state["epoch"] == EPOCHS
        # each epoch gained what the values were then
        steps = [*record.metrics["pbt.taken"], {"epoch": EPOCHS, "values": record.values}]
        gains = 0.0
        before = 0
        for step in steps:
            gains += step["values"]["x"] * (step["epoch"] - before)
            before = step["epoch"]
        assert record.score == pytest.approx(gains)


@pytest.mark.cluster
def test_pbt__a_population_that_was_broken_off_goes_on(tune_here: None, tmp_path: Path) -> None:
    """By the runs that its trials had, wherever those came from; what has ended stays."""
    log, search = searched(tmp_path, trials=3, slots=3)
    log.add(TrialRecord(0, {"x": 0.5}, "finished", 3.0))
    half = Member("old_00001", {"x": 0.25}, f"{tmp_path}/train", "abc", None, [{"trial": 0, "epoch": 2}])
    log.begin(1, {"x": 0.9}, None)
    log.note(1, half.values, half.as_dict())
    storage.write_json(f"{tmp_path}/train/abc/checkpoint_4/state", {"epoch": 4, "sum": 2.0})
    log, search = searched(tmp_path, trials=3, slots=2)
    run_search(search, log, Quiet())
    assert sorted(record.number for record in log.trials) == [0, 1, 2]
    gone_on = next(record for record in log.trials if record.number == 1)
    assert gone_on.metrics["pbt.taken"][0]["trial"] == 0
    if gone_on.metrics["pbt.exploits"] == 1:
        assert gone_on.score == pytest.approx(2.0 + 2 * 0.25)
        assert str(gone_on.checkpoint) == f"{tmp_path}/train/abc/kept/0.5"


def test_pbt__values_stay_in_the_space() -> None:
    assert within(SPACE, {"x": 1.2}) == {"x": 1.0}
    assert within(SPACE, {"x": 0.08}) == {"x": 0.1}
    assert within(SPACE, {"x": 0.5}) == {"x": 0.5}


def given(generator: Any) -> list[dict[str, Any]]:
    return list(generator._points_to_evaluate)


def test_pbt__what_is_drawn_first(tmp_path: Path) -> None:
    uri = f"{tmp_path}/trials.json"
    undisturbed = given(draws(SPACE, TrialLog(uri), [{"x": 0.2}], 6, 0))
    assert undisturbed[0] == {"x": 0.2}
    assert len({values["x"] for values in undisturbed}) == 6
    assert all(0.1 <= values["x"] <= 1.0 for values in undisturbed)
    log = TrialLog(uri)
    for number, x in enumerate((0.5, 0.6, 0.5, 7.0)):
        log.begin(number, {"x": x}, None)
    again = given(draws(SPACE, TrialLog(uri), [{"x": 0.2}], 4, 0))
    assert again == [{"x": 0.5}, {"x": 0.6}, *undisturbed[4:]]  # a third of 0.5, and 7.0: begun anew
    assert given(draws(SPACE, TrialLog(uri), [], 1, 0)) == [{"x": 0.5}]
    log.add(TrialRecord(0, {"x": 0.5}, "finished", 0.5))
    for number in (1, 2, 3):
        log.add(TrialRecord(number, {"x": 0.6}, "failed", None))
    assert given(draws(SPACE, TrialLog(uri), [{"x": 0.2}], 2, 0)) == undisturbed[4:]


@pytest.mark.parametrize("begun", range(5))
def test_pbt__a_search_broken_off_at_any_moment_draws_what_the_undisturbed_one_draws(
    begun: int, tmp_path: Path
) -> None:
    uri = f"{tmp_path}/trials.json"
    undisturbed = given(draws(SPACE, TrialLog(uri), [{"x": 0.2}], 5, 7))
    log = TrialLog(uri)
    for number, values in enumerate(undisturbed[:begun]):
        log.begin(number, values, None)
    for number in range(begun // 2):
        log.add(TrialRecord(number, undisturbed[number], "finished", 0.5))
    again = given(draws(SPACE, TrialLog(uri), [{"x": 0.2}], 5 - begun // 2, 7))
    assert again == undisturbed[begun // 2 :]
    assert undisturbed != given(draws(SPACE, TrialLog(f"{tmp_path}/other"), [{"x": 0.2}], 5, 8))


def test_pbt__what_a_trial_is_that_starts() -> None:
    values = {"recovery.lr.peak": 1e-3}
    new = Member.at_start("a_1", values, "s3://b/train", None, {})
    assert (new.values, new.origin, new.taken) == (values, None, [])
    assert new.run != Member.at_start("a_1", values, "s3://b/train", None, {}).run
    saved = {"checkpoint": "s3://b/train/r/checkpoint_1", "epoch": 3, "member": new.as_dict()}
    paused = Member.at_start("a_1", values, "s3://b/train", saved, {})
    assert paused == new
    # another trial, even with the same values
    taker = Member.at_start("a_2", values, "s3://b/train", saved, {})
    assert taker.run != new.run
    assert taker.origin == origin_of("s3://b/train", "a_2")
    assert taker.taken == [{"trial": "a_1", "epoch": 3, "values": values}]
    known = {digest(values): taker.as_dict()}
    again = Member.at_start("b_0", values, "s3://b/train", None, known)
    assert (again.run, again.taken, again.trial) == (taker.run, taker.taken, "b_0")


def test_pbt__the_job_of_a_trial() -> None:
    plain = TrainJob.model_validate(
        {
            "name": "n",
            "model": {"architecture": "vit_tiny_patch16_224", "classes": 3},
            "data": {"train": "train.parquet"},
            "training": {"epochs": 4, "checkpoint_every": 5, "checkpoint_minutes": 10.0},
        }
    )
    new = Member("a", {"recovery.lr.peak": 1e-3}, "runs", "r", None, [])
    often = {"checkpoint_every": 1, "checkpoint_minutes": None, "checkpoint_steps": None}
    expected = plain.model_dump() | {"training": plain.training.model_dump() | often, "origin": None}
    assert new.branched(plain).model_dump() == expected
    taker = Member("a", {"recovery.lr.peak": 1e-3}, "runs", "r", "runs/origins/a", [])
    origin = taker.branched(plain).model_dump(mode="json")["origin"]
    assert origin == {"checkpoint": "runs/origins/a", "differs": ["training.lr.peak"]}


def test_pbt__what_a_run_reports_is_reported_to_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a Tune checkpoint beside each of Train's; after an error the run is not left waiting."""
    runs = f"{tmp_path}/train"
    member = Member("a", {"x": 0.5}, runs, "r", origin_of(runs, "a"), [])
    storage.write_json(f"{member.origin}/state", {})
    reports: list[tuple[dict[str, Any], dict[str, Any] | None]] = []

    def report(metrics: dict[str, Any], checkpoint: tune.Checkpoint | None = None) -> None:
        if metrics.get("epoch") == 3:
            raise OSError("no space left")
        assert reports or storage.exists(str(member.origin))
        reports.append((metrics, None if checkpoint is None else read_member_checkpoint(checkpoint)))

    monkeypatch.setattr(tune, "report", report)
    waiting: Queue[Any] = Queue()
    relay = Relay(waiting, member)
    items = [({"epoch": 1}, "c1"), ({"step": 9}, "c2"), ({"epoch": 2}, None), ({"epoch": 3}, "c3")]
    for item in [*items, ({"epoch": 4}, "c4"), None]:
        waiting.put(item)
    relay.start()
    relay.join(10)
    assert [metrics for metrics, _ in reports] == [{**one, MEMBER: member.as_dict()} for one, _ in items[:3]]
    saved = {"checkpoint": f"{runs}/r/c1", "epoch": 1, "member": member.as_dict()}
    assert [checkpoint for _, checkpoint in reports] == [saved, {**saved, "checkpoint": f"{runs}/r/c2"}, None]
    assert not storage.exists(str(member.origin))
    assert str(relay.error) == "no space left"
    assert waiting.empty()


def test_pbt__a_checkpoint_to_go_on_from_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes on from it finds it, whatever its own run deletes; a copy that failed is not half there."""
    runs = f"{tmp_path}/train"
    scheduler = Population(SPACE, runs, every=1, share=0.5, epochs=4, slots=2, seed=0)
    saved = {"checkpoint": f"{runs}/r/c1"}
    monkeypatch.setattr(population, "read_member_checkpoint", lambda checkpoint: saved)
    trial: Any = SimpleNamespace(trial_id="a", checkpoint=None)
    storage.write_json(f"{runs}/r/c1/state", {"epoch": 1})
    scheduler._hold(trial)
    storage.remove(f"{runs}/r/c1")
    assert storage.read_json(f"{origin_of(runs, 'a')}/state") == {"epoch": 1}
    scheduler._hold(trial)
    assert storage.names(f"{runs}/origins") == []


def test_pbt__what_is_noted_of_a_trial(tmp_path: Path) -> None:
    """What it has become, with the numbers of trials it took from; the run that it was is removed."""
    runs = f"{tmp_path}/train"
    log = TrialLog(f"{tmp_path}/trials.json")
    log.begin(4, {"x": 0.5}, "run-4")
    assert take_note(log, 4, {"score": 1.0}, {}) == {}
    first = Member("t_4", {"x": 0.5}, runs, "one", None, [])
    take_note(log, 4, {MEMBER: first.as_dict()}, {})
    storage.write_json(f"{runs}/one/state", {})
    take_note(log, 4, {MEMBER: first.as_dict()}, {})
    assert storage.exists(f"{runs}/one/state")
    taken = [{"trial": "t_2", "epoch": 3, "values": {"x": 0.7}}]
    later = Member("t_4", {"x": 0.8}, runs, "two", f"{runs}/origins/t_4", taken)
    note = take_note(log, 4, {MEMBER: later.as_dict()}, {"t_2": 2, "t_4": 4})
    assert history(note) == {"pbt.exploits": 1, "pbt.taken": [{**taken[0], "trial": 2}]}
    assert not storage.exists(f"{runs}/one")
    again = TrialLog(f"{tmp_path}/trials.json")
    assert again.pending == [{"x": 0.8}]
    assert again.members == [note]
    assert again.broken_off({"x": 0.8}) == "run-4"
    again.begin(0, {"x": 0.8}, "run-4")
    assert TrialLog(f"{tmp_path}/trials.json").members == [note]  # broken off once more before it said a word
    assert history({}) == {}
