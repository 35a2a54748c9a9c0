"""A program with its weights, made ready for this processor: kernels, packed weights, buffers, stages."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainers.sparse import layout
from trainers.sparse.kernels import attention as attention_kernel
from trainers.sparse.kernels import driver, int8
from trainers.sparse.kernels import linear as linear_kernels
from trainers.sparse.kernels import norm as norm_kernel
from trainers.sparse.kernels.builder import Code
from trainers.sparse.kernels.host import Machine
from trainers.sparse.program import Attention, LayerNorm, Linear, Operation, Program, Quantize
from trainers.sparse.weights import BlockWeights, SparseWeights, pack_dense, pack_sparse, panel_inputs

Array = NDArray[np.float32]
SPARSE_FROM = (
    0.4  # zeros from which a layer runs sparse: at 36 % both take equally long (1536 × 384, AVX-512)
)


@dataclass
class LinearLayer:
    """A linear layer's weights as its kernel reads them."""

    outputs: int
    inputs: int
    bias: Array
    sparse: SparseWeights | None
    dense: Array | None
    blocks: BlockWeights | None = None

    @property
    def kind(self) -> str:
        return "int8" if self.blocks else "sparse" if self.sparse else "dense"

    @property
    def left_out(self) -> int:
        """How many weights are zeros that are neither kept nor multiplied."""
        kept = self.outputs * self.inputs
        if self.sparse is not None:
            kept = len(self.sparse.values)
        elif self.blocks is not None:
            kept = self.blocks.blocks.size
        return self.outputs * self.inputs - kept

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        parts = (self.sparse, self.blocks)
        return (
            self.bias.nbytes
            + sum(part.bytes for part in parts if part)
            + (0 if self.dense is None else self.dense.nbytes)
        )

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
        if self.blocks is not None:
            self._fill_int8(self.blocks, arguments)
            return
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

    def _fill_int8(self, blocks: BlockWeights, arguments: NDArray[np.int64]) -> None:
        arguments[int8.INPUT_BLOCKS], arguments[int8.OUTPUTS] = self.inputs // int8.BLOCK, self.outputs
        arguments[int8.BIAS], arguments[int8.COUNT] = self.bias.ctypes.data, len(blocks.groups)
        arguments[int8.GROUPS], arguments[int8.ROWS] = blocks.groups.ctypes.data, blocks.rows.ctypes.data
        arguments[int8.COLUMNS] = blocks.columns.ctypes.data
        arguments[int8.BLOCKS] = blocks.blocks.ctypes.data
        arguments[int8.STEPS], arguments[int8.SUMS] = blocks.steps.ctypes.data, blocks.sums.ctypes.data


def kernel_name(operation: Operation, width: int, layers: dict[str, LinearLayer]) -> str:
    if isinstance(operation, Linear):
        kind = layers[operation.layer].kind
        return f"{kind}{'_residual' * operation.residual}{'_gelu' * operation.gelu}_{width}"
    return f"{operation.kind}_{width}"


def kernel(operation: Operation, width: int, lanes: int, layers: dict[str, LinearLayer]) -> Code:
    """The kernel of an operation, for tiles of a width."""
    name = kernel_name(operation, width, layers)
    if isinstance(operation, Linear):
        make = {
            "sparse": linear_kernels.sparse_linear,
            "dense": linear_kernels.dense_linear,
            "int8": int8.sparse_int8,
        }[layers[operation.layer].kind]
        end: linear_kernels.End = "gelu" if operation.gelu else "none"
        return make(name, lanes, width, residual=operation.residual, end=end)
    if isinstance(operation, Quantize):
        return int8.quantize(name, lanes, width)
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


@dataclass
class _Memory:
    """Where a plan's buffers lie: those of all threads, and in a thread's scratch (bytes from its begin)."""

    program: Program
    lanes: int
    buffers: dict[str, Array]
    local: dict[str, int]
    scores: int
    keys: NDArray[np.int64]
    vectors: int

    def locate(self, arguments: NDArray[np.int64], at: int, name: str) -> None:
        """The three numbers that place a buffer, into arguments from ``at`` on."""
        if name in self.local:
            arguments[at : at + 3] = self.local[name], 0, 1
        else:
            step = 4 * self.lanes * self.program.buffers[name]
            arguments[at : at + 3] = self.buffers[name].ctypes.data, step, 0


def _arguments(
    operation: Operation,
    memory: _Memory,
    layers: dict[str, LinearLayer],
    norms: dict[str, tuple[Array, Array]],
) -> NDArray[np.int64]:
    """What an operation's kernel is called with."""
    arguments = np.zeros(16, dtype=np.int64)
    memory.locate(arguments, 0, operation.input)  # of every kernel the first two places
    memory.locate(arguments, 3, operation.output)
    if isinstance(operation, Linear):
        layers[operation.layer].fill(arguments)
    elif isinstance(operation, Quantize):
        arguments[int8.INPUTS] = operation.inputs
    elif isinstance(operation, LayerNorm):
        k, (scale, shift) = norm_kernel, norms[operation.layer]
        arguments[k.FEATURES], arguments[k.EPSILON] = len(scale), bits(operation.epsilon)
        arguments[k.SCALE], arguments[k.SHIFT] = scale.ctypes.data, shift.ctypes.data
    else:
        a = attention_kernel
        arguments[a.SCORES : a.SCORES + 3] = memory.scores, 0, 1
        arguments[a.FEATURES], arguments[a.HEADS] = operation.heads * operation.size, operation.heads
        arguments[a.HEAD_SIZE], arguments[a.SCALE] = operation.size, bits(operation.scale)
        arguments[a.VECTORS], arguments[a.TILES] = memory.vectors, len(memory.keys)
        arguments[a.KEY_TILES] = memory.keys.ctypes.data
    return arguments


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
    scratch = [layout.aligned(size) for _ in range(threads)]
    made = Plan(batch, buffers, np.zeros((0, 0), np.int64), scratch, items)
    left = program.tokens - starts * lanes
    keys = np.stack([starts, widths, np.minimum(left, np.array(widths) * lanes)], axis=1).astype(np.int64)

    memory = _Memory(program, lanes, buffers, local, scores, keys, vectors)
    stages = []
    made.kept.append(keys)
    for operations in stages_of(program):
        table = np.zeros((len(operations), driver.OPERATION), dtype=np.int64)
        for row, operation in zip(table, operations, strict=True):
            arguments = _arguments(operation, memory, layers, norms)
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
