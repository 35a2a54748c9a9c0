"""Weights with zeros in less space: for each a bit that says whether it is zero, and the values of the rest.

One safetensors file. A packed tensor ``NAME`` is two tensors of ``uint8`` in it: ``NAME.mask``, the bits of
:func:`numpy.packbits` over the flat tensor in C order (its default order: the first weight is the highest bit
of the first byte; the last byte is filled up with zeros; 1 is a weight that is stored), and ``NAME.values``,
the stored weights in the same order: the first byte of each (as they lie in memory, least significant first),
then the second of each, and so on, deflated by zlib. The last bytes hold sign and exponent, of which a layer
has few: they take a quarter of their space. All other tensors are as they were. The one metadata entry,
:data:`PACKED_FORMAT`, is JSON: ``packed``, type and shape of the packed tensors, and ``masks``, the names of
the pruned layers. A layer's mask is its ``NAME.mask``, or ``NAME.kept`` (packed alike) where the two differ.

Zero is what has no bit set: -0.0 is stored. Nothing is computed with the values, so every bit comes back.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pruners.arithmetic import ceil_div
from pruners.model.masks import MaskSet

PACKED_FORMAT = "espalier-packed-2"
_ENTRY = 256  # bytes that a packed tensor costs in the header
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_packed(path: Path, tensors: Mapping[str, Tensor], masks: MaskSet | None) -> list[str]:
    """Write the file; returns the names of the tensors that packing makes smaller, and which are packed.

    Args:
        masks: of some of the tensors, by name.
    """
    stored: dict[str, Tensor] = {}
    packed: dict[str, tuple[str, list[int]]] = {}
    for name, tensor in tensors.items():
        pair = _pack(tensor)
        if pair is None:
            stored[name] = tensor.contiguous()
            continue
        packed[name] = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        stored[f"{name}.mask"], stored[f"{name}.values"] = pair
    for name, mask in (masks or {}).items():
        bits = _bits(mask.reshape(-1))
        if name not in packed or not torch.equal(bits, stored[f"{name}.mask"]):
            stored[f"{name}.kept"] = bits
    about = {"packed": packed, "masks": sorted(masks or {})}
    # a single entry: safetensors writes several in any order, and equal weights shall be equal files
    save_file(stored, path, metadata={PACKED_FORMAT: json.dumps(about, sort_keys=True)})
    return list(packed)


def read_packed(path: Path) -> tuple[dict[str, Tensor], MaskSet | None]:
    """What :func:`write_packed` was given, bit for bit.

    Raises:
        ValueError: the file is truncated, or was not written so.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[PACKED_FORMAT])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        packed: dict[str, tuple[str, list[int]]] = about["packed"]
        bits = {name: stored.pop(f"{name}.mask") for name in packed}
        kept = {name: stored.pop(f"{name}.kept", bits.get(name)) for name in about["masks"]}
        for name, (kind, shape) in packed.items():
            values = stored.pop(f"{name}.values").numpy()
            stored[name] = _unpack(bits[name], values, getattr(torch, kind), shape)
        masks = {name: _mask(found, stored[name].shape) for name, found in kept.items()}
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, RuntimeError, zlib.error) as error:
        raise ValueError(str(error)) from None
    return stored, MaskSet(masks) if masks else None


def _pack(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Bits and values; ``None`` if that saves nothing."""
    size = tensor.element_size()
    if size not in _WORDS:
        return None
    words = tensor.detach().cpu().contiguous().reshape(-1).view(_WORDS[size])
    stored = words != 0
    bits, values = _bits(stored), words[stored]
    if (len(words) - len(values)) * size - len(bits) <= _ENTRY:
        return None
    planes = np.ascontiguousarray(values.numpy().view(np.uint8).reshape(-1, size).T)
    return bits, torch.frombuffer(bytearray(zlib.compress(planes.tobytes())), dtype=torch.uint8)


def _unpack(bits: Tensor, deflated: np.ndarray, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    stored = _mask(bits, [math.prod(shape)])
    tensor = torch.zeros(len(stored), dtype=dtype)
    size, count = tensor.element_size(), int(stored.sum())
    inflate = zlib.decompressobj()
    # one byte more than there may be: a file that inflates to gigabytes is refused, not read
    planes = np.frombuffer(inflate.decompress(deflated.tobytes(), size * count + 1), np.uint8)
    if len(planes) != size * count or not inflate.eof:
        raise ValueError(f"its values do not fit {count} bits")
    values = torch.from_numpy(np.ascontiguousarray(planes.reshape(size, -1).T).reshape(-1))
    tensor.view(_WORDS[size])[stored] = values.view(_WORDS[size])
    return tensor.reshape(tuple(shape))


def _bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def _mask(bits: Tensor | None, shape: Sequence[int]) -> Tensor:
    numel = math.prod(shape)
    if bits is None or bits.dtype != torch.uint8 or bits.shape != (ceil_div(numel, 8),):
        raise ValueError(f"its bits do not fit a tensor of {list(shape)}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=numel).astype(bool)).reshape(tuple(shape))
