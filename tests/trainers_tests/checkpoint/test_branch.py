"""A run that begins from another one's checkpoint: what it takes over, and what is its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import CPU, Log, make_files, make_job, same_files

from pruners.errors import InputError
from trainers.checkpoint.trainer_state import read_state, unflatten_optimizer
from trainers.config.jobs import TrainJob
from trainers.loop.gradual import run
from trainers.loop.session import Session
from trainers.ray_worker import _origin

KEYS = ("training.lr.peak", "training.weight_decay", "training.label_smoothing")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


def job_of(files: dict[str, str], training: dict[str, Any], **changes: Any) -> TrainJob:
    return make_job(files, {"checkpoint_every": 1, **training}, {}, **changes)


def branched(
    files: dict[str, str],
    training: dict[str, Any],
    checkpoint: Path,
    differs: tuple[str, ...] = KEYS,
    **more: Any,
) -> TrainJob:
    return job_of(files, training, origin={"checkpoint": str(checkpoint), "differs": differs}, **more)


@pytest.fixture(scope="module", params=["adamw", "lamb"])
def donor(
    request: pytest.FixtureRequest, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Log]:
    """A whole run of four epochs of seven steps, pruned for the last time after two."""
    folder = tmp_path_factory.mktemp("donor")
    means = {"optimizer": request.param, "weight_decay": 0.05}
    log = Log(folder)
    run(job_of(files, means, keep_folder=str(folder / "kept")), log, CPU)
    return means, log


def test_branch__moments_steps_and_draws_go_on_with_other_settings(
    donor: tuple[dict[str, Any], Log], files: dict[str, str]
) -> None:
    means, log = donor
    checkpoint = log.saved[21]
    lr = {"kind": "cyclic", "peak": 1e-3}
    job = branched(files, {**means, "lr": lr, "weight_decay": 0.2, "label_smoothing": 0.1}, checkpoint)
    session = Session.open(job, CPU, branch=checkpoint)
    tensors, progress = read_state(checkpoint)
    assert session.step == 21
    assert session.epoch == 3
    assert session.last["epoch"] == 3
    assert session.last["score"] == progress["last"]["score"]
    assert (session.kept, session.last["kept"]) == ({}, {})
    assert progress["kept"]
    decays = {group["weight_decay"] for group in session.optimizer.param_groups}
    assert decays == {0.0, 0.2}
    assert {group["lr"] for group in session.optimizer.param_groups} == {1e-3}
    if means == {"optimizer": "lamb", "weight_decay": 0.05}:
        assert {int(group["step"]) for group in session.optimizer.param_groups} == {21}
    state = session.optimizer.state_dict()["state"]
    moments = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer/")}
    assert moments
    for name, moment in moments.items():
        number, key = name.removeprefix("optimizer/").split("/", 1)
        assert torch.equal(torch.as_tensor(state[int(number)][key]), moment), name
    assert session.masks is not None
    assert abs(session.masks.sparsity - 0.7) < 1e-3


def test_branch__equal_settings_end_with_the_bits_of_the_other_run(
    donor: tuple[dict[str, Any], Log], files: dict[str, str], tmp_path: Path
) -> None:
    means, log = donor
    rest = Log(tmp_path / "rest")
    checkpoint = log.saved[14]
    run(branched(files, means, checkpoint, keep_folder=str(tmp_path / "kept")), rest, CPU, branch=checkpoint)
    assert sorted(rest.saved) == [21, 28]
    assert same_files(rest.last, log.last) == []
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["0.7"]


def test_branch__other_settings_end_elsewhere_and_go_on_from_their_own(
    donor: tuple[dict[str, Any], Log], files: dict[str, str], tmp_path: Path
) -> None:
    means, log = donor
    checkpoint = log.saved[14]
    job = branched(files, {**means, "lr": {"kind": "cyclic", "peak": 1e-3}}, checkpoint)
    rest = Log(tmp_path / "rest")
    run(job, rest, CPU, branch=checkpoint)
    assert "model.safetensors" in same_files(rest.last, log.last)
    again = Log(tmp_path / "again")
    run(job, again, CPU, resume=rest.saved[21])
    assert same_files(again.last, rest.last) == []


@pytest.mark.parametrize(
    ("training", "differs", "says"),
    [
        ({"weight_decay": 0.1}, ("training.lr.peak",), r"training\.weight_decay 0\.05 there and 0\.1 here"),
        ({"epochs": 5}, KEYS, r"training\.epochs 4 there and 5 here"),
        ({"batch_size": 10}, KEYS, r"training\.batch_size 8 there and 10 here"),
    ],
)
def test_branch__what_may_not_differ_is_refused(
    training: dict[str, Any],
    differs: tuple[str, ...],
    says: str,
    donor: tuple[dict[str, Any], Log],
    files: dict[str, str],
) -> None:
    means, log = donor
    checkpoint = log.saved[21]
    with pytest.raises(InputError, match=f"the checkpoint is of another recipe: {says}"):
        Session.open(branched(files, {**means, **training}, checkpoint, differs), CPU, branch=checkpoint)


def test_branch__a_checkpoint_of_its_own_is_held_to_all_keys(
    donor: tuple[dict[str, Any], Log], files: dict[str, str]
) -> None:
    means, log = donor
    checkpoint = log.saved[21]
    with pytest.raises(InputError, match=r"training\.weight_decay 0\.05 there and 0\.1 here"):
        Session.open(branched(files, {**means, "weight_decay": 0.1}, checkpoint), CPU, resume=checkpoint)


def test_branch__settings_of_the_groups_are_kept_where_they_are_asked_for() -> None:
    rest = {"plain": {}, "groups": [{"lr": 1.0, "weight_decay": 0.5, "step": 7, "betas": [0.9, 0.99]}]}
    new = [{"lr": 2.0, "weight_decay": 0.1, "betas": (0.9, 0.99), "params": [0]}]
    resumed = unflatten_optimizer({}, rest, new)["param_groups"][0]
    assert (resumed["lr"], resumed["weight_decay"], resumed["step"]) == (1.0, 0.5, 7)
    own = unflatten_optimizer({}, rest, new, ("lr", "weight_decay"))["param_groups"][0]
    assert (own["lr"], own["weight_decay"], own["step"], own["params"]) == (2.0, 0.1, 7, [0])


def test_branch__an_origin_that_is_gone_or_damaged_is_named(
    donor: tuple[dict[str, Any], Log], files: dict[str, str], tmp_path: Path
) -> None:
    means, log = donor
    with _origin(job_of(files, means)) as none:
        assert none is None
    with _origin(branched(files, means, log.saved[21])) as whole:
        assert whole == log.saved[21]
    gone = tmp_path / "gone"
    with pytest.raises(RuntimeError, match=f"no checkpoint to begin from: {gone} is not there"):
        _origin(branched(files, means, gone)).__enter__()
    shutil.copytree(log.saved[21], gone)
    (gone / "masks.safetensors").unlink()
    with pytest.raises(RuntimeError, match=f"begin from: masks.safetensors is missing in {gone}"):
        _origin(branched(files, means, gone)).__enter__()
