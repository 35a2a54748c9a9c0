"""From a timm vision transformer to the folder that :mod:`trainers.sparse.runtime` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor, nn

from trainers.checkpoint import checksums
from trainers.sparse.engine import SPARSE_FROM
from trainers.sparse.kernels.int8 import EXTRA_ROWS
from trainers.sparse.program import Attention, LayerNorm, Linear, Operation, Program, Quantize, to_json
from trainers.sparse.runtime import PROGRAM, TENSORS
from trainers.sparse.weights import to_int8

Tensors = dict[str, NDArray[np.generic]]


def numbers(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def add_linear(
    tensors: Tensors,
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    *,
    factor: Tensor | None = None,
    int8: bool = False,
) -> None:
    """A linear layer's tensors; with ``factor`` (LayerScale) its outputs are multiplied by it, with
    ``int8`` the weights are bytes, of which blocks of four zeros are left out."""
    weight = weight.detach().float()
    bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()
    if factor is not None:
        weight, bias = weight * factor.detach()[:, None], bias * factor.detach()
    tensors[f"{name}/bias"] = numbers(bias)
    matrix = numbers(weight)
    if int8:
        whole, tensors[f"{name}/steps"] = to_int8(matrix)
        blocks = whole.reshape(len(whole), -1, 4)
        rows, columns = np.nonzero(blocks.any(axis=2))
        tensors[f"{name}/counts"] = np.bincount(rows, minlength=len(matrix)).astype(np.int32)
        tensors[f"{name}/columns"] = columns.astype(np.uint16)
        tensors[f"{name}/blocks"] = np.ascontiguousarray(blocks[rows, columns])
        tensors[f"{name}/inputs"] = np.array([matrix.shape[1]], dtype=np.int64)
        return
    if np.count_nonzero(matrix) > (1 - SPARSE_FROM) * matrix.size or matrix.shape[1] > 65535:
        tensors[f"{name}/weight"] = matrix
        return
    rows, columns = np.nonzero(matrix)
    tensors[f"{name}/counts"] = np.bincount(rows, minlength=len(matrix)).astype(np.int32)
    tensors[f"{name}/columns"] = columns.astype(np.uint16)
    tensors[f"{name}/values"] = matrix[rows, columns]
    tensors[f"{name}/inputs"] = np.array([matrix.shape[1]], dtype=np.int64)


def add_norm(tensors: Tensors, name: str, norm: nn.LayerNorm) -> float:
    """A LayerNorm's tensors; returns its epsilon."""
    size = int(np.prod(norm.normalized_shape))
    tensors[f"{name}/scale"] = numbers(torch.ones(size) if norm.weight is None else norm.weight)
    tensors[f"{name}/shift"] = numbers(torch.zeros(size) if norm.bias is None else norm.bias)
    return float(norm.eps)


def vision_transformer(model: Any, *, int8: bool = False) -> tuple[Program, Tensors]:
    """Program and tensors of timm's ``VisionTransformer`` (ViT, DeiT, with LayerScale, distilled or not).

    With ``int8`` the linear layers of the blocks have INT8 weights, and inputs that are quantized token by
    token.

    Raises:
        ValueError: a part that the engine has no operation for, by its name.
    """
    check(model)
    tensors: Tensors = {}
    embedding, dim = model.patch_embed.proj, int(model.embed_dim)
    prefix = int(model.num_prefix_tokens)
    add_linear(tensors, "patch_embed.proj", embedding.weight.flatten(1), None)
    tensors["start"] = _start(model, prefix)
    operations: list[Operation] = [Linear("patch_embed.proj", "patches", "stream", residual=True)]
    buffers = {"patches": embedding.weight[0].numel(), "stream": dim, "norm": dim}
    if isinstance(model.norm_pre, nn.LayerNorm):
        operations.append(
            LayerNorm("norm_pre", "stream", "stream", add_norm(tensors, "norm_pre", model.norm_pre))
        )
    for index, block in enumerate(model.blocks):
        name, attention = f"blocks.{index}", block.attn
        heads, size = int(attention.num_heads), int(attention.head_dim)
        hidden = block.mlp.fc1.out_features
        # two in turns: while one tile writes those of the next block, others still read those of this one
        qkv = f"qkv{index % 2}"
        sizes = {qkv: 3 * heads * size, "context": heads * size, "hidden": hidden}
        if any(buffers.setdefault(buffer, features) != features for buffer, features in sizes.items()):
            raise ValueError(f"{name}: blocks of different sizes")

        def linear(
            part: str, module: Any, source: str, target: str, *, name: str = name, **options: Any
        ) -> list[Operation]:
            layer, factor = f"{name}.{part}", options.pop("factor", None)
            as_bytes = int8 and module.in_features % 4 == 0
            add_linear(tensors, layer, module.weight, module.bias, factor=factor, int8=as_bytes)
            if not as_bytes:
                return [Linear(layer, source, target, **options)]
            rows = module.in_features // 4 + EXTRA_ROWS
            buffers["quantized"] = max(buffers.get("quantized", 0), rows)
            return [
                Quantize(source, "quantized", module.in_features),
                Linear(layer, "quantized", target, int8=True, **options),
            ]

        operations += [
            LayerNorm(f"{name}.norm1", "stream", "norm", add_norm(tensors, f"{name}.norm1", block.norm1)),
            *linear("attn.qkv", attention.qkv, "norm", qkv),
            Attention(qkv, "context", heads, size, float(attention.scale)),
            *linear(
                "attn.proj", attention.proj, "context", "stream", residual=True, factor=_gamma(block.ls1)
            ),
            LayerNorm(f"{name}.norm2", "stream", "norm", add_norm(tensors, f"{name}.norm2", block.norm2)),
            *linear("mlp.fc1", block.mlp.fc1, "norm", "hidden", gelu=True),
            *linear("mlp.fc2", block.mlp.fc2, "hidden", "stream", residual=True, factor=_gamma(block.ls2)),
        ]
    if isinstance(model.norm, nn.LayerNorm):
        operations.append(LayerNorm("norm", "stream", "stream", add_norm(tensors, "norm", model.norm)))
    distilled = hasattr(model, "head_dist")
    for number, head in enumerate([model.head, model.head_dist] if distilled else [model.head]):
        if isinstance(head, nn.Linear):
            tensors[f"head/weight{number}"] = numbers(head.weight)
            tensors[f"head/bias{number}"] = numbers(
                torch.zeros(head.out_features) if head.bias is None else head.bias
            )
    pool_norm = add_norm(tensors, "head", model.fc_norm) if isinstance(model.fc_norm, nn.LayerNorm) else None
    height, width = model.patch_embed.img_size
    program = Program(
        channels=embedding.in_channels,
        height=height,
        width=width,
        patch=tuple(embedding.kernel_size),
        prefix=prefix,
        buffers=buffers,
        local=tuple(name for name in ("norm", "hidden", "quantized") if name in buffers),
        operations=tuple(operations),
        output="stream",
        pool="prefix" if distilled else model.global_pool,
        classes=model.head.out_features if isinstance(model.head, nn.Linear) else dim,
        pool_norm=pool_norm,
        preprocessing=dict(getattr(model, "pretrained_cfg", None) or {}),
    )
    return program, tensors


def _start(model: Any, prefix: int) -> NDArray[np.float32]:
    """What the tokens are before the patches' embedding is added: positions, class token, the embedding's
    bias."""
    dim, positions = int(model.embed_dim), model.pos_embed
    patches = int(model.patch_embed.num_patches)
    tokens = torch.zeros(prefix + patches, dim)
    names = ("cls_token", "dist_token", "reg_token")
    firsts = [token[0] for name in names if (token := getattr(model, name, None)) is not None]
    if firsts:
        tokens[:prefix] += torch.cat(firsts).detach().float()
    if model.patch_embed.proj.bias is not None:
        tokens[prefix:] += model.patch_embed.proj.bias.detach().float()
    if positions is not None:
        at = prefix if positions.shape[1] == patches else 0
        tokens[at:] += positions[0].detach().float()
    return numbers(tokens)


def _gamma(scale: nn.Module) -> Tensor | None:
    return None if isinstance(scale, nn.Identity) else scale.gamma  # type: ignore[return-value]


def check(model: Any) -> None:
    """Raises ``ValueError`` for a part with no operation of the engine's; weights do not matter."""
    kind = type(model).__name__
    if kind not in {"VisionTransformer", "VisionTransformerDistilled"}:
        raise ValueError(f"{kind}: only timm's VisionTransformer is packed")
    if kind == "VisionTransformer" and model.global_pool not in {"token", "avg"}:
        raise ValueError(f"global_pool {model.global_pool!r}: token or avg is packed")
    if getattr(model, "attn_pool", None) is not None:
        raise ValueError("attn_pool: attention pooling is not packed")
    identities = {"patch_embed.norm": model.patch_embed.norm}
    for index, block in enumerate(model.blocks):
        if type(block).__name__ != "Block" or type(block.attn).__name__ != "Attention":
            raise ValueError(f"blocks.{index}: {type(block).__name__} is no plain block")
        if type(block.mlp).__name__ != "Mlp" or not _exact_gelu(block.mlp.act):
            raise ValueError(f"blocks.{index}.mlp: only an MLP with GELU in its exact form is packed")
        identities |= {
            f"blocks.{index}.{owner}.{part}": getattr(getattr(block, owner), part, nn.Identity())
            for owner, part in (("attn", "q_norm"), ("attn", "k_norm"), ("attn", "norm"), ("mlp", "norm"))
        }
    for name, part in identities.items():
        if not isinstance(part, nn.Identity):
            raise ValueError(f"{name}: a {type(part).__name__} here is not packed")


def _exact_gelu(part: nn.Module) -> bool:
    return type(part).__name__ == "GELU" and getattr(part, "approximate", "none") == "none"


def pack(
    model: nn.Module,
    folder: str | Path,
    *,
    int8: bool = False,
    preprocessing: Mapping[str, Any] | None = None,
) -> Program:
    """Writes a model's folder: ``program.json``, ``tensors.safetensors`` and their checksums.

    Args:
        model: a timm ``VisionTransformer``; its zeros are left out.
        folder: an empty folder, or one that is made.
        int8: INT8 weights, where zeros save time in blocks of 1 × 4.
        preprocessing: how images are prepared, and the names of the classes
            (:mod:`trainers.data.preprocessing`); default: timm's own configuration.

    Raises:
        ValueError: a model with a part that the engine cannot run.
    """
    program, tensors = vision_transformer(model, int8=int8)
    if preprocessing is not None:
        program = replace(program, preprocessing=dict(preprocessing))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(program), default=str, indent=1)
    (folder / PROGRAM).write_text(text, encoding="utf-8")
    save_file(tensors, folder / TENSORS)
    sums = checksums.sums(folder, (PROGRAM, TENSORS))
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
    return program
