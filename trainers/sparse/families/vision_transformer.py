"""timm's ``VisionTransformer`` (ViT, DeiT, with LayerScale, distilled or not) as a program."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers.sparse.families.tensors import (
    Tensors,
    Writer,
    add_linear,
    add_norm,
    check_identity,
    check_mlp,
    check_norm,
    numbers,
)
from trainers.sparse.program import Attention, Level, Linear, Operation, Patches, Program, Start


def vision_transformer(model: Any, *, int8: bool = False) -> tuple[Program, Tensors]:
    """Program and tensors.

    With ``int8`` the linear layers of the blocks have INT8 weights, and inputs that are quantized token by
    token.

    Raises:
        ValueError: a part that the engine has no operation for, by its name.
    """
    check(model)
    writer = Writer(int8)
    tensors, embedding, dim = writer.tensors, model.patch_embed.proj, int(model.embed_dim)
    prefix = int(model.num_prefix_tokens)
    add_linear(tensors, "patch_embed.proj", embedding.weight.flatten(1), None)
    tensors["start"] = _start(model, prefix)
    patches, stream = writer.buffer("patches", embedding.weight[0].numel()), writer.buffer("stream", dim)
    operations: list[Operation] = [
        Patches(patches),
        Start("start", stream),
        Linear("patch_embed.proj", patches, stream, residual=True),
    ]
    if isinstance(model.norm_pre, nn.LayerNorm):
        operations.append(writer.norm("norm_pre", model.norm_pre, stream, stream))
    for index, block in enumerate(model.blocks):
        name, attention = f"blocks.{index}", block.attn
        heads, size = int(attention.num_heads), int(attention.head_dim)
        # two in turns: while one tile writes those of the next block, others still read those of this one
        qkv = f"qkv{index % 2}"
        operations += [
            writer.norm(f"{name}.norm1", block.norm1, stream, "norm"),
            *writer.linear(f"{name}.attn.qkv", attention.qkv, "norm", qkv),
            Attention(qkv, writer.buffer("context", heads * size), heads, size, float(attention.scale)),
            *writer.linear(
                f"{name}.attn.proj",
                attention.proj,
                "context",
                stream,
                residual=True,
                factor=_gamma(block.ls1),
            ),
            *writer.mlp(name, block, stream, _gamma(block.ls2)),
        ]
    if isinstance(model.norm, nn.LayerNorm):
        operations.append(writer.norm("norm", model.norm, stream, stream))
    distilled = hasattr(model, "head_dist")
    writer.head(*[model.head, model.head_dist] if distilled else [model.head])
    pool_norm = add_norm(tensors, "head", model.fc_norm) if isinstance(model.fc_norm, nn.LayerNorm) else None
    level = Level(tuple(model.patch_embed.grid_size), tuple(operations), prefix)
    program = writer.program(
        model,
        [level],
        stream,
        pool="prefix" if distilled else model.global_pool,
        classes=model.head.out_features if isinstance(model.head, nn.Linear) else dim,
        pool_norm=pool_norm,
    )
    return program, tensors


def _start(model: Any, prefix: int) -> NDArray[np.float32]:
    """The tokens before the patches' embedding is added: positions, class token, the embedding's bias."""
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
    """Check that the engine has an operation for every part of a model; weights are not read.

    Raises:
        ValueError: a part has none; names it.
    """
    if type(model).__name__ == "VisionTransformer" and model.global_pool not in {"token", "avg"}:
        raise ValueError(f"global_pool {model.global_pool!r}: token or avg is packed")
    if getattr(model, "attn_pool", None) is not None:
        raise ValueError("attn_pool: attention pooling is not packed")
    check_identity("patch_embed.norm", model.patch_embed.norm)
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        if type(block).__name__ != "Block" or type(block.attn).__name__ != "Attention":
            raise ValueError(f"{name}: {type(block).__name__} is no plain block")
        check_mlp(name, block.mlp)
        for part in ("q_norm", "k_norm", "norm"):
            check_identity(f"{name}.attn.{part}", getattr(block.attn, part, None))
        for part in ("norm1", "norm2"):
            check_norm(f"{name}.{part}", getattr(block, part))
