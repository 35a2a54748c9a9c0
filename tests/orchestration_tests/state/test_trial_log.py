"""The trials of a phase on the storage: what a resumed sweep goes by."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from orchestration.state.trial_end import ended
from orchestration.state.trial_log import TrialLog, TrialRecord
from pruners.errors import InputError
from trainers.loop.report import EpochReport


def trial(number: int, score: float | None, state: str = "finished", error: str | None = None) -> TrialRecord:
    return TrialRecord(
        number=number,
        values={"recovery.lr.peak": 1e-3, "kind": "a"},
        state=state,  # type: ignore[arg-type]
        score=score,
        metrics={"val_top1": 0.5, "shares": {"stage.0": 0.7}},
        checkpoint=f"s3://b/{number}",
        error=error,
    )


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_trial_log__what_is_logged_is_read_back(scheme: str, tmp_path: Path) -> None:
    uri = f"{scheme}{tmp_path}/deep/trials.json"
    log = TrialLog(uri)
    assert (log.trials, log.run_id) == ([], None)
    log.run_id = "abc"
    log.add(trial(0, 0.5))
    log.add(trial(1, None, "failed", "boom"))
    again = TrialLog(uri)
    assert again.trials == log.trials
    assert again.run_id == "abc"


def test_trial_log__each_trial_is_there_at_once(tmp_path: Path) -> None:
    log = TrialLog(f"{tmp_path}/trials.json")
    for number in range(3):
        log.add(trial(number, 0.1))
        assert len(TrialLog(f"{tmp_path}/trials.json").trials) == number + 1
    assert [path.name for path in tmp_path.iterdir()] == ["trials.json"]


def test_trial_log__what_was_broken_off_is_known(tmp_path: Path) -> None:
    """A trial that began and never ended: its proposal goes on first, in its own MLflow run."""
    uri = f"{tmp_path}/trials.json"
    log = TrialLog(uri)
    values = {"recovery.lr.peak": 1e-3, "kind": "a"}
    log.begin(0, values, "run-0")
    log.begin(1, {"recovery.lr.peak": 2e-3}, "run-1")
    log.add(trial(0, 0.5))
    again = TrialLog(uri)
    assert again.pending == [{"recovery.lr.peak": 2e-3}]
    assert again.broken_off({"recovery.lr.peak": 2e-3}) == "run-1"
    assert again.broken_off(values) is None
    again.begin(2, {"recovery.lr.peak": 2e-3}, "run-1")
    assert len(TrialLog(uri).pending) == 1


def test_trial_log__failed_trials_are_run_again(tmp_path: Path) -> None:
    log = TrialLog(f"{tmp_path}/trials.json")
    for record in (trial(0, 0.5), trial(1, None, "failed"), trial(2, 0.4, "stopped")):
        log.add(record)
    assert [record.number for record in log.ended] == [0, 2]


def test_trial_log__the_best_ran_to_its_end(tmp_path: Path) -> None:
    log = TrialLog(f"{tmp_path}/trials.json")
    trials = [trial(0, 0.5), trial(1, 0.9, "stopped"), trial(2, 0.7), trial(3, 0.7), trial(4, None, "failed")]
    for record in trials:
        log.add(record)
    assert log.best().number == 2  # the first of equals
    log.add(trial(5, None))
    assert log.best().number == 2


def test_trial_log__scores_of_zero_and_below(tmp_path: Path) -> None:
    log = TrialLog(f"{tmp_path}/trials.json")
    for record in (trial(0, -0.5), trial(1, 0.0), trial(2, -1.0)):
        log.add(record)
    assert log.best().number == 1


def test_trial_log__no_trial_ran_to_its_end(tmp_path: Path) -> None:
    log = TrialLog(f"{tmp_path}/trials.json")
    with pytest.raises(RuntimeError, match=r"no trial ran to its end$"):
        log.best()
    log.add(trial(0, None, "failed", "out of memory"))
    log.add(trial(1, None, "failed", "out of memory"))
    log.add(trial(2, 0.1, "stopped"))
    with pytest.raises(RuntimeError, match=r"no trial ran to its end: out of memory$"):
        log.best()


def test_trial_log__a_log_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "trials.json").write_text('{"trials": [')
    with pytest.raises(InputError, match=r"trials\.json"):
        TrialLog(f"{tmp_path}/trials.json")


def test_trial_log__the_file_is_plain_json(tmp_path: Path) -> None:
    TrialLog(f"{tmp_path}/trials.json").add(trial(0, 0.25))
    content = json.loads((tmp_path / "trials.json").read_text())
    assert content["trials"][0]["score"] == 0.25


def test_trial_log__cheap_trials_are_written_in_parts(tmp_path: Path) -> None:
    """Each is there at once; what is written for one does not grow with their number."""
    uri = f"{tmp_path}/trials.json"
    log = TrialLog(uri, one_shot=True)
    for number in range(400):
        log.begin(number, {"x": number}, None)
        log.add(trial(number, number / 400))
        if number % 37 == 0:
            again = TrialLog(uri, one_shot=True)
            assert [record.number for record in again.trials] == list(range(number + 1))
            assert again.pending == []
        parts = sorted((tmp_path / "trials.parts").iterdir())
        assert len(parts) == number // 32 + 1
        assert len(json.loads(parts[-1].read_text())) == number % 32 + 1
    log.save()
    assert [path.name for path in tmp_path.iterdir()] == ["trials.json"]
    assert [record.number for record in TrialLog(uri).trials] == list(range(400))


def test_trial_log__a_driver_killed_while_parts_are_joined(tmp_path: Path) -> None:
    uri = f"{tmp_path}/trials.json"
    log = TrialLog(uri, one_shot=True)
    for number in range(40):
        log.add(trial(number, 0.5))
    left = {path.name: path.read_bytes() for path in (tmp_path / "trials.parts").iterdir()}
    log.save()
    (tmp_path / "trials.parts").mkdir()
    for name, content in left.items():  # they were to be deleted next
        (tmp_path / "trials.parts" / name).write_bytes(content)
    again = TrialLog(uri, one_shot=True)
    again.add(trial(40, 0.6))
    assert [record.number for record in TrialLog(uri).trials] == list(range(41))


def test_trial_log__a_resumed_log_goes_on_in_its_last_part(tmp_path: Path) -> None:
    uri = f"{tmp_path}/trials.json"
    for number in range(70):
        TrialLog(uri, one_shot=True).add(trial(number, 0.5))
    assert [record.number for record in TrialLog(uri).trials] == list(range(70))
    assert len(list((tmp_path / "trials.parts").iterdir())) == 3


def test_trial_log__what_is_not_finite_is_kept_as_json_has_it(tmp_path: Path) -> None:
    """A figure is left out, a score that a rule went by comes back: the rule goes the same way again."""

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    uri = f"{tmp_path}/trials.json"
    log = TrialLog(uri)
    scores = [math.nan, -math.inf, math.inf, 0.25]
    log.ask(0, {"x": 1.0}, given=False)
    log.begin(0, {"x": 1.0}, None)
    for number, score in enumerate(scores):
        log.compare(0, float(number), score, goes_on=True)
    json.loads(Path(uri).read_text(), parse_constant=refused)
    assert str([event.score for event in TrialLog(uri).history if event.kind == "rung"]) == str(scores)
    last: EpochReport = {"val_top1": 0.5, "train_loss": math.nan, "score": 0.5, "shares": {"stage.0": 0.7}}
    log.add(ended(0, {"x": 1.0}, "finished", last, seconds=1.0))
    json.loads(Path(uri).read_text(), parse_constant=refused)
    again = TrialLog(uri)
    assert again.trials[0].metrics == {"val_top1": 0.5, "shares": {"stage.0": 0.7}}
    assert str([event.score for event in again.history if event.kind == "rung"]) == str(scores)
