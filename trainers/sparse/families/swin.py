"""timm's ``SwinTransformer`` as a program: a level for each stage of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainers.sparse.families.tensors import Tensors, Writer, add_linear, check_mlp, check_norm, numbers
from trainers.sparse.program import Level, Linear, Merge, Operation, Patches, Program, WindowAttention


def swin_transformer(model: Any, *, int8: bool = False) -> tuple[Program, Tensors]:
    """Program and tensors.

    With ``int8`` the linear layers of the blocks and of the mergers have INT8 weights, and inputs that are
    quantized token by token.

    Raises:
        ValueError: a part that the engine has no operation for, by its name.
    """
    check(model)
    writer, embedding = Writer(int8), model.patch_embed.proj
    add_linear(writer.tensors, "patch_embed.proj", embedding.weight.flatten(1), embedding.bias)
    patches = writer.buffer("patches", embedding.weight[0].numel())
    stream = writer.buffer("stream0", embedding.out_channels)
    operations: list[Operation] = [Patches(patches), Linear("patch_embed.proj", patches, stream)]
    if isinstance(model.patch_embed.norm, nn.LayerNorm):
        operations.append(writer.norm("patch_embed.norm", model.patch_embed.norm, stream, stream))
    levels = []
    for number, stage in enumerate(model.layers):
        if number:
            operations = _merged(writer, number, stage.downsample)
            stream = f"stream{number}"
        for index, block in enumerate(stage.blocks):
            operations += _block(writer, f"layers.{number}.blocks.{index}", block, number)
        if number == len(model.layers) - 1:
            operations.append(writer.norm("norm", model.norm, stream, stream))
        rows, columns = stage.output_resolution
        levels.append(Level((int(rows), int(columns)), tuple(operations)))
    writer.head(model.head.fc)
    classes = model.head.fc.out_features if isinstance(model.head.fc, nn.Linear) else model.num_features
    program = writer.program(model, levels, stream, pool="avg", classes=classes)
    return program, writer.tensors


def _merged(writer: Writer, number: int, merger: Any) -> list[Operation]:
    """Patches of the level before, four by four."""
    name = f"layers.{number}.downsample"
    merged = writer.buffer("merged", merger.norm.normalized_shape[0])
    return [
        Merge(f"stream{number - 1}", merged),
        writer.norm(f"{name}.norm", merger.norm, merged, merged),
        *writer.linear(f"{name}.reduction", merger.reduction, merged, f"stream{number}"),
    ]


def _block(writer: Writer, name: str, block: Any, number: int) -> list[Operation]:
    attention, stream, qkv = block.attn, f"stream{number}", f"qkv{number}"
    heads = int(attention.num_heads)
    size = attention.proj.in_features // heads
    bias = attention._get_rel_pos_bias()[0]  # [heads, queries, keys]
    writer.tensors[f"{name}.attn/relative_position"] = numbers(bias.transpose(1, 2))
    beyond = any(
        length % window for length, window in zip(block.input_resolution, block.window_size, strict=True)
    )
    if beyond:
        zeros = torch.zeros(attention.qkv.out_features)
        writer.tensors[f"{name}.attn/padding"] = numbers(
            zeros if attention.qkv.bias is None else attention.qkv.bias
        )
    return [
        writer.norm(f"{name}.norm1", block.norm1, stream, "norm"),
        *writer.linear(f"{name}.attn.qkv", attention.qkv, "norm", qkv),
        WindowAttention(
            f"{name}.attn",
            qkv,
            writer.buffer(f"context{number}", heads * size),
            heads,
            size,
            float(attention.scale),
            tuple(map(int, block.window_size)),  # type: ignore[arg-type]
            tuple(map(int, block.shift_size)),  # type: ignore[arg-type]
        ),
        *writer.linear(f"{name}.attn.proj", attention.proj, f"context{number}", stream, residual=True),
        *writer.mlp(name, block, stream),
    ]


def check(model: Any) -> None:
    """Check that the engine has an operation for every part of a model; weights are not read.

    Raises:
        ValueError: a part has none; names it.
    """
    if model.head.global_pool.pool_type != "avg":
        raise ValueError(f"global_pool {model.head.global_pool.pool_type!r}: avg is packed")
    if model.patch_embed.norm is not None and not isinstance(model.patch_embed.norm, nn.Identity):
        check_norm("patch_embed.norm", model.patch_embed.norm)
    check_norm("norm", model.norm)
    if not isinstance(model.head.fc, (nn.Linear, nn.Identity)):
        raise ValueError(f"head.fc: a {type(model.head.fc).__name__} here is not packed")
    for number, stage in enumerate(model.layers):
        merges = not isinstance(stage.downsample, nn.Identity)
        if merges != bool(number):
            raise ValueError(f"layers.{number}.downsample: every stage but the first begins with a merger")
        if merges:
            check_norm(f"layers.{number}.downsample.norm", stage.downsample.norm)
        for index, block in enumerate(stage.blocks):
            name = f"layers.{number}.blocks.{index}"
            if (
                type(block).__name__ != "SwinTransformerBlock"
                or type(block.attn).__name__ != "WindowAttention"
            ):
                raise ValueError(f"{name}: {type(block).__name__} is no plain block of Swin")
            check_mlp(name, block.mlp)
            for part in ("norm1", "norm2"):
                check_norm(f"{name}.{part}", getattr(block, part))
