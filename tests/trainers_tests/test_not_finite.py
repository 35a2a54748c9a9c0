"""Nothing that is not finite is saved, kept, called best, or gone on from; on GPUs it may be seen late."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_tables import dense_folder, edit_json, normed_folder, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_runs import CPU, Log, make_files, make_job

from orchestration.search.pareto import front
from orchestration.state.trial_log import TrialLog, TrialRecord
from pruners.errors import InputError
from trainers.checkpoint.checksums import sums
from trainers.checkpoint.finite import not_finite
from trainers.checkpoint.folder import load_checkpoint, save_checkpoint
from trainers.checkpoint.trainer_state import _checksum, damage
from trainers.loop import gradual, train_step
from trainers.loop.evaluation import evaluate
from trainers.loop.gradual import run
from trainers.loop.session import Session

Poison = Callable[..., None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """In some steps of a run a layer's answers are multiplied, in the forward or the backward pass."""

    def at(steps: set[int], by: float = math.nan, *, layer: str = "head", backward: bool = False) -> None:
        original = gradual.train_step

        def poisoned(session: Session, batch: Any) -> None:
            def hook(module: nn.Module, given: object, output: Tensor) -> Tensor:
                if backward:
                    output.register_hook(lambda gradient: gradient * by)
                    return output
                return output * by

            where = session.model.get_submodule(layer)
            hooks = [where.register_forward_hook(hook)] if session.step in steps else []
            try:
                original(session, batch)
            finally:
                for item in hooks:
                    item.remove()

        monkeypatch.setattr(gradual, "train_step", poisoned)

    return at


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's numbers are looked at as where a look makes the host wait: every tenth step."""
    monkeypatch.setattr(train_step, "_checks_each_step", lambda session: False)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("at", "says"),
    [
        (2, r"gradients are not finite in step 2 of epoch 0, seen 4 steps later"),  # at the epoch's end
        (6, r"gradients are not finite in step 6 of epoch 0$"),  # its last step
        (9, r"gradients are not finite in step 2 of epoch 1, seen 1 steps later"),  # at the tenth step
        (27, r"gradients are not finite in step 6 of epoch 3$"),  # the run's last
    ],
)
def test_not_finite__on_a_gpu_no_step_is_missed(
    at: int, says: str, files: dict[str, str], tmp_path: Path, poison: Poison
) -> None:
    poison({at})
    log = Log(tmp_path / "log")
    kept = tmp_path / "kept"
    with pytest.raises(FloatingPointError, match=says):
        run(make_job(files, {"checkpoint_every": 1}, keep_folder=str(kept)), log, CPU)
    assert len(log.metrics) == len(log.saved) == at // 7
    for folder in [*log.saved.values(), *kept.glob("*")]:
        assert not_finite(load_file(folder / "model.safetensors")) == []


@pytest.mark.usefixtures("as_on_a_gpu")
def test_not_finite__nor_is_one_before_a_checkpoint_within_an_epoch(
    files: dict[str, str], tmp_path: Path, poison: Poison
) -> None:
    poison({3})
    log = Log(tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 3 of epoch 0, seen 1 steps later"):
        run(make_job(files, {"checkpoint_steps": 5}), log, CPU)
    assert log.saved == {}


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_not_finite__float16_gives_up_when_every_step_is_left_out(
    on_nan: str, files: dict[str, str], tmp_path: Path, poison: Poison
) -> None:
    poison(set(range(9, 999)), backward=True)
    log = Log(tmp_path)
    says = r"the last 3\d steps up to step \d of epoch \d were left out"
    with pytest.raises(FloatingPointError, match=says):
        run(make_job(files, {"precision": "float16", "epochs": 9, "on_nan": on_nan}), log, CPU)
    assert all(math.isfinite(row["train_loss"]) for row in log.metrics)


def test_not_finite__a_run_of_which_no_step_was_made_does_not_finish(
    files: dict[str, str], tmp_path: Path, poison: Poison
) -> None:
    """Seven steps are fewer than float16 may leave out in a row."""
    poison(set(range(7)), backward=True)
    log = Log(tmp_path)
    with pytest.raises(FloatingPointError, match="each of the run's 7 steps was left out"):
        run(make_job(files, {"precision": "float16", "epochs": 1}), log, CPU)
    assert log.saved == {}


def test_not_finite__float16_counts_what_its_scaler_leaves_out(
    files: dict[str, str], tmp_path: Path, poison: Poison
) -> None:
    """A gradient that overflows at the first scale is no fault; a loss that is NaN is one."""
    poison({0, 8}, by=1e38, backward=True)
    log = Log(tmp_path / "overflows")
    run(make_job(files, {"precision": "float16"}), log, CPU)
    assert [row["skipped_steps"] for row in log.metrics] == [1, 2, 2, 2]


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_not_finite__a_loss_that_is_nan(
    precision: str, files: dict[str, str], tmp_path: Path, poison: Poison
) -> None:
    poison({9})
    with pytest.raises(FloatingPointError, match=r"the loss is nan in step 2 of epoch 1"):
        run(make_job(files, {"precision": precision}), Log(tmp_path), CPU)
    log = Log(tmp_path)
    run(make_job(files, {"precision": precision, "on_nan": "skip"}), log, CPU)
    assert [row["skipped_steps"] for row in log.metrics] == [0, 1, 1, 1]
    assert all(math.isfinite(row["train_loss"]) for row in log.metrics)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_not_finite__a_step_left_out_moves_no_running_statistics(
    precision: str, files: dict[str, str], tmp_path: Path, poison: Poison
) -> None:
    """NaN would stay in a batch norm's mean, and with it in every answer, whatever the weights."""
    poison({1}, layer="conv1")
    log = Log(tmp_path)
    training = {"precision": precision, "on_nan": "skip", "epochs": 1, "batch_size": 25}
    run(
        make_job(
            files, training, model={"checkpoint": str(normed_folder(tmp_path / "normed")), "classes": 3}
        ),
        log,
        CPU,
    )
    result = load_file(log.last / "model.safetensors")
    assert not_finite(result) == []
    assert result["bn1.running_mean"].abs().sum() > 0
    assert math.isfinite(log.metrics[0]["val_loss"])


@pytest.mark.parametrize("ema", [None, 0.5])
def test_not_finite__a_step_that_makes_weights_infinite(
    ema: float | None, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one of a run, so that no loss would tell."""
    original = gradual.train_step

    def train_step(session: Session, batch: Any) -> None:
        original(session, batch)
        if session.step == 6:
            with torch.no_grad():
                session.model.get_parameter("norm.weight")[0] = torch.inf

    monkeypatch.setattr(gradual, "train_step", train_step)
    log = Log(tmp_path / "log")
    job = make_job(files, {"epochs": 1, "ema": ema}, keep_folder=str(tmp_path / "kept"))
    with pytest.raises(FloatingPointError, match=r"after step 6: norm\.weight is not finite$"):
        run(job, log, CPU)
    assert log.metrics == []
    assert log.saved == {}
    assert not (tmp_path / "kept").exists()


def test_not_finite__answers_that_are_not_finite_have_no_top1() -> None:
    """The largest of NaN would be class 0, and a model of NaN as good as the share of class 0."""

    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.where(images > 0, images, torch.nan)

    images, labels = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 1.0]]), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(FloatingPointError, match="on 3 images: the answers to 1 are not"):
        evaluate(Broken(), [(images, labels)])
    with pytest.raises(FloatingPointError, match="their loss is inf"):
        evaluate(nn.Identity(), [(torch.tensor([[-3e38, 3e38]]), labels[:1])])


def test_not_finite__neither_saved_nor_loaded(tmp_path: Path) -> None:
    model, arguments = tiny()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.bias")[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.mlp\.fc1\.bias is not finite"):
        save_checkpoint(tmp_path / "new", model, model_args=arguments, masks=None, record={})
    assert not (tmp_path / "new").exists()
    dense = dense_folder(tmp_path / "dense")
    load_checkpoint(str(dense))
    spoil(dense / "model.safetensors", "blocks.1.mlp.fc1.bias")
    edit_json(dense / "pruning.json", files=sums(dense, ["model.safetensors"]))
    with pytest.raises(InputError, match=r"holds weights .*blocks\.1\.mlp\.fc1\.bias is not finite"):
        load_checkpoint(str(dense))


def spoil(file: Path, name: str) -> None:
    content = load_file(file)
    content[name].view(-1)[0] = torch.nan
    save_file(content, file)


@pytest.mark.parametrize(
    ("file", "name"), [("model.safetensors", "norm.weight"), ("trainer.safetensors", "model/norm.weight")]
)
def test_not_finite__a_checkpoint_of_before_that_holds_nan_is_left_aside(
    file: str, name: str, files: dict[str, str], tmp_path: Path
) -> None:
    log = Log(tmp_path)
    run(make_job(files, {"epochs": 1, "ema": 0.9}), log, CPU)
    assert damage(log.last) is None
    spoil(log.last / file, name)
    sealed = json.loads((log.last / "trainer.json").read_text())
    sealed["state"]["files"] |= sums(log.last, [file])
    content = {"seal": _checksum(sealed["state"]), "state": sealed["state"]}
    (log.last / "trainer.json").write_text(json.dumps(content))
    assert damage(log.last) == f"{file} holds values to go on from that are none: {name} is not finite"


def test_not_finite__a_limit_of_one_number_may_be_infinite() -> None:
    tensors = {"limit": torch.tensor(-math.inf), "number": torch.tensor([1]), "none": torch.zeros(0)}
    assert not_finite(tensors) == []
    assert not_finite({**tensors, "a": torch.tensor(math.nan), "b": torch.tensor([math.inf])}) == ["a", "b"]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_not_finite__a_trial_whose_score_is_not_finite_is_not_the_best(score: float, tmp_path: Path) -> None:
    log = TrialLog(str(tmp_path / "trials.json"))
    scores = {0: 0.5, 1: score, 2: 0.7}
    for number, item in scores.items():
        log.add(TrialRecord(number, {}, "finished", item, {"val_top1": 0.5, "macs": 1.0}))
    for result in (log, TrialLog(log.uri)):
        assert result.best().number == 2
        assert [record.state for record in result.trials] == ["finished", "failed", "finished"]
        assert [record.number for record in front(result.trials, "macs")] == [2]
    assert "its score is" in str(log.trials[1].error)
