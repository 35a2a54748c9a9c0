"""Masks: which weights are kept. In files they take one bit a weight."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pruners.arithmetic import ceil_div
from pruners.errors import InputError
from pruners.model.layers import PrunableLayer

_FORMAT = "espalier-masks-2"


class MaskSet(Mapping[str, Tensor]):
    """A boolean tensor for each prunable layer (by parameter name); ``True`` is a kept weight.

    >>> report = pruners.prune(model, "dimap", 0.75)
    >>> masks = MaskSet.from_zeros(model, layers)
    >>> masks.sparsity
    0.75
    >>> masks["blocks.0.attn.qkv.weight"].shape
    torch.Size([48, 16])
    >>> with torch.no_grad():  # after a step of training: zeros stay zero
    ...     masks.mask_(dict(model.named_parameters()))
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @classmethod
    def dense(cls, model: nn.Module, layers: Sequence[PrunableLayer]) -> MaskSet:
        """Masks that keep every weight of some layers."""
        weights = dict(model.named_parameters())
        return cls({layer.name: torch.ones_like(weights[layer.name], dtype=torch.bool) for layer in layers})

    @classmethod
    def from_zeros(cls, model: nn.Module, layers: Sequence[PrunableLayer]) -> MaskSet:
        """Read the masks off a sparse model: its zeros are pruned weights."""
        weights = dict(model.named_parameters())
        return cls({layer.name: weights[layer.name].detach() != 0 for layer in layers})

    def to(self, device: torch.device) -> MaskSet:
        """The same masks on another device."""
        return MaskSet({name: mask.to(device) for name, mask in self._masks.items()})

    def of(self, layers: Sequence[PrunableLayer]) -> MaskSet:
        """The masks of some layers, each of which must have one."""
        return MaskSet({layer.name: self._masks[layer.name] for layer in layers})

    def over(self, others: MaskSet | None) -> MaskSet:
        """These masks, and those of layers that are only in ``others``."""
        return MaskSet({**(others or {}), **self._masks})

    def mask_(self, tensors: Mapping[str, Tensor]) -> None:
        """Zero the pruned entries of tensors of the same names, in place: weights, gradients, moments."""
        for name, mask in self._masks.items():
            if name in tensors:
                tensors[name].masked_fill_(~mask, 0.0)

    def pruned(self) -> dict[str, int]:
        """Number of pruned weights in each layer, by parameter name."""
        return {name: mask.numel() - int(mask.sum()) for name, mask in self._masks.items()}

    @property
    def numel(self) -> int:
        """Number of weights in all layers."""
        return sum(mask.numel() for mask in self._masks.values())

    @property
    def sparsity(self) -> float:
        """Pruned share of the prunable weights, 0 to 1."""
        return sum(self.pruned().values()) / max(self.numel, 1)

    def fingerprint(self) -> str:
        """A hash of all masks, to compare those of two workers."""
        digest = hashlib.sha256()
        for name, bits in self._packed().items():
            digest.update(repr((name, tuple(self._masks[name].shape))).encode())
            digest.update(bits.numpy().tobytes())
        return digest.hexdigest()

    def _packed(self) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(np.packbits(self._masks[name].cpu().numpy().reshape(-1)))
            for name in sorted(self._masks)
        }

    def save(self, path: Path) -> None:
        """Write a ``uint8`` tensor of packed bits for each layer; shapes go into the metadata."""
        shapes = {name: list(mask.shape) for name, mask in self._masks.items()}
        # One entry only: safetensors writes several in any order, and equal masks must give equal files.
        save_file(self._packed(), path, metadata={_FORMAT: json.dumps(shapes, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> MaskSet:
        """Read a file that :meth:`save` wrote.

        Raises:
            InputError: the file is truncated, or it is no mask file of Espalier.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = dict(file.metadata() or {})
                packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has error classes of its own for a broken header
            raise InputError("masks", str(path), f"must be a readable mask file ({error})") from None
        try:
            shapes: dict[str, list[int]] = json.loads(about[_FORMAT])
            foreign = set(shapes) != set(packed)
        except (KeyError, ValueError, TypeError):
            foreign = True
        if foreign:
            raise InputError("masks", str(path), "must be a mask file written by espalier")
        try:
            return cls({name: _unpack(bits, shapes[name]) for name, bits in packed.items()})
        except (ValueError, TypeError) as error:
            raise InputError("masks", str(path), f"must be a sound mask file ({error})") from None


def _unpack(bits: Tensor, sides: Sequence[int]) -> Tensor:
    shape = tuple(int(side) for side in sides)
    numel = math.prod(shape)
    if bits.dtype != torch.uint8 or min(shape) < 0 or bits.shape != (ceil_div(numel, 8),):
        raise ValueError(f"its bits do not fit a layer of {sides}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=numel).astype(bool)).reshape(shape)
