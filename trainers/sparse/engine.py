"""A program's packed weights and compiled kernels, for this processor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainers.sparse.kernels import attention as attention_kernel
from trainers.sparse.kernels import driver, gather, int8
from trainers.sparse.kernels import linear as linear_kernels
from trainers.sparse.kernels import norm as norm_kernel
from trainers.sparse.kernels import window_attention as window_kernel
from trainers.sparse.kernels.builder import Code
from trainers.sparse.kernels.host import Machine
from trainers.sparse.program import (
    Attention,
    LayerNorm,
    Linear,
    Merge,
    Operation,
    Patches,
    Quantize,
    Rows,
    Start,
    WindowAttention,
)
from trainers.sparse.weights import BlockWeights, SparseWeights, pack_dense, pack_sparse, panel_inputs

Array = NDArray[np.float32]
SPARSE_FROM = 0.4  # least share of zeros of a layer that a folder stores without its zeros


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
        """Number of zero weights that are neither stored nor multiplied."""
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
        """Pack a matrix.

        Args:
            weight: float32 [outputs, inputs].
            bias: float32 [outputs].
            lanes: float32 numbers in a vector.
            widest: vectors in the widest tile.
            sparse_from: least share of zeros of a layer that is packed as sparse.
            panel: inputs in a panel of a sparse matrix; default: as many as suit the caches.

        Returns:
            The layer.
        """
        outputs, inputs = weight.shape
        density = np.count_nonzero(weight) / weight.size
        if density <= 1 - sparse_from:
            panel = panel or panel_inputs(widest, lanes, density)
            return cls(outputs, inputs, bias, pack_sparse(weight, panel), None)
        return cls(outputs, inputs, bias, None, pack_dense(weight, linear_kernels.DENSE_BLOCK))

    def fill(self, arguments: NDArray[np.int64]) -> None:
        """Write the arguments of its kernel, except the positions of the buffers."""
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
    """The name of an operation's kernel for tiles of a width; the kernel of a window has no width."""
    if isinstance(operation, Linear):
        kind = layers[operation.layer].kind
        return f"{kind}{'_residual' * operation.residual}{'_gelu' * operation.gelu}_{width}"
    if isinstance(operation, WindowAttention):
        return f"window_attention{'_masked' * any(operation.shift)}_{_area(operation)}"
    if isinstance(operation, (Patches, Merge)):
        return f"gather_{width}"
    return f"{operation.kind}_{width}"


def kernel(operation: Operation, width: int, lanes: int, layers: dict[str, LinearLayer]) -> Code:
    """Write the kernel of an operation.

    Args:
        operation: the operation.
        width: vectors in a tile.
        lanes: float32 numbers in a vector.
        layers: the program's linear layers, by name.

    Returns:
        The kernel, not yet compiled.
    """
    name = kernel_name(operation, width, layers)
    if isinstance(operation, Linear):
        make = {
            "sparse": linear_kernels.sparse_linear,
            "dense": linear_kernels.dense_linear,
            "int8": int8.sparse_int8,
        }[layers[operation.layer].kind]
        end: linear_kernels.End = "gelu" if operation.gelu else "none"
        return make(name, lanes, width, residual=operation.residual, end=end)
    if isinstance(operation, WindowAttention):
        masked = any(operation.shift)
        return window_kernel.window_attention(name, lanes, _area(operation), masked=masked)
    return _WRITERS[type(operation)](name, lanes, width)


_WRITERS: dict[type, Callable[[str, int, int], Code]] = {
    Quantize: int8.quantize,
    LayerNorm: norm_kernel.layer_norm,
    Patches: gather.gather,
    Merge: gather.gather,
    Start: gather.copy,
    Rows: gather.rows,
    Attention: attention_kernel.attention,
}


def _area(operation: WindowAttention) -> int:
    return operation.window[0] * operation.window[1]


class Kernels:
    """The kernels of a program; each is compiled when tiles of its width first need it.

    Args:
        lanes: numbers in a vector.
        layers: the program's linear layers, by name.
    """

    def __init__(self, lanes: int, layers: dict[str, LinearLayer]) -> None:
        self._lanes, self._layers = lanes, layers
        self._machines: dict[str, Machine] = {}

    def require(self, needed: Iterable[tuple[Operation, int]]) -> None:
        """Compile the missing kernels of (operation, width of a tile) pairs, and the driver."""
        missing = {kernel_name(*each, self._layers): each for each in needed}
        codes = [
            kernel(operation, width, self._lanes, self._layers)
            for name, (operation, width) in missing.items()
            if name not in self._machines
        ]
        if "driver" not in self._machines:
            codes.append(driver.driver("driver", self._lanes))
        if codes:
            self._machines |= dict.fromkeys([code.name for code in codes], Machine(codes))

    def address(self, operation: Operation, width: int) -> int:
        """Address of the kernel of an operation."""
        name = kernel_name(operation, width, self._layers)
        return self._machines[name].address(name)

    @property
    def driver(self) -> int:
        """Address of the driver."""
        return self._machines["driver"].address("driver")
