"""Which weights of a model are prunable, and each one's module and stage.

A *layer* is one weight tensor. Its *module* is its function in the whole network (DIMAP's QKV-M, PRJ-M,
MLP-M; all else is AUX-M and stays dense), its *stage* the level of a hierarchical model it lies in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from pruners.errors import InputError, did_you_mean

# timm names of attention and MLP weights in ViT, DeiT, Swin, SwinV2 and XCiT (oViT's and DIMAP's choice).
DEFAULT_PATTERNS: dict[str, tuple[str, ...]] = {
    "QKV": (r"attn\.qkv",),
    "PRJ": (r"attn\.proj",),
    "MLP": (r"mlp\.fc\d",),
}

ISOTROPIC_STAGES = 4
_STAGE = re.compile(r"(?:^|\.)(?:layers|stages|layer)[._]?(\d+)\.")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


@dataclass(frozen=True)
class PrunableLayer:
    """One weight tensor that may be pruned; ``name`` is its parameter name in the model."""

    name: str
    module: str
    stage: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def find_layers(model: nn.Module, patterns: Mapping[str, Sequence[str]] | None = None) -> list[PrunableLayer]:
    """List the prunable layers of ``model``, in the order of its parameters.

    ``patterns`` maps a module's name to regular expressions on the trailing part of a layer's name without
    ``.weight`` (``attn\\.qkv``, ``mlp\\.fc\\d``); without it the attention and MLP weights of timm's
    vision transformers are taken. Stages are numbered from 0; an isotropic model's blocks are cut into
    four equal groups.

    Raises:
        InputError: a pattern is no regular expression, matches nothing, or two match the same layer;
            or a matched weight is shared with another layer.
    """
    chosen = DEFAULT_PATTERNS if patterns is None else patterns
    candidates = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.endswith(".weight") and parameter.ndim >= 2
    }
    module_of: dict[str, str] = {}
    for module, expressions in chosen.items():
        for expression in expressions:
            key = f"layers.{module}"
            matched = _matching(key, expression, candidates)
            if not matched:
                known = (
                    "this model has no attention and MLP weights by timm's names: give patterns of its own"
                    if patterns is None
                    else "must match at least one weight of the model"
                )
                raise InputError(key, expression, known + _closest(expression, candidates))
            for name in matched:
                if module_of.setdefault(name, module) != module:
                    raise InputError(key, expression, f"{name} already belongs to {module_of[name]}")
    _refuse_shared(model, module_of)
    names = [name for name in candidates if name in module_of]
    stages = _stages(names)
    return [
        PrunableLayer(name, module_of[name], stages[name], tuple(candidates[name].shape)) for name in names
    ]


def _matching(key: str, expression: str, candidates: Mapping[str, nn.Parameter]) -> list[str]:
    try:
        compiled = re.compile(rf"(?:^|\.)(?:{expression})$")
    except re.error as error:
        raise InputError(key, expression, f"must be a regular expression ({error})") from None
    return [name for name in candidates if compiled.search(name.removesuffix(".weight"))]


def _closest(expression: str, candidates: Mapping[str, nn.Parameter]) -> str:
    tails = {".".join(name.removesuffix(".weight").split(".")[-2:]) for name in candidates}
    return did_you_mean(expression.replace("\\", ""), sorted(tails))


def _refuse_shared(model: nn.Module, module_of: Mapping[str, str]) -> None:
    """A weight used in two places would be pruned for one of them only: name it instead."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name and (name in module_of or first in module_of):
            raise InputError("layers", name, f"shares its weight with {first}; tied weights cannot be pruned")


def _stages(names: Sequence[str]) -> dict[str, int]:
    found = {name: int(match[1]) for name in names if (match := _STAGE.search(name))}
    if not found:  # isotropic: equal groups of blocks
        blocks = {name: int(match[1]) for name in names if (match := _BLOCK.search(name))}
        depth = max(blocks.values(), default=0) + 1
        groups = min(ISOTROPIC_STAGES, depth)
        found = {name: block * groups // depth for name, block in blocks.items()}
    current = next(iter(found.values()), 0)
    for name in names:  # what lies outside stages and blocks (a stem, a last convolution) joins its neighbour
        current = found.setdefault(name, current)
    renumbered = {stage: number for number, stage in enumerate(sorted(set(found.values())))}
    return {name: renumbered[stage] for name, stage in found.items()}
