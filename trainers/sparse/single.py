"""One linear layer by itself, as it runs inside a model: for measuring how long it takes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from trainers.sparse import engine, layout
from trainers.sparse.engine import Array, LinearLayer, Plan
from trainers.sparse.kernels import host
from trainers.sparse.program import Linear, Program


class SingleLinear:
    """``W x + bias`` on tiles of tokens.

    Inputs are laid out as tiles when they are given for the first time and not again with the same array:
    inside a model they lie so already, and what is timed is the layer alone.

    Args:
        weight: float32 ``[outputs, inputs]``.
        bias: float32 ``[outputs]``.
        threads: how many share the work.
        sparse_from: share of zeros from which it runs sparse.
    """

    def __init__(
        self, weight: Array, bias: Array, *, threads: int = 1, sparse_from: float = engine.SPARSE_FROM
    ) -> None:
        self._weight, self._bias = weight, bias
        self._threads, self._sparse_from = threads, sparse_from
        self._shape: tuple[int, ...] = ()
        self._given: Array | None = None
        self._pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None

    def __call__(self, inputs: Array) -> Array:
        """Run the layer on inputs ``[images, 1, tokens, inputs]``.

        Returns:
            The buffer of its outputs in tiles (:mod:`trainers.sparse.layout`), which the next call
            overwrites; :meth:`outputs` is the same as an array.
        """
        if inputs.shape != self._shape:
            self._compile(inputs.shape)
        if inputs is not self._given:
            self._lay_out(inputs)
        plan = self._plan
        plan.stages[:, 4:] = 0
        arguments = [(plan.stages.ctypes.data, len(plan.stages), own.ctypes.data) for own in plan.scratch]
        waiting = [self._pool.submit(self._run, *each) for each in arguments[1:]] if self._pool else []
        self._run(*arguments[0])
        for each in waiting:
            each.result()
        return plan.buffers["outputs"]

    def outputs(self) -> Array:
        """The outputs of the last call, ``[images, 1, tokens, outputs]``."""
        images, _, tokens, _ = self._shape
        flat = self._plan.buffers["outputs"].reshape(images, -1)
        rows = [layout.from_tiles(image, self._widths, self._lanes, tokens) for image in flat]
        return np.stack(rows)[:, None]

    def _compile(self, shape: tuple[int, ...]) -> None:
        """Make the layer ready for inputs of a shape."""
        images, _, tokens, features = shape
        lanes = self._lanes = host.lanes()
        widths = self._widths = layout.tile_widths(layout.vectors_of(tokens, lanes))
        layer = LinearLayer.of(
            self._weight, self._bias, lanes=lanes, widest=max(widths), sparse_from=self._sparse_from
        )
        buffers = {"inputs": features, "outputs": layer.outputs}
        operations = (Linear("layer", "inputs", "outputs"),)
        program = Program(1, tokens, 1, (1, 1), 0, buffers, (), operations, "outputs", "token", 1)
        self._layers = {"layer": layer}
        self._machine = engine.compiled(program, widths, lanes, self._layers)
        self._plan: Plan = engine.plan(
            program,
            self._machine,
            self._layers,
            {},
            lanes=lanes,
            widths=widths,
            batch=images,
            threads=self._threads,
        )
        self._run = host.function(self._machine.address("driver"), 3)
        self._shape, self._given = shape, None

    def _lay_out(self, inputs: Array) -> None:
        tiles = self._plan.buffers["inputs"].reshape(len(inputs), -1)
        for row, image in zip(tiles, inputs[:, 0], strict=True):
            row[:] = layout.to_tiles(image, self._widths, self._lanes)
        self._given = inputs
