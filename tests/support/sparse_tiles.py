"""Kernels of the sparse engine, called on one image's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.sparse import layout
from trainers.sparse.engine import LinearLayer
from trainers.sparse.kernels import attention as attention_kernel
from trainers.sparse.kernels import host, int8
from trainers.sparse.kernels import linear as linear_kernels
from trainers.sparse.kernels import norm as norm_kernel
from trainers.sparse.kernels.builder import Code
from trainers.sparse.kernels.vector_math import exponential
from trainers.sparse.plan import bits
from trainers.sparse.weights import BlockWeights

Array = NDArray[np.float32]
LANES = host.lanes()


def _made(kind: str, width: int, flags: tuple[Any, ...]) -> Code:
    if kind in {"sparse", "dense"}:
        make = linear_kernels.sparse_linear if kind == "sparse" else linear_kernels.dense_linear
        return make("kernel", LANES, width, residual=flags[0], end=flags[1])
    if kind == "int8":
        return int8.sparse_int8("kernel", LANES, width, residual=flags[0], end=flags[1])
    if kind == "quantize":
        return int8.quantize("kernel", LANES, width)
    return {"norm": norm_kernel.layer_norm, "attention": attention_kernel.attention}[kind](
        "kernel", LANES, width
    )


@cache
def machine(kind: str, width: int, *flags: Any) -> host.Machine:
    """The compiled kernel, kept for the process."""
    return host.Machine([_made(kind, width, flags)])


def call(
    kind: str,
    inputs: Array,
    output: Array,
    fill: Callable[[NDArray[np.int64], Sequence[int]], list[Any] | None],
    *flags: Any,
    widest: int = layout.WIDEST,
) -> Array:
    """Runs a kernel over all tiles of ``[tokens, features]``; ``output`` is what the result held before."""
    tokens = len(inputs)
    widths = layout.tile_widths(layout.vectors_of(tokens, LANES), widest)
    x, y = layout.to_tiles(inputs, widths, LANES), layout.to_tiles(output, widths, LANES)
    arguments = np.zeros(16, dtype=np.int64)
    arguments[:6] = (
        x.ctypes.data,
        4 * LANES * inputs.shape[1],
        0,
        y.ctypes.data,
        4 * LANES * output.shape[1],
        0,
    )
    kept = fill(arguments, widths)
    scratch, start = layout.aligned(max(widths) * LANES * (tokens + 8)), 0
    for width in widths:
        run = host.function(machine(kind, width, *flags).address("kernel"), 3)
        run(arguments.ctypes.data, start, scratch.ctypes.data)
        start += width
    del kept
    return layout.from_tiles(y, widths, LANES, tokens)


def linear(
    x: Array,
    weight: Array,
    bias: Array,
    *,
    sparse: bool,
    gelu: bool = False,
    residual: Array | None = None,
    widest: int = layout.WIDEST,
    panel: int | None = None,
) -> Array:
    """A linear layer by the sparse or the dense kernel."""
    before = np.full((len(x), len(weight)), np.nan, dtype=np.float32) if residual is None else residual
    layer = LinearLayer.of(
        weight, bias, lanes=LANES, widest=widest, sparse_from=0.0 if sparse else 2.0, panel=panel
    )

    def fill(arguments: NDArray[np.int64], widths: Sequence[int]) -> list[Any]:
        layer.fill(arguments)
        return [layer]

    flags = (residual is not None, "gelu" if gelu else "none")
    return call("sparse" if sparse else "dense", x, before, fill, *flags, widest=widest)


def layer_norm(x: Array, scale: Array, shift: Array, epsilon: float) -> Array:
    def fill(arguments: NDArray[np.int64], widths: Sequence[int]) -> None:
        arguments[norm_kernel.FEATURES], arguments[norm_kernel.EPSILON] = len(scale), bits(epsilon)
        arguments[norm_kernel.SCALE], arguments[norm_kernel.SHIFT] = scale.ctypes.data, shift.ctypes.data

    return call("norm", x, np.zeros_like(x), fill)


def attention(qkv: Array, heads: int, scale: float, widest: int = layout.WIDEST) -> Array:
    features = qkv.shape[1] // 3

    def fill(arguments: NDArray[np.int64], widths: Sequence[int]) -> list[Any]:
        a = attention_kernel
        starts = np.cumsum([0, *widths[:-1]])
        tokens = np.minimum(len(qkv) - starts * LANES, np.array(widths) * LANES)
        keys = np.ascontiguousarray(np.stack([starts, widths, tokens], axis=1).astype(np.int64))
        arguments[a.SCORES : a.SCORES + 3] = 0, 0, 1
        arguments[a.FEATURES], arguments[a.HEADS], arguments[a.HEAD_SIZE] = features, heads, features // heads
        arguments[a.SCALE], arguments[a.VECTORS] = bits(scale), sum(widths)
        arguments[a.KEY_TILES], arguments[a.TILES] = keys.ctypes.data, len(keys)
        return [keys]

    return call("attention", qkv, np.zeros((len(qkv), features), np.float32), fill, widest=widest)


def int8_linear(
    x: Array, weights: BlockWeights, bias: Array, *, gelu: bool = False, residual: Array | None = None
) -> Array:
    """A linear layer with INT8 weights in blocks, its inputs quantized token by token."""
    before = np.zeros((len(x), weights.outputs), np.float32) if residual is None else residual
    blocks = weights.inputs // int8.BLOCK

    def sizes(arguments: NDArray[np.int64], widths: Sequence[int]) -> None:
        arguments[int8.INPUTS] = weights.inputs

    packed = call("quantize", x, np.zeros((len(x), blocks + int8.EXTRA_ROWS), np.float32), sizes)

    def fill(arguments: NDArray[np.int64], widths: Sequence[int]) -> None:
        arguments[int8.INPUT_BLOCKS], arguments[int8.OUTPUTS] = blocks, weights.outputs
        arguments[int8.COUNT] = len(weights.groups)
        arguments[int8.BIAS] = bias.ctypes.data
        for name, array in (("GROUPS", weights.groups), ("ROWS", weights.rows), ("COLUMNS", weights.columns)):
            arguments[getattr(int8, name)] = array.ctypes.data
        arguments[int8.BLOCKS] = weights.blocks.ctypes.data
        arguments[int8.STEPS], arguments[int8.SUMS] = weights.steps.ctypes.data, weights.sums.ctypes.data

    return call("int8", packed, before, fill, residual is not None, "gelu" if gelu else "none")


def exponentials(x: Array) -> Array:
    """``e^x`` as the attention kernels compute it."""
    code = Code("exponentials", LANES)
    source, target, count = code.parameters("i64", "i64", "i64")
    with code.loop(count) as i:
        address = code.convert("inttoptr", source + i * code.vector_bytes, "ptr")
        result = exponential(code, code.load("vector", address))
        code.store(result, code.convert("inttoptr", target + i * code.vector_bytes, "ptr"))
    made = host.Machine([code])
    inputs, outputs = layout.aligned(x.size + LANES), layout.aligned(x.size + LANES)
    inputs[: x.size] = x.ravel()
    run = host.function(made.address("exponentials"), 3)
    run(inputs.ctypes.data, outputs.ctypes.data, layout.vectors_of(x.size, LANES))
    return outputs[: x.size].reshape(x.shape)
