"""A program with its weights, made ready for this processor: kernels, packed weights, buffers, stages."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainers.sparse import layout
from trainers.sparse.kernels import attention as attention_kernel
from trainers.sparse.kernels import driver
from trainers.sparse.kernels import linear as linear_kernels
from trainers.sparse.kernels import norm as norm_kernel
from trainers.sparse.kernels.builder import Code
from trainers.sparse.kernels.host import Machine
from trainers.sparse.program import Attention, LayerNorm, Linear, Operation, Program
from trainers.sparse.weights import SparseWeights, pack_dense, pack_sparse, panel_inputs

Array = NDArray[np.float32]
SPARSE_FROM = 0.3  # zeros from which a layer runs sparse


@dataclass
class LinearLayer:
    """A linear layer's weights as its kernel reads them."""

    outputs: int
    inputs: int
    bias: Array
    sparse: SparseWeights | None
    dense: Array | None

    @classmethod
    def of(
        cls,
        weight: Array,
        bias: Array,
        *,
        lanes: int,
        widest: int,
        sparse_from: float,
        panel: int | None = None,
    ) -> LinearLayer:
        """Packs a matrix ``[outputs, inputs]``: sparse if at least ``sparse_from`` of it are zeros, in
        panels of ``panel`` inputs (without it as many as suit the caches in tiles of ``widest``
        vectors)."""
        outputs, inputs = weight.shape
        density = np.count_nonzero(weight) / weight.size
        if density <= 1 - sparse_from:
            panel = panel or panel_inputs(widest, lanes, density)
            return cls(outputs, inputs, bias, pack_sparse(weight, panel), None)
        return cls(outputs, inputs, bias, None, pack_dense(weight, linear_kernels.DENSE_BLOCK))

    def fill(self, arguments: NDArray[np.int64]) -> None:
        """The arguments of its kernel, except the places."""
        k = linear_kernels
        arguments[k.INPUTS], arguments[k.OUTPUTS] = self.inputs, self.outputs
        arguments[k.BIAS] = self.bias.ctypes.data
        if self.sparse is None:
            assert self.dense is not None
            arguments[k.VALUES] = self.dense.ctypes.data
            return
        arguments[k.FIRST], arguments[k.MIDDLE], arguments[k.LAST] = self.sparse.segments
        if self.sparse.panels == 1:
            arguments[k.LAST] = -1
        arguments[k.GROUPS], arguments[k.ROWS] = self.sparse.groups.ctypes.data, self.sparse.rows.ctypes.data
        arguments[k.COLUMNS] = self.sparse.columns.ctypes.data
        arguments[k.VALUES] = self.sparse.values.ctypes.data


def kernel_name(operation: Operation, width: int, layers: dict[str, LinearLayer]) -> str:
    if isinstance(operation, Linear):
        kind = "dense" if layers[operation.layer].sparse is None else "sparse"
        return f"{kind}{'_residual' * operation.residual}{'_gelu' * operation.gelu}_{width}"
    return f"{operation.kind}_{width}"


def kernel(operation: Operation, width: int, lanes: int, layers: dict[str, LinearLayer]) -> Code:
    """The kernel of an operation, for tiles of a width."""
    name = kernel_name(operation, width, layers)
    if isinstance(operation, Linear):
        sparse = layers[operation.layer].sparse is not None
        make = linear_kernels.sparse_linear if sparse else linear_kernels.dense_linear
        end: linear_kernels.End = "gelu" if operation.gelu else "none"
        return make(name, lanes, width, residual=operation.residual, end=end)
    if isinstance(operation, LayerNorm):
        return norm_kernel.layer_norm(name, lanes, width)
    return attention_kernel.attention(name, lanes, width)


def compiled(program: Program, widths: list[int], lanes: int, layers: dict[str, LinearLayer]) -> Machine:
    """All kernels that a program needs for tiles of some widths, and the driver."""
    needed = {
        kernel_name(operation, width, layers): (operation, width)
        for operation in program.operations
        for width in sorted(set(widths))
    }
    codes = [kernel(operation, width, lanes, layers) for operation, width in needed.values()]
    return Machine([driver.driver("driver", lanes), *codes])


def stages_of(program: Program) -> list[list[Operation]]:
    """Operations cut into stages: attention reads all tiles of an image, so that a stage begins with it."""
    stages: list[list[Operation]] = [[]]
    for operation in program.operations:
        if isinstance(operation, Attention) and stages[-1]:
            stages.append([])
        stages[-1].append(operation)
    return stages


@dataclass
class Plan:
    """The buffers of a batch size, and the driver's arguments for it.

    Args:
        batch: images.
        buffers: those that all threads see.
        stages: int64 ``[stages, driver.STAGE]``.
        scratch: a thread's own memory, one array a thread.
        items: int64 ``[tiles, driver.ITEM]``, all tiles of the batch.
        tables: for each stage int64 ``[operations, driver.OPERATION]``.
    """

    batch: int
    buffers: dict[str, Array]
    stages: NDArray[np.int64]
    scratch: list[Array]
    items: NDArray[np.int64]
    tables: list[NDArray[np.int64]] = field(default_factory=list)
    kept: list[NDArray[np.generic]] = field(default_factory=list)  # what addresses point to

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in [*self.buffers.values(), *self.scratch])


def plan(
    program: Program,
    machine: Machine,
    layers: dict[str, LinearLayer],
    norms: dict[str, tuple[Array, Array]],
    *,
    lanes: int,
    widths: list[int],
    batch: int,
    threads: int,
) -> Plan:
    """Memory and arguments for a batch size."""
    vectors, wide = sum(widths), max(widths)
    common = [name for name in program.buffers if name not in program.local]
    buffers = {name: layout.aligned(batch * vectors * lanes * program.buffers[name]) for name in common}
    local, size = {}, 0
    for name in program.local:
        local[name] = 4 * size
        size += program.buffers[name] * wide * lanes
    scores = 4 * size
    size += program.tokens * wide * lanes
    starts = np.cumsum([0, *widths[:-1]])
    items = np.array(
        [
            (image * vectors + start, width)
            for image in range(batch)
            for start, width in zip(starts, widths, strict=True)
        ],
        dtype=np.int64,
    )
    threads_own = [layout.aligned(size) for _ in range(threads)]
    made = Plan(batch, buffers, np.zeros((0, 0), np.int64), threads_own, items)
    left = program.tokens - starts * lanes
    keys = np.stack([starts, widths, np.minimum(left, np.array(widths) * lanes)], axis=1).astype(np.int64)

    def place(arguments: NDArray[np.int64], at: int, name: str) -> None:
        if name in local:
            arguments[at : at + 3] = local[name], 0, 1
        else:
            arguments[at : at + 3] = buffers[name].ctypes.data, 4 * lanes * program.buffers[name], 0

    def arguments_of(operation: Operation) -> NDArray[np.int64]:
        arguments = np.zeros(16, dtype=np.int64)
        if isinstance(operation, Linear):
            layers[operation.layer].fill(arguments)
            place(arguments, linear_kernels.X, operation.input)
            place(arguments, linear_kernels.Y, operation.output)
        elif isinstance(operation, LayerNorm):
            k, (scale, shift) = norm_kernel, norms[operation.layer]
            place(arguments, k.X, operation.input)
            place(arguments, k.Y, operation.output)
            arguments[k.FEATURES], arguments[k.EPSILON] = len(scale), bits(operation.epsilon)
            arguments[k.SCALE], arguments[k.SHIFT] = scale.ctypes.data, shift.ctypes.data
        else:
            a = attention_kernel
            place(arguments, a.QKV, operation.input)
            place(arguments, a.Y, operation.output)
            arguments[a.SCORES : a.SCORES + 3] = scores, 0, 1
            arguments[a.FEATURES], arguments[a.HEADS] = operation.heads * operation.size, operation.heads
            arguments[a.HEAD_SIZE], arguments[a.SCALE] = operation.size, bits(operation.scale)
            arguments[a.VECTORS], arguments[a.KEY_TILES], arguments[a.TILES] = (
                vectors,
                keys.ctypes.data,
                len(keys),
            )
        return arguments

    stages = []
    made.kept.append(keys)
    for operations in stages_of(program):
        table = np.zeros((len(operations), driver.OPERATION), dtype=np.int64)
        for row, operation in zip(table, operations, strict=True):
            arguments = arguments_of(operation)
            made.kept.append(arguments)
            for width in set(widths):
                row[2 * width - 2] = machine.address(kernel_name(operation, width, layers))
                row[2 * width - 1] = arguments.ctypes.data
        made.tables.append(table)
        stages.append((table.ctypes.data, len(operations), items.ctypes.data, len(items), 0, 0))
    made.stages = np.array(stages, dtype=np.int64)
    return made


def bits(number: float) -> int:
    """A float32 as the low half of an argument."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])


def head_scale(size: int) -> float:
    """What scores are multiplied with: ``1 / sqrt(size)``."""
    return 1 / math.sqrt(size)
