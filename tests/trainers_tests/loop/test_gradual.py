"""Dense training and gradual pruning of tiny models on real Parquet files, without any engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_tables import SWIN, VIT, VIT_ARGS, dense_folder, table, write
from safetensors.torch import load_file
from torch import nn

from pruners.allocation.projection import budget, project
from pruners.errors import InputError
from pruners.model.layers import find_layers
from pruners.model.masks import MaskSet
from trainers.checkpoint.folder import save_checkpoint
from trainers.checkpoint.trainer_state import STATE_TENSORS
from trainers.config.jobs import TrainJob
from trainers.loop import gradual
from trainers.loop.gradual import Progress, run
from trainers.loop.prune_step import reconstruct_step
from trainers.loop.session import Session

CPU = torch.device("cpu")
TARGET = 0.7
EPOCHS = 5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("images")
    train = write(folder / "train.parquet", table([i % 3 for i in range(48)]))
    validation = write(folder / "validation.parquet", table([i % 3 for i in range(15)], first=100))
    return {"train": train, "validation": validation}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("dense")
    return {name: str(dense_folder(folder / name, name)) for name in (VIT, SWIN)}


def job(files: Mapping[str, str], checkpoint: str | None, method: str | None, **changes: Any) -> TrainJob:
    """Pruning in three steps (epochs 0, 1, 2) of a checkpoint, or dense training of a tiny ViT."""
    model: dict[str, Any] = {"checkpoint": checkpoint}
    if checkpoint is None:
        model = {"architecture": VIT, "args": VIT_ARGS}
    training = {
        "epochs": EPOCHS,
        "batch_size": 8,
        "lr": {"kind": "cyclic", "peak": 2e-3, "floor": 1e-4},
        "augment": {"shift": 1, "flip": 0.5},
        "checkpoint_every": 2,
    }
    pruning = {
        "methods": ["dimap"],
        "sparsity": TARGET,
        "schedule": {"start": 0.4, "steps": 3, "last_at": 0.5},
        "fisher": {"gradients": 3, "batch_size": 4, "block_size": 16, "damp": 1e-4},
    }
    content = {
        "name": "tiny",
        "seed": 4,
        "model": {"classes": 3} | model,
        "data": dict(files),
        "training": training | changes.pop("training", {}),
        "pruning": None if method is None else pruning,
        "method": method,
        **changes,
    }
    return TrainJob.model_validate(content)


@dataclass
class Log:
    """A report that keeps every epoch's metrics, and the folders of those that were due."""

    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    saved: dict[int, Path] = field(default_factory=dict)
    between: dict[int, Path] = field(default_factory=dict)

    def __call__(self, progress: Progress) -> None:
        if "epoch" not in progress.metrics:  # within an epoch
            assert progress.save is not None
            self.between[progress.metrics["step"]] = self.folder / f"step-{progress.metrics['step']}"
            progress.save(self.between[progress.metrics["step"]])
            return
        self.metrics.append(dict(progress.metrics))
        if progress.save is not None:
            epoch = int(progress.metrics["epoch"])
            self.saved[epoch] = self.folder / str(epoch)
            progress.save(self.saved[epoch])


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """Every session that is opened."""
    sessions: list[Session] = []
    original = Session.open.__func__  # type: ignore[attr-defined]

    def opened(cls: type[Session], *arguments: Any, **options: Any) -> Session:
        sessions.append(original(cls, *arguments, **options))
        return sessions[-1]

    monkeypatch.setattr(Session, "open", classmethod(opened))
    return sessions


def zeros(model: nn.Module, session: Session) -> int:
    weights = dict(model.named_parameters())
    return sum(int((weights[layer.name] == 0).sum()) for layer in session.layers)


@pytest.mark.parametrize(
    "what", [(VIT, "dimap"), (VIT, "ovit"), (SWIN, "magnitude"), (SWIN, "ovit")], ids=":".join
)
def test_gradual__a_gradual_run(
    what: tuple[str, str],
    files: dict[str, str],
    dense: dict[str, str],
    tmp_path: Path,
    sessions: list[Session],
) -> None:
    """Zeros hold after every epoch, the target is met to the weight, its moments are forgotten."""
    architecture, method = what
    log = Log(tmp_path)
    before: dict[str, torch.Tensor] = {}
    sparsities = []

    def report(progress: Progress) -> None:
        session = sessions[0]
        assert session.masks is not None
        weights = dict(session.model.named_parameters())
        for name, mask in session.masks.items():
            assert not weights[name][~mask].any(), "a pruned weight came back"
            assert name not in before or not mask[~before[name]].any(), "a mask opened again"
            before[name] = mask.clone()
        sparsities.append(session.masks.sparsity)
        log(progress)

    run(job(files, dense[architecture], method), report, CPU)
    numel = sum(layer.numel for layer in sessions[0].layers)
    assert sparsities == [round(share * numel) / numel for share in (0.4, 0.55, TARGET, TARGET, TARGET)]
    assert sparsities == [row["sparsity"] for row in log.metrics]
    assert zeros(sessions[0].model, sessions[0]) == round(TARGET * numel)
    assert [row["epoch"] for row in log.metrics] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in log.metrics] == [6, 12, 18, 24, 30]
    assert sorted(log.saved) == [2, 4, 5]
    _costs_fall(log.metrics, numel)


def _costs_fall(metrics: list[dict[str, Any]], numel: int) -> None:
    last = metrics[-1]
    assert last["parameters"] - last["parameters_sparse"] == round(TARGET * numel)
    assert last["macs_sparse"] < last["macs"]
    scores = [row["score"] for row in metrics]
    at_target = [row["sparsity"] == last["sparsity"] for row in metrics]
    assert all((score > -1.0) == reached for score, reached in zip(scores, at_target, strict=True))
    assert [row["recovery_epochs"] for row in metrics if row["sparsity"] == last["sparsity"]] == list(
        range(1, sum(at_target) + 1)
    )


def test_gradual__the_rate_jumps_with_each_pruning_step(
    files: dict[str, str], dense: dict[str, str], tmp_path: Path
) -> None:
    log = Log(tmp_path)
    run(job(files, dense[VIT], "dimap"), log, CPU)
    rates = [row["step_lr"] for row in log.metrics]
    raised = [0] + [
        i for i in range(1, EPOCHS) if log.metrics[i]["sparsity"] > log.metrics[i - 1]["sparsity"]
    ]
    assert len(raised) == 3
    assert [epoch for epoch in range(EPOCHS) if rates[epoch][0] == pytest.approx(2e-3)] == raised
    flat = [rate for epoch in rates for rate in epoch]
    assert all(1e-4 <= rate <= 2e-3 + 1e-12 for rate in flat)


def test_gradual__pruned_weights_have_no_moments(
    files: dict[str, str], dense: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after a pruning step the optimizer knows nothing of what fell."""
    seen = []
    original = gradual._prune

    def check(session: Session, *arguments: Any, **options: Any) -> None:
        original(session, *arguments, **options)
        assert session.masks is not None
        weights = dict(session.model.named_parameters())
        for name, mask in session.masks.items():
            state = session.optimizer.state.get(weights[name], {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    assert not state[key][~mask].any()
                    assert state[key][mask].any()
                    seen.append(name)

    monkeypatch.setattr(gradual, "_prune", check)
    run(job(files, dense[VIT], "dimap"), lambda progress: None, CPU)
    assert len(seen) == 2 * 2 * 8  # two later steps, two moments, eight layers


@pytest.mark.parametrize("method", ["dimap", "ovit", None])
@pytest.mark.parametrize("at", [2, 4])
def test_gradual__a_resumed_run_ends_as_the_undisturbed_one(
    method: str | None, at: int, files: dict[str, str], dense: dict[str, str], tmp_path: Path
) -> None:
    """Bit for bit, on one CPU thread: weights, masks, the optimizer and all that is reported."""
    checkpoint = dense[VIT] if method else None
    whole, rest = Log(tmp_path / "whole"), Log(tmp_path / "rest")
    run(job(files, checkpoint, method), whole, CPU)
    run(job(files, checkpoint, method), rest, CPU, resume=whole.saved[at])
    assert rest.metrics == whole.metrics[at:]
    names = ["model.safetensors", STATE_TENSORS] + (["masks.safetensors"] if method else [])
    for name in names:
        first, second = (load_file(log.saved[EPOCHS] / name) for log in (whole, rest))
        assert set(first) == set(second)
        assert all(torch.equal(first[key], second[key]) for key in first), name


@pytest.mark.parametrize("broken_at", [1, 3], ids=["first step", "second step"])
def test_gradual__a_run_broken_off_before_a_reconstruction_does_the_step_again(
    broken_at: int,
    files: dict[str, str],
    dense: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fisher = {"gradients": 4, "batch_size": 4, "block_size": 16, "damp": 1e-4, "rounds": 2}
    schedule = {"start": 0.4, "steps": 2, "last_at": 0.5}  # at epochs 0 and 2
    pruning = {"sparsity": TARGET, "schedule": schedule, "fisher": fisher, "reconstruct": 12}
    asked = job(files, dense[VIT], "ovit", pruning=pruning)
    whole, broken = Log(tmp_path / "whole"), Log(tmp_path / "broken")
    run(asked, whole, CPU)
    assert 0 < whole.metrics[2]["layer_error"] < whole.metrics[2]["layer_error_before"]
    assert "layer_error" not in whole.metrics[1]

    done = 0

    def breaks_off(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == 1 + broken_at:
            raise KeyboardInterrupt
        return reconstruct_step(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(gradual, "reconstruct_step", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            run(asked, broken, CPU)
    assert set(broken.saved) == ({2} if broken_at == 3 else set())
    begin = max(broken.saved, default=0)
    run(asked, broken, CPU, resume=broken.saved.get(begin))
    assert broken.metrics[-EPOCHS + begin :] == whole.metrics[begin:]
    first, second = (load_file(log.saved[EPOCHS] / "model.safetensors") for log in (whole, broken))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_gradual__a_run_that_goes_on_says_its_last_report_again(
    files: dict[str, str], tmp_path: Path
) -> None:
    """Whoever compares runs by it may have been killed when it was said."""
    whole, rest = Log(tmp_path / "whole"), Log(tmp_path / "rest")
    run(job(files, None, None), whole, CPU, repeat=True)
    run(job(files, None, None), rest, CPU, resume=whole.saved[2], repeat=True)
    assert len(whole.metrics) == EPOCHS
    assert rest.metrics == whole.metrics[1:]


def test_gradual__the_same_seed_gives_the_same_run(files: dict[str, str], tmp_path: Path) -> None:
    logs = [Log(tmp_path / str(number)) for number in range(3)]
    for log, seed in zip(logs, (4, 4, 5), strict=True):
        run(job(files, None, None, seed=seed, training={"epochs": 2}), log, CPU)
    assert logs[0].metrics == logs[1].metrics
    assert logs[0].metrics != logs[2].metrics


def test_gradual__dense_training_learns(files: dict[str, str], tmp_path: Path) -> None:
    log = Log(tmp_path)
    training = {"epochs": 12, "augment": {}, "lr": {"kind": "cosine", "peak": 1e-2, "warmup_epochs": 1}}
    run(job(files, None, None, training=training), log, CPU)
    assert log.metrics[-1]["train_loss"] < log.metrics[0]["train_loss"] / 2
    assert log.metrics[-1]["val_top1"] > 0.6
    assert log.metrics[-1]["val_loss"] < 0.8 * log.metrics[0]["val_loss"]
    assert log.metrics[-1]["sparsity"] == 0.0
    plain = timm.create_model(f"local-dir:{log.saved[12]}", pretrained=True)
    assert plain.pretrained_cfg["input_size"] == (3, 16, 16)
    assert not (log.saved[12] / "masks.safetensors").exists()


def test_gradual__a_searched_allocation_is_met_to_the_weight(
    files: dict[str, str], dense: dict[str, str], tmp_path: Path, sessions: list[Session]
) -> None:
    model = timm.create_model(f"local-dir:{dense[VIT]}", pretrained=True)
    layers = find_layers(model)
    wishes, sizes = [0.6 + 0.05 * (i % 4) for i in range(len(layers))], [layer.numel for layer in layers]
    counts = project(wishes, sizes, budget(layers, TARGET))
    searched = {layer.name: count for layer, count in zip(layers, counts, strict=True)}
    assert len({round(count / size, 2) for count, size in zip(counts, sizes, strict=True)}) == 4
    log = Log(tmp_path)
    run(job(files, dense[VIT], "dimap", allocation=searched), log, CPU)
    assert sessions[0].masks is not None
    assert sessions[0].masks.pruned() == searched
    record = json.loads((log.saved[EPOCHS] / "pruning.json").read_text())
    assert record["allocation"] == searched
    assert record["figures"]["val_top1"] == log.metrics[-1]["val_top1"]


def test_gradual__an_allocation_of_another_sparsity_is_no_silent_one(
    files: dict[str, str], dense: dict[str, str], tmp_path: Path
) -> None:
    layers = find_layers(timm.create_model(f"local-dir:{dense[VIT]}", pretrained=True))
    searched = {layer.name: int(0.8 * layer.numel) for layer in layers}
    given = f"{sum(searched.values()):,} weights, and this is {budget(layers, TARGET):,}"
    with pytest.raises(
        InputError, match=rf"pruning\.sparsity = 0\.7: .* sparsity of the allocation: {given}"
    ):
        run(job(files, dense[VIT], "dimap", allocation=searched), Log(tmp_path), CPU)


@pytest.fixture
def sparse(dense: dict[str, str], tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """A checkpoint without masks of its own, most of its weights zero; where they are, by layer."""
    model = timm.create_model(f"local-dir:{dense[VIT]}", pretrained=True)
    weights = dict(model.named_parameters())
    zeros = {}
    with torch.no_grad():
        for number, layer in enumerate(find_layers(model)):
            weight = weights[layer.name]
            count = int((0.3 + 0.1 * (number % 3)) * layer.numel)
            weight.view(-1)[torch.randperm(layer.numel)[:count]] = 0.0
            zeros[layer.name] = weight == 0
    folder = tmp_path / "sparse"
    record = {"method": "none", "sparsity": 0.4, "allocation": {}}
    save_checkpoint(folder, model, model_args=VIT_ARGS, masks=None, record=record)
    return str(folder), zeros


@pytest.mark.parametrize("layers", [None, {"MLP": [r"mlp\.fc\d"]}], ids=["all", "of the MLPs alone"])
def test_gradual__zeros_of_before_stay_zero_through_training(
    files: dict[str, str],
    sparse: tuple[str, dict[str, torch.Tensor]],
    tmp_path: Path,
    layers: dict[str, list[str]] | None,
) -> None:
    checkpoint, zeros = sparse
    log = Log(tmp_path)
    given = job(files, checkpoint, "magnitude_global").model_dump(mode="json")
    given["pruning"]["layers"] = layers
    run(TrainJob.model_validate(given), log, CPU)
    weights = load_file(log.saved[EPOCHS] / "model.safetensors")
    masks = MaskSet.load(log.saved[EPOCHS] / "masks.safetensors")
    for name, before in zeros.items():
        assert not weights[name][before].any(), name
        assert not masks[name][before].any(), name
    pruned = [weights[name] for name in zeros if layers is None or ".mlp." in name]
    share = sum(int((weight == 0).sum()) for weight in pruned) / sum(weight.numel() for weight in pruned)
    assert share == pytest.approx(TARGET, abs=1e-3)
    assert log.metrics[-1]["sparsity"] == pytest.approx(TARGET, abs=1e-3)


def test_gradual__no_allocation_brings_zeros_back(
    files: dict[str, str], sparse: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    checkpoint, zeros = sparse
    sizes = {name: before.numel() for name, before in zeros.items()}
    first, second = list(zeros)[:2]
    searched = {name: round(TARGET * size) for name, size in sizes.items()}
    few = int(zeros[first].sum()) - 5
    total = round(TARGET * sum(sizes.values()))
    searched[first] = few
    searched[second] += total - sum(searched.values())
    one_shot = {"methods": ["magnitude"], "sparsity": TARGET, "schedule": {"kind": "one_shot"}}
    given = job(files, checkpoint, "magnitude").model_dump(mode="json") | {
        "pruning": one_shot,
        "allocation": searched,
    }
    with pytest.raises(
        InputError, match=rf"allocation\.{first} = {few}: {few + 5:,} of its weights are zero"
    ):
        run(TrainJob.model_validate(given), Log(tmp_path), CPU)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Makes ``blocks.1.mlp.fc1`` answer NaN in some steps of the run."""

    def at(steps: set[int]) -> None:
        original = gradual.train_step

        def step(session: Session, batch: Any) -> None:
            layer = session.model.get_submodule("blocks.1.mlp.fc1")
            hooks = []
            if session.step in steps:
                hooks = [layer.register_forward_hook(lambda module, given, output: output * torch.nan)]
            try:
                original(session, batch)
            finally:
                for hook in hooks:
                    hook.remove()

        monkeypatch.setattr(gradual, "train_step", step)

    return at


def test_gradual__a_loss_that_is_nan_ends_the_run(
    files: dict[str, str], dense: dict[str, str], tmp_path: Path, poisoned: Callable[[set[int]], None]
) -> None:
    """Step, layer and images are named, and the weights of before are those of the last checkpoint."""
    poisoned({7})
    log = Log(tmp_path)
    says = (
        r"nan in step 1 of epoch 1; blocks\.1\.mlp\.fc1 is the first .* not finite, for train\.parquet, row"
    )
    with pytest.raises(FloatingPointError, match=says):
        run(job(files, dense[VIT], "dimap"), log, CPU)
    assert len(log.metrics) == 1


def test_gradual__steps_that_are_not_finite_may_be_left_out(
    files: dict[str, str], dense: dict[str, str], tmp_path: Path, poisoned: Callable[[set[int]], None]
) -> None:
    poisoned({7, 9})
    log = Log(tmp_path)
    run(job(files, dense[VIT], "dimap", training={"on_nan": "skip"}), log, CPU)
    assert [row["skipped_steps"] for row in log.metrics] == [0, 2, 2, 2, 2]
    model = timm.create_model(f"local-dir:{log.saved[EPOCHS]}", pretrained=True)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_gradual__too_many_steps_that_are_not_finite(
    files: dict[str, str], dense: dict[str, str], tmp_path: Path, poisoned: Callable[[set[int]], None]
) -> None:
    poisoned(set(range(5, 30)))
    with pytest.raises(FloatingPointError, match="after 10 steps left out"):
        run(job(files, dense[VIT], "dimap", training={"on_nan": "skip"}), Log(tmp_path), CPU)


@pytest.mark.parametrize("mixing", [{"mixup": 0.5}, {"cutmix": 1.0}])
def test_gradual__mixed_images(mixing: dict[str, float], files: dict[str, str], tmp_path: Path) -> None:
    training = {"epochs": 1, "augment": mixing, "label_smoothing": 0.1}
    log = Log(tmp_path)
    run(job(files, None, None, training=training), log, CPU)
    assert log.metrics[0]["train_loss"] > 0


def test_gradual__mixed_images_with_an_odd_last_batch(files: dict[str, str], tmp_path: Path) -> None:
    odd = {**files, "train": write(tmp_path / "odd.parquet", table([i % 3 for i in range(21)]))}
    log = Log(tmp_path)
    run(job(odd, None, None, training={"epochs": 1, "augment": {"mixup": 0.5}}), log, CPU)
    assert log.metrics[0]["step"] == 3


def test_gradual__an_unknown_optimizer(files: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"training\.optimizer = 'adamv'"):
        run(job(files, None, None, training={"optimizer": "adamv"}), lambda progress: None, CPU)


@pytest.mark.parametrize(
    "optimizer",
    ["sgd", "lamb", "lion"],
)
def test_gradual__other_optimizers_resume_too(
    optimizer: str, files: dict[str, str], dense: dict[str, str], tmp_path: Path
) -> None:
    whole, rest = Log(tmp_path / "whole"), Log(tmp_path / "rest")
    changes = {"optimizer": optimizer}
    run(job(files, dense[VIT], "dimap", training=changes), whole, CPU)
    run(job(files, dense[VIT], "dimap", training=changes), rest, CPU, resume=whole.saved[2])
    assert rest.metrics == whole.metrics[2:]
