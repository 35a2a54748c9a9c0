"""Workers that stay from one Ray Train run to the next, on real Ray."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import TrainingFailedError, UserCallback
from training_runs import make_files, make_job

from orchestration.cluster.connect import connect
from orchestration.recipe.schema import Resources
from orchestration.search.standing_workers import StandingTrainer, WorkerPool
from orchestration.search.training_trial import train_run
from trainers.config.jobs import TrainJob

pytestmark = pytest.mark.cluster
RESOURCES = Resources.model_validate({"workers": 2, "cpus_per_worker": 0.5, "retries": 0})


class Heard(UserCallback):  # type: ignore[misc]
    """The epochs that were reported."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.epochs.append(metrics[0]["epoch"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with connect(None):
        yield


@pytest.fixture
def pool(ray_here: None) -> Iterator[WorkerPool]:
    pool = WorkerPool()
    yield pool
    pool.close()
    free = ray.cluster_resources()["CPU"]
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != free:
        assert time.monotonic() < deadline, "workers kept their processors"
        time.sleep(0.1)


def job(files: dict[str, str], **changes: Any) -> TrainJob:
    """Pruning to 70 % in two steps; its workers' random numbers, moments and masks are all in the result."""
    training = {"augment": {"shift": 1, "flip": 0.5}, "ema": 0.9, "checkpoint_every": 1, **changes}
    return make_job(files, training, {"fisher": {"gradients": 6, "batch_size": 4, "block_size": 16}})


def resting(pool: WorkerPool) -> set[int]:
    """Processes of the workers at rest."""
    assert pool._resting is not None
    return {worker.metadata.pid for worker in pool._resting[1].workers}


def kept(storage: Path, name: str) -> dict[str, bytes]:
    folder = storage / name / "kept" / "0.7"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def test_standing_workers__a_run_on_workers_of_others_is_the_same_run(
    files: dict[str, str], pool: WorkerPool, tmp_path: Path
) -> None:
    """Whether they ended or were stopped: the processes are the same, and so are the weights, bit for bit."""

    def fit(name: str, content: TrainJob) -> None:
        train_run(content, RESOURCES, str(tmp_path), name, Heard(), pool=pool).fit()

    fit("first", job(files))
    workers = resting(pool)
    assert len(workers) == 2
    fit("second", job(files))
    assert resting(pool) == workers
    assert kept(tmp_path, "second") == kept(tmp_path, "first")

    stopped = until_reported(train_run_of(files, tmp_path, pool), lambda heard: len(heard.epochs) > 1)
    assert stopped[-1] < 1000
    assert resting(pool) == workers, "stopped by a message, not by a kill"
    fit("third", job(files))
    assert resting(pool) == workers
    assert kept(tmp_path, "third") == kept(tmp_path, "first")
    snapshot = json.loads((tmp_path / "third" / "checkpoint_manager_snapshot.json").read_text())
    assert len(snapshot["checkpoint_results"]) == 2


def train_run_of(files: dict[str, str], folder: Path, pool: WorkerPool) -> Callable[[Heard], StandingTrainer]:
    """A run of very many epochs."""
    return lambda heard: train_run(job(files, epochs=1000), RESOURCES, str(folder), "long", heard, pool=pool)


def until_reported(trainer: Callable[[Heard], StandingTrainer], enough: Callable[[Heard], bool]) -> list[int]:
    """Run it in a thread, as a trial does, and stop it; returns the epochs that it reported."""
    heard, errors = Heard(), []
    run = trainer(heard)

    def fit() -> None:
        try:
            run.fit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit)
    thread.start()
    while not enough(heard):
        assert thread.is_alive(), errors
        time.sleep(0.05)
    run.stop()
    thread.join(60)
    assert [type(error) for error in errors] == [asyncio.CancelledError]
    return heard.epochs


def test_standing_workers__after_a_failure_they_are_new_ones(
    files: dict[str, str], pool: WorkerPool, tmp_path: Path
) -> None:
    train_run(job(files), RESOURCES, str(tmp_path), "good", Heard(), pool=pool).fit()
    before = resting(pool)
    wrong = job(files).model_copy(update={"method": "magnitude", "allocation": {"no": 1}})
    with pytest.raises(TrainingFailedError):
        train_run(wrong, RESOURCES, str(tmp_path), "wrong", Heard(), pool=pool).fit()
    assert pool._resting is None
    train_run(job(files), RESOURCES, str(tmp_path), "better", Heard(), pool=pool).fit()
    assert not resting(pool) & before


def test_standing_workers__those_that_died_or_are_too_few_are_replaced(
    files: dict[str, str], pool: WorkerPool, tmp_path: Path
) -> None:
    train_run(job(files), RESOURCES, str(tmp_path), "two", Heard(), pool=pool).fit()
    assert pool._resting is not None
    ray.kill(pool._resting[1].workers[1].actor)
    before = resting(pool)
    train_run(job(files), RESOURCES, str(tmp_path), "again", Heard(), pool=pool).fit()
    after = resting(pool)
    assert not after & before
    single = RESOURCES.model_copy(update={"workers": 1})
    train_run(job(files), single, str(tmp_path), "one", Heard(), pool=pool).fit()
    assert len(resting(pool)) == 1
    assert not resting(pool) & after
