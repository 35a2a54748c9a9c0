"""What all sweeps of a storage share is made once: who comes second waits, says so, and uses it."""

from __future__ import annotations

import copy
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from image_tables import dense_folder

from orchestration.recipe.validation import validate
from orchestration.search.training_trial import RunNames
from orchestration.state import latency_store
from orchestration.state.lock import TakenError, _actor_lock, artifact_lock
from orchestration.sweep import dense as dense_phase
from orchestration.sweep import structured as structured_phase
from orchestration.sweep.allocation import rounds as rounds_module
from orchestration.sweep.allocation import search as search_module
from orchestration.sweep.artifacts import Dense
from orchestration.sweep.context import Sweep
from trainers import storage
from trainers.checkpoint.folder import PRUNING_RECORD
from trainers.engines.latency_table import Curve, LinearShape

HOLD = """
import signal, sys, time
from orchestration.state import latency_store
from orchestration.state.lock import artifact_lock
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
with artifact_lock(sys.argv[1], "dense/a", print, by_cluster=False):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(target: Path, code: str = HOLD, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(target)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def test_shared_artifacts__the_second_waits_and_takes_over_when_the_first_is_killed(tmp_path: Path) -> None:
    first = holder(tmp_path)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    lines: list[str] = []
    killer = threading.Timer(2.0, first.kill)
    killer.start()
    began = time.monotonic()
    with artifact_lock(str(tmp_path), "dense/b", lines.append, by_cluster=False):
        assert time.monotonic() - began < 1  # something else is nobody's
    with artifact_lock(str(tmp_path), "dense/a", lines.append, by_cluster=False):
        assert 1.5 < time.monotonic() - began < 10
    assert lines == [f" (process {first.pid} on {os.uname().nodename})"]
    first.wait(10)


def test_shared_artifacts__who_waits_can_be_interrupted(tmp_path: Path) -> None:
    with artifact_lock(str(tmp_path), "dense/a", str, by_cluster=False):
        second = holder(tmp_path)
        assert second.stdout is not None
        assert str(os.getpid()) in second.stdout.readline()  # it says that it waits
        second.send_signal(signal.SIGINT)
        _, error = second.communicate(timeout=5)
        assert error.rstrip().endswith("KeyboardInterrupt")


ON_CLUSTER = """
import sys, time, ray
from orchestration.state import latency_store
from orchestration.state.lock import _actor_lock
ray.init(address=sys.argv[1], log_to_driver=False)
with _actor_lock("s3://bucket/dense/a"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.cluster
def test_shared_artifacts__on_a_cluster_too_a_lock_dies_with_its_driver(tune_here: None) -> None:
    """As for storages where files cannot be locked."""
    import ray

    other = holder(Path(ray.get_runtime_context().gcs_address), ON_CLUSTER)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(TakenError), _actor_lock("s3://bucket/dense/a"):
        pass
    with _actor_lock("s3://bucket/dense/b"):
        pass
    other.kill()
    other.wait(10)
    deadline = time.monotonic() + 30
    while True:
        try:
            with _actor_lock("s3://bucket/dense/a"):
                break
        except TakenError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


# the phases


def sweep(folder: Path, name: str, lines: list[str], **recipe: Any) -> Any:
    """A sweep as far as making something goes, in a storage that others share."""
    content = {
        "name": name,
        "storage": str(folder),
        "data": {"train": "/none"},
        "dense": {"epochs": 1},
        "recovery": {"epochs": 1},
        "structured": {"mlp": 0.5},
        **recipe,
    }
    made: Any = Sweep(
        recipe=validate({"model": {"architecture": "deit_tiny_patch16_224"}, **content}),
        data=SimpleNamespace(train="/none"),  # type: ignore[arg-type]
        data_hash="d",
        size=SimpleNamespace(nodes=((2.0, 0.0),)),  # type: ignore[arg-type]
        tracker=None,  # type: ignore[arg-type]
        display=SimpleNamespace(say=lines.append, finished=lines.append, phase=lambda *a, **b: None),  # type: ignore[arg-type]
        run="",
    )
    return made


def together(work: Callable[[str, list[str]], Any]) -> tuple[list[str], list[str]]:
    """Two sweeps do the same at once; what each of them said, the slower one last."""
    lines_of: dict[str, list[str]] = {"one": [], "two": []}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: work(name, lines_of[name]), lines_of))
    first, second = sorted(lines_of.values(), key=lambda lines: any("another" in line for line in lines))
    return first, second


def work_until(waited_for: list[list[str]], begun: list[Any]) -> None:
    """Be at work until another sweep has said that it waits, or does the same itself."""
    deadline = time.monotonic() + 120
    while len(begun) < 2 and not any("another" in line for said in waited_for for line in said):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_shared_artifacts__a_dense_model_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def train(context: Sweep, key: str, folder: str) -> float:
        trained.append(context.recipe.name)
        time.sleep(1.5)
        storage.write_json(f"{folder}/model/{PRUNING_RECORD}", {"figures": {"val_top1": 0.5}, "data": "d"})
        return 1.5

    monkeypatch.setattr(dense_phase, "_train", train)
    monkeypatch.setattr(dense_phase, "content_hash", lambda checkpoint: "w")
    models = []
    first, second = together(
        lambda name, lines: models.append(dense_phase.dense_phase(sweep(tmp_path, name, lines)))
    )
    assert len(trained) == 1
    assert models[0] == models[1]
    assert first == ["trained in 2 s, 50.0 % on validation"]
    assert second[0].startswith("      dense model: another sweep is making it (process ")
    assert second[1:] == ["made by another sweep, 50.0 % on validation"]


def test_shared_artifacts__a_model_is_cut_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Step(structured_phase._Step):
        def show(self) -> None:
            pass

        def make(self) -> None:
            made.append(self._sweep.recipe.name)
            time.sleep(1.5)
            storage.write_json(f"{self.model}/{PRUNING_RECORD}", {})
            storage.write_json(f"{self._folder}/{structured_phase.REGISTERED}", {})

        def result(self) -> Any:
            return self.model

    monkeypatch.setattr(structured_phase, "_Step", Step)
    dense = Dense("/none", 0.5, "w")
    models = []
    _, second = together(
        lambda name, lines: models.append(
            structured_phase.structured_phase(sweep(tmp_path, name, lines), dense)
        )
    )
    assert len(made) == 1
    assert models[0] == models[1]
    assert "structured pruning: another sweep is making it" in second[0]


def test_shared_artifacts__an_elimination_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(self: Any, order: Any, checkpoint: str, number: int) -> None:
        made.append(order.folder)
        time.sleep(1.5)
        storage.write_json(f"{order.folder}/facts.json", {"parts": 1})

    monkeypatch.setattr(rounds_module.Rounds, "_make", make)
    monkeypatch.setattr(rounds_module.ray, "get", lambda result: result)
    task = SimpleNamespace(remote=lambda *given: given[3])
    monkeypatch.setattr(Sweep, "task", lambda self, function: (task, "cpu"))
    rounds = []
    _, second = together(
        lambda name, lines: rounds.append(
            rounds_module.Rounds(
                sweep(tmp_path, name, lines), "magnitude", Dense("/none", 0.5, "w"), [0.5]
            ).leading_to(0.5)
        )
    )
    assert len(made) == 1
    assert rounds[0][0].order == rounds[1][0].order
    assert rounds[0][0].order.facts == {"parts": 1}
    assert "magnitude: elimination: another sweep is making it" in second[0]


def test_shared_artifacts__the_model_after_a_round_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def save(job: Any, device: str) -> None:
        made.append(job.target)
        work_until(lists, made)
        storage.write_json(f"{job.target}/{PRUNING_RECORD}", {})

    monkeypatch.setattr(rounds_module.ray, "get", lambda result: result)
    monkeypatch.setattr(Sweep, "task", lambda self, function: (SimpleNamespace(remote=save), "cpu"))

    def after_the_first(name: str, lines: list[str]) -> None:
        lists.append(lines)
        rounds = rounds_module.Rounds(
            sweep(tmp_path, name, lines), "magnitude", Dense("/none", 0.5, "w"), [0.75]
        )
        rounds.__dict__["_levels"] = [0.5, 0.75]
        order: Any = SimpleNamespace(fingerprint="f")
        rounds._done.append(rounds_module.Round("/none", order))
        models.append(rounds._model_after(0))

    models: list[str] = []
    lists: list[list[str]] = []
    _, second = together(after_the_first)
    assert len(made) == 1
    assert models == [made[0]] * 2
    assert "magnitude: the model after round 1: another sweep is making it" in second[0]


def test_shared_artifacts__a_latency_table_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once would also measure each other's load."""
    measured = []

    def measure(folder: Path, shapes: dict[str, LinearShape], *rest: Any) -> Any:
        measured.append(folder)
        work_until(lists, measured)
        curve = Curve((0.0, 1.0), (2e-3, 1e-3))
        return curve, dict.fromkeys(shapes.values(), curve)

    monkeypatch.setattr(latency_store, "measure", measure)
    monkeypatch.setattr(latency_store, "on_server", lambda target, function, *given: function(*given))
    dense = Dense(str(dense_folder(tmp_path / "model")), 0.5, "w")
    fast = {"objective": "latency", "between": [0.5, 0.95], "loss": 0.01}

    def table(name: str, lines: list[str]) -> None:
        lists.append(lines)
        searches = search_module._Searches(sweep(tmp_path, name, lines, allocation=fast), "magnitude", dense)
        tables.append(search_module._Searches._table.func(searches))  # Python 3.11 has one lock for both

    tables: list[Any] = []
    lists: list[list[str]] = []
    first, second = together(table)
    assert len(measured) == 1
    assert tables[0] is not None
    assert tables[0] == tables[1]
    assert first[0].startswith("      measured: csr:float32")
    assert "      times of csr:float32 (batch 1, threads 1): another sweep is making it" in second[0]
    assert second[1].startswith("      known: csr:float32")


def test_shared_artifacts__scratch_folders_are_each_sweeps_own(tmp_path: Path) -> None:
    sweep_one, sweep_two = (sweep(tmp_path, name, []) for name in ("one", "two"))
    with sweep_one.scratch("allocation-ovit-k") as first:
        storage.write_json(f"{first}/state.json", {})
        with sweep_two.scratch("allocation-ovit-k") as second:
            assert second != first
        assert storage.exists(f"{first}/state.json")
    assert not storage.exists(first)


# proposals


def trial(value: float, epoch: int | None = None, *, over: bool = False) -> Any:
    figures = {} if epoch is None else {"epoch": epoch}
    return SimpleNamespace(config={"x": value}, last_result=figures, is_finished=lambda: over)


def test_shared_artifacts__equal_proposals_at_once_have_runs_of_their_own() -> None:
    names = RunNames(lambda metrics: metrics.get("epoch", 0) >= 3)
    first = names(trial(1.0, 2))
    assert names(trial(2.0)) != first
    assert names(trial(1.0)) == f"{first}-2"
    assert names(trial(1.0)) == f"{first}-3"
    assert RunNames()(trial(1.0)) == first  # another driver finds what was broken off


def test_shared_artifacts__copies_for_each_trial_know_of_each_other() -> None:
    names = RunNames()
    first = copy.deepcopy(names)(trial(1.0))
    assert copy.deepcopy(names)(trial(1.0)) == f"{first}-2"


def test_shared_artifacts__an_equal_proposal_takes_over_only_what_ran_to_its_end() -> None:
    names = RunNames(lambda metrics: metrics.get("epoch", 0) >= 3)
    first = names(trial(1.0, 3, over=True))
    assert names(trial(1.0, 2, over=True)) == first
    assert names(trial(1.0, 3, over=True)) == f"{first}-2"  # the one before was stopped, and may be ending
    assert names(trial(1.0)) == f"{first}-2"


def reports_its_name(config: dict[str, Any], started: Path) -> None:
    """Report the trial's name once two trials have started: the first waits for the second."""
    from ray import tune

    context = tune.get_context()
    (started / context.get_trial_id()).touch()
    until = time.monotonic() + 120
    while len(list(started.iterdir())) < 2:
        assert time.monotonic() < until, "no second trial started beside the first"
        time.sleep(0.05)
    tune.report({"score": 1.0, "epoch": 1, "lr": context.get_trial_name()})


@pytest.mark.cluster
def test_shared_artifacts__trials_know_the_names_of_their_runs(tune_here: None, tmp_path: Path) -> None:
    import optuna
    from helpers import Quiet
    from ray import tune

    from orchestration.search.runner import run_search
    from orchestration.search.spec import Search
    from orchestration.state.trial_log import TrialLog

    log = TrialLog(f"{tmp_path}/trials.json")
    started = tmp_path / "started"
    started.mkdir()
    search = Search(
        name="equal",
        trainable=tune.with_resources(functools.partial(reports_its_name, started=started), {"CPU": 0.1}),
        space={"x": optuna.distributions.CategoricalDistribution([1])},
        trials=3,
        concurrent=2,
        storage=f"{tmp_path}/tune",
        seed=0,
        sampler="random",
        names=RunNames(lambda metrics: bool(metrics.get("epoch", 0) >= 1)),
    )
    run_search(search, log, Quiet())
    names = sorted(record.metrics["lr"] for record in log.trials)
    assert len(names) == 3
    assert len(set(names)) >= 2  # two ran at once
    assert set(names) <= {names[0], f"{names[0]}-2", f"{names[0]}-3"}
