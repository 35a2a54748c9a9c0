"""Packed weights: sparse tensors as a bitmap of the non-zero weights, and the values of these.

One safetensors file. A packed tensor ``NAME`` is two tensors of ``uint8`` in it: ``NAME.mask``, the bits of
:func:`numpy.packbits` over the flat tensor in C order (its default order: the first weight is the highest bit
of the first byte; the last byte is filled up with zeros; 1 is a weight that is stored), and ``NAME.values``,
the stored weights in the same order: the first byte of each (as they lie in memory, least significant first),
then the second of each, and so on, deflated by zlib. The last bytes hold sign and exponent, of which a layer
has few: they take a quarter of their space. All other tensors are as they were. The one metadata entry,
:data:`PACKED_FORMAT`, is JSON: ``packed``, type and shape of the packed tensors, and ``masks``, the names of
the pruned layers. A layer's mask is its ``NAME.mask``, or ``NAME.kept`` (packed alike) where the two differ.

A weight is zero if none of its bits is set: -0.0 is stored. Packing is lossless, bit for bit.
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
_HEADER_BYTES = 256  # that a packed tensor takes in the file's header
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_packed(path: Path, tensors: Mapping[str, Tensor], masks: MaskSet | None) -> list[str]:
    """Write a packed file; tensors that packing would not make smaller are stored as they are.

    Args:
        path: the file to write.
        tensors: by their names.
        masks: of some of the tensors, by name.

    Returns:
        Names of the tensors that are packed.
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
    # one entry: safetensors writes several in random order, and equal weights must give equal files
    save_file(stored, path, metadata={PACKED_FORMAT: json.dumps(about, sort_keys=True)})
    return list(packed)


def read_packed(path: Path) -> tuple[dict[str, Tensor], MaskSet | None]:
    """Read the tensors and masks that :func:`write_packed` wrote.

    Raises:
        ValueError: the file is truncated, or is no packed file.
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
        masks = {name: _mask(kept_bits, stored[name].shape) for name, kept_bits in kept.items()}
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, RuntimeError, zlib.error) as error:
        raise ValueError(str(error)) from None
    return stored, MaskSet(masks) if masks else None


def _pack(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Bitmap and compressed values of a tensor; ``None`` if they take no less space."""
    size = tensor.element_size()
    if size not in _WORDS:
        return None
    words = tensor.detach().cpu().contiguous().reshape(-1).view(_WORDS[size])
    stored = words != 0
    bits, values = _bits(stored), words[stored]
    if (len(words) - len(values)) * size - len(bits) <= _HEADER_BYTES:
        return None
    planes = np.ascontiguousarray(values.numpy().view(np.uint8).reshape(-1, size).T)
    return bits, torch.frombuffer(bytearray(zlib.compress(planes.tobytes())), dtype=torch.uint8)


def _unpack(bits: Tensor, deflated: np.ndarray, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    stored = _mask(bits, [math.prod(shape)])
    tensor = torch.zeros(len(stored), dtype=dtype)
    size, count = tensor.element_size(), int(stored.sum())
    inflate = zlib.decompressobj()
    # one byte more than allowed: a file that would decompress to gigabytes is refused early
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
