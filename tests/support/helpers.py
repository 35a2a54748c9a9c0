"""What several test files build: tiny timm models without weights, random batches, lone layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pruners import METHODS, PrunableLayer, Pruner, create_pruner
from pruners.elimination.gradients import Batch
from pruners.methods.ovit import OViT

CLASSES = 5
torch.set_num_threads(1)  # tensors are small here; what threads change is tested where they are set

PRUNERS: dict[str, Callable[[], Pruner]] = {
    **{name: (lambda name=name: create_pruner(name)) for name in METHODS},
    "ovit-blocks-of-7": lambda: OViT(block_size=7, damp=1e-4),  # divides no layer below
}
"""Every implementation that the contract holds for."""


def quick(examples: int) -> settings:
    """Hypothesis settings for tests of tensors: no deadline, the same examples on every run."""
    return settings(max_examples=examples, deadline=None, derandomize=True)


def tiny_swin(seed: int = 0) -> nn.Module:
    """Two stages of two blocks, 3840 prunable weights, 32 by 32 images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SwinTransformer(
            img_size=32,
            patch_size=4,
            window_size=4,
            embed_dim=8,
            depths=(1, 1),
            num_heads=(2, 2),
            num_classes=CLASSES,
        )


def tiny_vit(seed: int = 0) -> nn.Module:
    """Four blocks, 3072 prunable weights, 32 by 32 images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(
            img_size=32, patch_size=8, embed_dim=8, depth=4, num_heads=2, num_classes=CLASSES
        )


def tiny_conv(seed: int = 0) -> nn.Module:
    """Convolutions of 16 by 8 by 3 by 3 and 8 by 16 by 1 by 1 behind a stem of three inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4, padding=1),
            nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.GELU(),
            nn.Conv2d(16, 8, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, CLASSES),
        )


CONVOLUTIONS = {"CONV": ["2", "4"]}
"""The layers of :func:`tiny_conv` whose inputs fall into groups of 4 and of 8."""


def uneven(training: bool = True) -> nn.Module:
    """A model in one mode, one of its parts in the other, with a gradient on one parameter."""
    model = tiny_vit().train(training)
    model.get_submodule("blocks.1").train(not training)
    weight = model.get_parameter("blocks.0.attn.qkv.weight")
    weight.grad = torch.full_like(weight, 0.5)
    return model


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch, and of the compiled loops, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


MODELS: dict[str, Callable[[], nn.Module]] = {"swin": tiny_swin, "vit": tiny_vit}


def batches(count: int = 6, *, nan_in: int | None = None) -> list[Batch]:
    """Random (images, labels) for the tiny models; the images of batch ``nan_in`` are NaN."""
    random = torch.Generator().manual_seed(7)
    made = [
        (
            torch.randn(4, 3, 32, 32, generator=random),
            torch.randint(CLASSES, (4,), generator=random),
        )
        for _ in range(count)
    ]
    if nan_in is not None:
        made[nan_in][0].fill_(torch.nan)
    return made


def lone_layer(*shape: int, name: str = "a.weight", module: str = "MLP", stage: int = 0) -> PrunableLayer:
    return PrunableLayer(name, module, stage, shape)


def state(model: nn.Module) -> dict[str, tuple[bytes, bool]]:
    """Every bit that pruning could have changed: values, each submodule's mode, gradients."""
    values = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    gradients = {
        f"{name}.grad": b"" if parameter.grad is None else np.asarray(parameter.grad).tobytes()
        for name, parameter in model.named_parameters()
    }
    bits = {name: (value, True) for name, value in {**values, **gradients}.items()}
    return bits | {f"{name}.training": (b"", module.training) for name, module in model.named_modules()}


def zeros(model: nn.Module, layers: list[PrunableLayer]) -> dict[str, Tensor]:
    weights = dict(model.named_parameters())
    return {layer.name: weights[layer.name].detach() == 0 for layer in layers}


class Quiet:
    """An observer of a search that does not listen."""

    def trial_started(self, *_: Any) -> None: ...
    def trial_reported(self, *_: Any) -> None: ...
    def trial_ended(self, *_: Any) -> None: ...
