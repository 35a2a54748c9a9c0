"""One linear layer alone, run as inside a model, to measure its time."""

from __future__ import annotations

from trainers.sparse import layout
from trainers.sparse.break_even import break_even
from trainers.sparse.engine import Array, LinearLayer
from trainers.sparse.kernels import host
from trainers.sparse.plan import Executor, Weights
from trainers.sparse.program import Level, Linear, Program


class SingleLinear:
    """``W x + bias`` on tiles of tokens.

    Inputs are converted to tiles at the first call only, and not again for the same array: inside a model
    they already have this layout, so only the layer is timed.

    Args:
        weight: float32 ``[outputs, inputs]``.
        bias: float32 ``[outputs]``.
        threads: how many share the work.
        sparse_from: share of zeros from which it runs sparse; default: where that is faster on this machine.
    """

    def __init__(
        self, weight: Array, bias: Array, *, threads: int = 1, sparse_from: float | None = None
    ) -> None:
        self._weight, self._bias = weight, bias
        self._threads = threads
        self._sparse_from = break_even() if sparse_from is None else sparse_from
        self._shape: tuple[int, ...] = ()
        self._given: Array | None = None

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
        return self._executor.run(len(inputs)).buffers["outputs"]

    def outputs(self) -> Array:
        """The outputs of the last call, ``[images, 1, tokens, outputs]``."""
        images, _, tokens, _ = self._shape
        plan = self._executor.plan(images)
        flat = layout.from_tiles(
            plan.buffers["outputs"], plan.tilings[0].widths, host.lanes(), images * tokens
        )
        return flat.reshape(images, 1, tokens, -1)

    def _compile(self, shape: tuple[int, ...]) -> None:
        """Make the layer ready for inputs of a shape."""
        _, _, tokens, features = shape
        layer = LinearLayer.of(
            self._weight,
            self._bias,
            lanes=host.lanes(),
            widest=layout.WIDEST,
            sparse_from=self._sparse_from,
        )
        buffers = {"inputs": features, "outputs": layer.outputs}
        level = Level((1, tokens), (Linear("layer", "inputs", "outputs"),))
        program = Program(1, 1, tokens, (1, 1), buffers, (), (level,), "outputs", "token", 1)
        self._executor = Executor(program, Weights({"layer": layer}), threads=self._threads)
        self._shape, self._given = shape, None

    def _lay_out(self, inputs: Array) -> None:
        plan = self._executor.plan(len(inputs))
        tokens = inputs.reshape(-1, inputs.shape[-1])
        plan.buffers["inputs"][:] = layout.to_tiles(tokens, plan.tilings[0].widths, host.lanes())
        self._given = inputs
