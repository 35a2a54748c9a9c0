"""Every path that takes a device, on tensors that say they lie on CUDA: none meets a tensor of the CPU.

What comes out is held against the same run on the CPU by the batched formulation, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batches, tiny_vit
from image_tables import VIT_ARGS, dense_folder
from labelled_cuda import CUDA, MixedDevicesError, OnCuda, labelled_cuda
from one_shot_inputs import actor, one_shot_inputs
from orders import assert_close_updates
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_runs import Log, make_files, make_job

from orchestration.recipe.search import AllocationSearch
from orchestration.search.one_shot_trial import OneShotTrial
from pruners import METHODS, create_pruner, find_layers, prune
from pruners.elimination import kernels
from pruners.elimination.order import EliminationOrder
from trainers.checkpoint.folder import load_checkpoint, save_checkpoint
from trainers.config.structured import StructuredSettings
from trainers.loop.evaluation import evaluate
from trainers.loop.gradual import run
from trainers.models import factory
from trainers.structured.cut import cut_model, plan_cut

CPU = torch.device("cpu")
LAYERS = [layer for layer in find_layers(tiny_vit()) if layer.name.startswith("blocks.1.")]
OPTIONS: dict[str, Any] = {"block_size": 16, "damp": 1e-2}


@pytest.fixture(autouse=True)
def _batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU works as a GPU does, so that the two can be held against each other."""
    supports = kernels.threads.supports
    monkeypatch.setattr(kernels.threads, "supports", lambda *tensors: False)
    assert supports(torch.zeros(1)), "what is switched off here is on by itself"


@contextmanager
def on(device: torch.device) -> Iterator[torch.device]:
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention rounds otherwise
        if device == CPU:
            yield device
            return
        with labelled_cuda() as labelled:
            yield labelled


def held(tensor: torch.Tensor) -> torch.Tensor:
    """Its numbers, wherever it says it lies."""
    plain = tensor.detach()
    return plain.held if isinstance(plain, OnCuda) else plain


def test_device__labelled_cuda_refuses_tensors_of_two_devices() -> None:
    with labelled_cuda() as device:
        ours, other = torch.ones(3, device=device), torch.ones(3)
        for mixed in (
            lambda: ours + other,
            lambda: other.mul_(ours),
            lambda: torch.cat([ours, other]),
            lambda: ours.unsqueeze(0) @ other.unsqueeze(1),
            lambda: other[torch.zeros(1, dtype=torch.long, device=device)],
            lambda: ours.masked_fill(other > 0, 0.0),
        ):
            with pytest.raises(MixedDevicesError):
                mixed()
        for unreadable in (ours.numpy, lambda: torch.as_tensor(ours).detach().numpy()):
            with pytest.raises(TypeError, match="cuda"):
                unreadable()
        # allowed on a real device too
        assert float((ours + torch.tensor(1.0)).sum()) == 6.0
        assert ours[torch.tensor([0, 2])].device == CUDA
        other.copy_(ours * 2)
    assert other.tolist() == [2.0, 2.0, 2.0]


PATTERNS = [(method, "unstructured") for method in METHODS]
PATTERNS += [(method, pattern) for method in ("ovit", "dimap") for pattern in ("2:4", "1x4")]


def pruned(device: torch.device, method: str, count: int = 4, **options: Any) -> dict[str, torch.Tensor]:
    """Weights and masks after two prunings, the second one of a model that has zeros."""
    model, layers = tiny_vit(), LAYERS
    unit = "1x4" if options.get("pattern") == "1x4" else "unstructured"
    sparsity = None if options.get("pattern") == "2:4" else 0.6
    taken = OPTIONS if create_pruner(method).gradients else {}
    with on(device):
        model.to(device)
        prune(model, "magnitude_global", 0.2, layers=layers, pattern=unit)
        report = prune(model, method, sparsity, layers=layers, batches=batches(count), **{**taken, **options})
    if options.get("reconstruct"):
        assert report.reconstruction is not None
        assert len(report.reconstruction.errors) == len(layers)
    masks = {f"{name}/mask": held(mask) for name, mask in report.masks.items()}
    return masks | {name: held(weight) for name, weight in model.named_parameters()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(("method", "pattern"), PATTERNS)
def test_device__prune(method: str, pattern: str) -> None:
    assert_same(pruned(CUDA, method, pattern=pattern), pruned(CPU, method, pattern=pattern))


@pytest.mark.parametrize(
    "options",
    [{"per_sample": True}, {"damp": "auto"}, {"memory": 40_000}, {"block_size": 70, "double": True}],
    ids=lambda options: next(iter(options)),
)
def test_prune__options_of_the_fisher(options: dict[str, Any]) -> None:
    if options == {"damp": "auto"}:
        options = options | {"gradients": 4, "count": 6}
    assert_same(pruned(CUDA, "ovit", **options), pruned(CPU, "ovit", **options))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ovit", {"rounds": [0.4, 0.6], "gradients": 4}),
        ("ovit", {"reconstruct": 6}),
        ("magnitude", {"reconstruct": 6}),
        ("ovit", {"rounds": 2, "reconstruct": 6, "damp": "auto", "gradients": 4, "count": 6}),
    ],
    ids=["rounds", "reconstruct", "reconstruct alone", "both"],
)
def test_prune__rounds_and_reconstruction(method: str, options: dict[str, Any]) -> None:
    assert_same(pruned(CUDA, method, **options), pruned(CPU, method, **options))


def test_prune__half_precision() -> None:
    model = tiny_vit().bfloat16()
    with labelled_cuda() as device:
        model.to(device)
        report = prune(model, "ovit", 0.6, layers=LAYERS, batches=batches(4), **OPTIONS)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("updates", [True, False])
def test_order__loaded_onto_the_device(tmp_path: Path, updates: bool) -> None:
    model = tiny_vit()
    dense = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    report = prune(model, "ovit", 0.6, layers=LAYERS, batches=batches(4), **OPTIONS)
    report.order.save(tmp_path, "f")
    with labelled_cuda() as device:
        order = EliminationOrder.load(tmp_path, "f", updates=updates).on(str(device))
        weights = {name: dense[name].to(device) for name in order}
        moved, masks = order.weights_at(weights, report.allocation)
        assert all(mask.device == CUDA for mask in masks.values())
    for name, mask in masks.items():
        assert torch.equal(held(mask), report.masks[name])
    if updates:
        pruned = {name: model.get_parameter(name).detach() for name in masks}
        assert_close_updates({name: held(moved[name]) for name in masks}, pruned, dense)


FISHER = {"gradients": 8, "batch_size": 4, "damp": 1e-4, "block_size": 8}
OVIT = {"methods": ["ovit"], "fisher": FISHER}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "dense, all of augmentation": (
        {
            "epochs": 2,
            "accumulate": 2,
            "checkpoint_steps": 10,
            "augment": {"mixup": 0.2, "cutmix": 0.2, "erasing": 0.5, "rand_augment": "rand-m5-n2"},
        },
        None,
        {},
    ),
    "dimap, momentum, soft teacher": (
        {
            "optimizer": "momentum",
            "channels_last": True,
            "checkpoint_every": 2,
            "distill": {"teacher": "dense"},
        },
        {},
        {},
    ),
    "ovit, average, hard teacher": (
        {"ema": 0.9, "checkpoint_every": 2, "distill": {"teacher": "dense", "kind": "hard"}},
        OVIT,
        {"method": "ovit"},
    ),
    "ovit, damp auto, layer decay": (
        {"epochs": 2, "layer_decay": 0.9, "moments": "reset", "clip_grad": None, "checkpoint_steps": 10},
        {"methods": ["ovit"], "fisher": {**FISHER, "damp": "auto"}, "schedule": {"kind": "one_shot"}},
        {"method": "ovit"},
    ),
    "ovit in rounds, reconstruction": (
        {"checkpoint_every": 2},
        {"methods": ["ovit"], "fisher": {**FISHER, "rounds": 2}, "reconstruct": 8},
        {"method": "ovit"},
    ),
    "dimap, reconstruction": ({"checkpoint_every": 2}, {"reconstruct": 8}, {}),
}


def trained(
    device: torch.device, name: str, files: dict[str, str], folder: Path, resume: Path | None = None
) -> Log:
    training, pruning, changes = RUNS[name]
    training = {"optimizer_args": {"foreach": False}, **training}  # the same steps on both
    folder.mkdir()
    log = Log(folder)
    with on(device):
        run(make_job(files, training, pruning, **changes), log, device, resume=resume)
    return log


def weights_in(log: Log) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}/{name}": tensor
        for file in log.last.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_run__as_on_the_cpu_and_after_a_restart(name: str, tmp_path: Path) -> None:
    """Training, pruning steps, evaluation, what is kept, checkpoints; going on before a pruning step, too."""
    files = make_files(tmp_path)
    expected = trained(CPU, name, files, tmp_path / "cpu")
    log = trained(CUDA, name, files, tmp_path / "cuda")
    assert [row["val_loss"] for row in log.metrics] == [row["val_loss"] for row in expected.metrics]
    assert_same(weights_in(log), weights_in(expected))
    again = trained(CUDA, name, files, tmp_path / "again", log.saved[min(log.saved)])
    assert_same(weights_in(again), weights_in(expected))


def test_run__sparse_model_that_is_pruned_further(tmp_path: Path) -> None:
    """Its masks are read on the CPU."""
    files = make_files(tmp_path)
    sparse = tmp_path / "sparse"
    model = load_checkpoint(files["dense"]).model
    masks = prune(model, "magnitude", 0.4).masks
    save_checkpoint(sparse, model, model_args=VIT_ARGS, masks=masks, record={"method": "magnitude"})
    files["dense"] = str(sparse)
    log = trained(CUDA, "ovit, average, hard teacher", files, tmp_path / "out")
    final = load_checkpoint(str(log.last))
    assert final.masks is not None
    assert final.masks.sparsity == pytest.approx(0.7, abs=1e-3)
    assert all(not bool((final.masks[name] & ~mask).any()) for name, mask in masks.items())


def test_device__one_shot_trial(tmp_path: Path) -> None:
    """An actor of an allocation search that has a share of a GPU."""
    search = AllocationSearch.model_validate({"trials": 2, "gpus_per_trial": 0.5, "first_images": 4})
    inputs = one_shot_inputs(str(dense_folder(tmp_path / "dense")), search, tmp_path)
    steps: dict[str, list[dict[str, Any]]] = {}
    for device in ("cuda", "cpu"):
        with pytest.MonkeyPatch.context() as patch, on(torch.device(device)):
            patch.setattr(type(inputs), "device", property(lambda _, device=device: device))
            trial: OneShotTrial = actor(inputs)
            steps[device] = [trial.step()]
            while not steps[device][-1]["done"]:
                steps[device].append(trial.step())
    assert len(steps["cuda"]) > 1
    assert steps["cuda"] == steps["cpu"]


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "fisher"])
def test_device__cut_model(importance: str, tmp_path: Path) -> None:
    settings = StructuredSettings.model_validate({"mlp": 0.5, "importance": importance})
    cuts = []
    for device in (CUDA, CPU):
        model = load_checkpoint(str(dense_folder(tmp_path / str(device.type)))).model
        images = [
            (
                torch.randn(4, 3, *factory.input_size(model)[1:], generator=torch.Generator().manual_seed(1)),
                torch.arange(4) % 3,
            )
        ]
        with on(device):
            model.to(device)
            cuts.append(cut_model(model, plan_cut(model, VIT_ARGS, settings), settings, images))
    assert_same(*({name: held(weight) for name, weight in made.state_dict().items()} for made in cuts))


def test_device__evaluate() -> None:
    model = tiny_vit()
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention of a CPU is not taken for tensors that say CUDA
        expected = evaluate(model, batches(3))
    with labelled_cuda() as device:
        assert evaluate(model.to(device), batches(3)) == expected


def test_evaluate__a_layer_left_on_the_cpu_is_noticed() -> None:
    model = tiny_vit()
    with labelled_cuda() as device:
        model.to(device)
        model.head = nn.Linear(8, 5)
        with pytest.raises(MixedDevicesError):
            evaluate(model, batches(1))
