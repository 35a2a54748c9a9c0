"""The execution of a program: the buffers of a batch, the arguments of each kernel, and the threads."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainers.sparse import layout, windows
from trainers.sparse.engine import Array, Kernels, LinearLayer
from trainers.sparse.kernels import attention as attention_kernel
from trainers.sparse.kernels import driver, gather, host, int8
from trainers.sparse.kernels import norm as norm_kernel
from trainers.sparse.kernels import window_attention as window_kernel
from trainers.sparse.layout import Tiling
from trainers.sparse.program import (
    Attention,
    LayerNorm,
    Level,
    Linear,
    Merge,
    Operation,
    Patches,
    Program,
    Quantize,
    Rows,
    Start,
    WindowAttention,
)

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Weights:
    """The weights and tables that a program's operations read besides buffers.

    Args:
        layers: linear layers.
        norms: scale and shift of each LayerNorm.
        tables: the other tensors, by name.
    """

    layers: dict[str, LinearLayer]
    norms: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    tables: dict[str, Array] = field(default_factory=dict)


@dataclass
class Plan:
    """The buffers of a batch size, and the driver's arguments for it.

    Args:
        tilings: of each level.
        buffers: the buffers that all threads share.
        scratch: one array for each thread, its own memory.
        stages: int64 ``[stages, driver.STAGE]``.
        operations, tables, items: of each stage: its operations, the driver's table of them, and the items
            for which they are called (first vector and width of a tile; number of a window and 1).
        calls: the driver's arguments, for each thread.
        pixels, rows: the arguments that will get the addresses of the images, and of the array for rows.
    """

    tilings: list[Tiling]
    buffers: dict[str, Array]
    scratch: list[Array]
    stages: Integers = field(default_factory=lambda: np.zeros((0, driver.STAGE), np.int64))
    operations: list[list[Operation]] = field(default_factory=list)
    tables: list[Integers] = field(default_factory=list)
    items: list[Integers] = field(default_factory=list)
    calls: list[tuple[int, int, int]] = field(default_factory=list)
    pixels: list[Integers] = field(default_factory=list)
    rows: list[Integers] = field(default_factory=list)
    kept: list[NDArray[np.generic]] = field(default_factory=list)  # arrays to which addresses point

    @property
    def bytes(self) -> int:
        """Memory of the activations."""
        return sum(array.nbytes for array in [*self.buffers.values(), *self.scratch])

    def keep(self, array: NDArray[np.generic]) -> int:
        """Keep an array as long as the plan; return its address."""
        self.kept.append(array)
        return int(array.ctypes.data)


def stages_of(level: Level) -> list[list[Operation]]:
    """A level's operations cut into stages: attention reads all tiles of an image, so that a stage begins
    with it; over windows it has a stage of its own, as it is called for windows and not for tiles."""
    stages: list[list[Operation]] = []
    for operation in level.operations:
        begins = isinstance(operation, (Attention, WindowAttention))
        after_windows = stages and isinstance(stages[-1][-1], WindowAttention)
        if not stages or begins or after_windows:
            stages.append([])
        stages[-1].append(operation)
    return stages


def token_order(level: Level) -> Integers:
    """The position of each token of a level (prefix, then the grid row by row) in memory."""
    kinds = {(each.window, each.shift) for each in level.operations if isinstance(each, WindowAttention)}
    if not kinds:
        return np.arange(level.tokens)
    window, cut = max(kinds, key=lambda kind: kind[1])
    return windows.token_order(level.grid, window, cut)


class Executor:
    """Runs a program.

    Args:
        program: its operations.
        weights: what they read.
        threads: how many share the work of a call.
        widest: vectors of tokens in a tile.
    """

    def __init__(
        self, program: Program, weights: Weights, *, threads: int = 1, widest: int = layout.WIDEST
    ) -> None:
        self.program, self.weights, self.threads = program, weights, threads
        self._lanes, self._widest = host.lanes(), widest
        self._kernels = Kernels(self._lanes, weights.layers)
        self._orders = [token_order(level) for level in program.levels]
        self._biases: dict[str, Array] = {}
        self._plans: dict[int, Plan] = {}
        self._kernels.require([])
        self._run = host.function(self._kernels.driver, 3)
        self._pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None

    def run(self, batch: int, images: Array | None = None, rows: Array | None = None) -> Plan:
        """Runs all operations.

        Args:
            batch: number of images.
            images: float32 ``[batch, channels, height, width]`` if the program reads pixels.
            rows: float32 ``[batch × tokens, features]``, contiguous, if the program writes rows.

        Returns:
            The plan, whose buffers hold the results until the next call.
        """
        plan = self.plan(batch)
        if images is not None:
            images = np.ascontiguousarray(images)
            for arguments in plan.pixels:
                arguments[gather.SOURCE] = images.ctypes.data
        if rows is not None:
            for arguments in plan.rows:
                arguments[gather.TARGET] = rows.ctypes.data
        plan.stages[:, driver.NEXT :] = 0
        waiting = [self._pool.submit(self._run, *each) for each in plan.calls[1:]] if self._pool else []
        self._run(*plan.calls[0])
        for each in waiting:
            each.result()
        return plan

    def plan(self, batch: int) -> Plan:
        """Buffers and arguments for a batch size; those of the last batch size are freed."""
        if batch not in self._plans:
            self._plans.clear()
            self._plans[batch] = self._made(batch)
        return self._plans[batch]

    def _made(self, batch: int) -> Plan:
        levels = self.program.levels
        tilings = [Tiling(batch, level.tokens, self._lanes, level.apart, self._widest) for level in levels]
        memory = _Memory(self.program, tilings, self._lanes, self.threads)
        plan = Plan(tilings, memory.buffers, memory.scratch)
        rows = []
        for number, (level, tiling) in enumerate(zip(levels, tilings, strict=True)):
            for operations in stages_of(level):
                items = tiling.items
                if isinstance(operations[0], WindowAttention):
                    items = _window_items(operations[0], level, batch)
                widths = sorted({int(width) for width in items[:, 1]})
                self._kernels.require((each, width) for each in operations for width in widths)
                table = np.zeros((len(operations), driver.OPERATION), dtype=np.int64)
                for row, operation in zip(table, operations, strict=True):
                    address = plan.keep(self._arguments(operation, number, plan, memory))
                    for width in widths:
                        row[2 * width - 2] = self._kernels.address(operation, width)
                        row[2 * width - 1] = address
                plan.operations.append(operations)
                plan.tables.append(table)
                plan.items.append(items)
                rows.append((table.ctypes.data, len(operations), items.ctypes.data, len(items), 0, 0))
        plan.stages = np.array(rows, dtype=np.int64).reshape(-1, driver.STAGE)
        stages = plan.stages.ctypes.data, len(plan.stages)
        plan.calls = [(*stages, own.ctypes.data) for own in plan.scratch]
        return plan

    def _arguments(self, operation: Operation, number: int, plan: Plan, memory: _Memory) -> Integers:
        """The arguments of an operation's kernel."""
        arguments = np.zeros(16, dtype=np.int64)
        if isinstance(operation, WindowAttention):
            self._window_arguments(operation, number, arguments, plan, memory)
            return arguments
        if isinstance(operation, Rows):
            memory.locate(arguments, 0, operation.input)
            arguments[gather.WRITTEN] = self.program.buffers[operation.input]
            arguments[gather.TOKENS] = plan.tilings[number].images * plan.tilings[number].tokens
            plan.rows.append(arguments)
            return arguments
        memory.locate(arguments, 3, operation.output)  # in all other kernels the second buffer
        if isinstance(operation, Patches):
            self._patches_arguments(number, arguments, plan)
            return arguments
        if isinstance(operation, Merge):
            self._merge_arguments(operation, number, arguments, plan)
            return arguments
        if isinstance(operation, Start):
            table = self.weights.tables[operation.layer]
            image = Tiling(1, len(table), self._lanes, apart=True, widest=self._widest)
            tiles = layout.to_tiles(table, image.widths, self._lanes)
            step = 4 * self._lanes * table.shape[1]
            arguments[:3] = plan.keep(tiles), step, 0
            arguments[gather.VECTORS], arguments[gather.COPIED] = image.vectors, table.shape[1]
            return arguments
        memory.locate(arguments, 0, operation.input)
        if isinstance(operation, Linear):
            self.weights.layers[operation.layer].fill(arguments)
        elif isinstance(operation, Quantize):
            arguments[int8.INPUTS] = operation.inputs
        elif isinstance(operation, LayerNorm):
            k, (scale, shift) = norm_kernel, self.weights.norms[operation.layer]
            arguments[k.FEATURES], arguments[k.EPSILON] = len(scale), bits(operation.epsilon)
            arguments[k.SCALE], arguments[k.SHIFT] = scale.ctypes.data, shift.ctypes.data
        else:
            self._attention_arguments(operation, number, arguments, plan, memory)
        return arguments

    def _attention_arguments(
        self, operation: Attention, number: int, arguments: Integers, plan: Plan, memory: _Memory
    ) -> None:
        a, tokens = attention_kernel, self.program.levels[number].tokens
        image = Tiling(1, tokens, self._lanes, apart=True, widest=self._widest)
        starts, widths = image.items.T
        left = np.minimum(tokens - starts * self._lanes, widths * self._lanes)
        keys = np.ascontiguousarray(np.stack([starts, widths, left], axis=1))
        arguments[a.SCORES : a.SCORES + 3] = memory.work, 0, 1
        arguments[a.FEATURES], arguments[a.HEADS] = operation.heads * operation.size, operation.heads
        arguments[a.HEAD_SIZE], arguments[a.SCALE] = operation.size, bits(operation.scale)
        arguments[a.VECTORS], arguments[a.TILES] = image.vectors, len(keys)
        arguments[a.KEY_TILES] = plan.keep(keys)

    def _window_arguments(
        self, operation: WindowAttention, number: int, arguments: Integers, plan: Plan, memory: _Memory
    ) -> None:
        w, level, tiling = window_kernel, self.program.levels[number], plan.tilings[number]
        cuts = [each.shift for each in level.operations if isinstance(each, WindowAttention)]
        part = windows.partition(
            level.grid, operation.window, operation.shift, self._orders[number], max(cuts)
        )
        padding = 0
        if (part.tokens < 0).any():
            column = self.weights.tables[f"{operation.layer}/padding"]
            padding = plan.keep(np.repeat(column, self._lanes))
        source, target = [
            (memory.buffers[name].ctypes.data, self.program.buffers[name])
            for name in (operation.input, operation.output)
        ]
        runs, first = windows.runs(part, tiling, source, target, padding)
        masks, kinds = part.masks(self._lanes)
        addresses = plan.keep(masks) + kinds * masks[0].nbytes
        if operation.layer not in self._biases:
            bias = part.bias(self.weights.tables[f"{operation.layer}/relative_position"], self._lanes)
            self._biases[operation.layer] = layout.aligned(bias.size)
            self._biases[operation.layer][:] = bias.ravel()
        arguments[w.RUNS], arguments[w.FIRST] = plan.keep(runs), plan.keep(first)
        arguments[w.BIAS] = self._biases[operation.layer].ctypes.data
        arguments[w.MASKS] = plan.keep(np.tile(addresses, tiling.images))
        arguments[w.HEADS], arguments[w.HEAD_SIZE] = operation.heads, operation.size
        arguments[w.FEATURES], arguments[w.SCALE] = operation.heads * operation.size, bits(operation.scale)
        arguments[w.WORK] = memory.work

    def _patches_arguments(self, number: int, arguments: Integers, plan: Plan) -> None:
        program, level, tiling = self.program, self.program.levels[number], plan.tilings[number]
        (rows, columns), (high, wide) = level.grid, program.patch
        image = 4 * program.channels * program.height * program.width
        row, column = np.divmod(np.arange(rows * columns), columns)
        within = 4 * (row * high * program.width + column * wide)
        index = np.full(tiling.vectors * self._lanes, -1, dtype=np.int64)
        slots = tiling.slots(self._orders[number])[:, level.prefix :]
        index[slots] = np.arange(tiling.images)[:, None] * image + within
        lines = np.arange(program.channels)[:, None] * program.height + np.arange(high)
        self._gather(arguments, plan, 4 * program.width * lines.ravel(), index[None], np.full_like(index, 4))
        arguments[gather.FEATURES], arguments[gather.INDEX_STEP] = wide, 0
        plan.pixels.append(arguments)

    def _merge_arguments(self, operation: Merge, number: int, arguments: Integers, plan: Plan) -> None:
        rows, columns = self.program.levels[number - 1].grid
        before, tiling = plan.tilings[number - 1 : number + 1]
        features = self.program.buffers[operation.input]
        slots = np.full((rows + rows % 2, columns + columns % 2, tiling.images), -1, dtype=np.int64)
        slots[:rows, :columns] = before.slots(self._orders[number - 1]).T.reshape(rows, columns, -1)
        index = np.full((4, tiling.vectors * self._lanes), -1, dtype=np.int64)
        strides = np.zeros_like(index)
        own = tiling.slots(self._orders[number])
        for group in range(4):
            right, below = divmod(group, 2)
            source = slots[below::2, right::2].reshape(-1, tiling.images).T
            start, stride = before.addresses(np.maximum(source, 0), features)
            index[group, own], strides[group, own] = np.where(source < 0, -1, start), stride
        arguments[gather.SOURCE] = plan.buffers[operation.input].ctypes.data
        self._gather(arguments, plan, np.zeros(4, dtype=np.int64), index, strides)
        arguments[gather.FEATURES], arguments[gather.INDEX_STEP] = features, 4 * index.shape[1]

    def _gather(
        self, arguments: Integers, plan: Plan, offsets: Integers, index: Integers, strides: Integers
    ) -> None:
        """The tables of a gather."""
        arguments[gather.GROUPS], arguments[gather.OFFSETS] = len(offsets), plan.keep(offsets)
        for at, table in ((gather.INDEX, index), (gather.STRIDES, strides)):
            if table.max() >= 2**31:
                raise ValueError(f"{plan.tilings[0].images} images at once: buffers are at most 2 GiB")
            tight = layout.aligned(table.size, np.int32)
            tight[:] = table.ravel()
            arguments[at] = plan.keep(tight)


def _window_items(operation: WindowAttention, level: Level, batch: int) -> Integers:
    """All windows and heads of a batch."""
    count = len(windows.window_tokens(level.grid, operation.window, operation.shift))
    numbers = np.arange(batch * count * operation.heads)
    return np.stack([numbers, np.ones_like(numbers)], axis=1)


class _Memory:
    """The positions of a plan's buffers: shared ones, and those in a thread's scratch (offsets in bytes)."""

    def __init__(self, program: Program, tilings: Sequence[Tiling], lanes: int, threads: int) -> None:
        self._features, self._lanes = program.buffers, lanes
        written = {
            operation.output: number
            for number, level in enumerate(program.levels)
            for operation in level.operations
            if not isinstance(operation, Rows)
        }
        self.buffers = {
            name: layout.aligned(tilings[written.get(name, 0)].vectors * lanes * features)
            for name, features in program.buffers.items()
            if name not in program.local
        }
        wide = max((width for tiling in tilings for width in tiling.widths), default=1)
        self._local, size = {}, 0
        for name in program.local:
            self._local[name] = 4 * size
            size += program.buffers[name] * wide * lanes
        self.work = 4 * size
        """Offset in bytes of the scores of attention in a thread's scratch."""
        most = 0
        for level in program.levels:
            for operation in level.operations:
                if isinstance(operation, Attention):
                    most = max(most, level.tokens * wide * lanes)
                elif isinstance(operation, WindowAttention):
                    area = operation.window[0] * operation.window[1]
                    most = max(most, window_kernel.work_floats(area, operation.size, lanes))
        self.scratch = [layout.aligned(size + most) for _ in range(threads)]

    def locate(self, arguments: Integers, at: int, name: str) -> None:
        """Write the three numbers that locate a buffer into ``arguments``, from ``at`` on."""
        if name in self._local:
            arguments[at : at + 3] = self._local[name], 0, 1
        else:
            step = 4 * self._lanes * self._features[name]
            arguments[at : at + 3] = self.buffers[name].ctypes.data, step, 0


def bits(number: float) -> int:
    """A float32 as the low half of an argument."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])
