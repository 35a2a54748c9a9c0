"""Forward passes of many batches side by side, which all stop at the same layer.

A layer's new weights change the inputs of all later layers. With one batch after the other, each layer would
need a pass over all images. Here every batch has its own forward pass in a greenlet, which stops at the layer
until it has its new weights, and then continues to the next layer: one pass in all. A stopped pass holds in
memory the activations that the rest of the model needs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import greenlet
from torch import Tensor, nn


class Stop(NamedTuple):
    """The layer at which a forward pass is stopped, and the input or output of that layer."""

    layer: str
    tensor: Tensor


class Lockstep:
    """Forward passes of one model on several batches, which are stopped at each of some layers.

    Args:
        model: in evaluation mode.
        layers: the modules at which to stop, by name.
        batches: images, (batch, channels, height, width), on the model's device.
        outputs: stop after a layer, with its output, instead of before it, with its input. A layer before
            which a pass was stopped runs with the weights that it has when the pass continues.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor], *, outputs: bool
    ) -> None:
        self._layers, self._outputs = layers, outputs
        self._passes = [greenlet.greenlet(_forward(model, images)) for images in batches]

    def stops(self) -> Generator[list[Stop]]:
        """Iterate over the layers in the order in which the model calls them, with the stops of all batches.

        The passes continue when the next layer is asked for. Closing the iterator early ends them.

        Raises:
            RuntimeError: the batches call the layers in different orders.
        """
        with self._halting():
            try:
                while True:
                    reached = [run.switch() for run in self._passes]
                    stops = [stop for stop in reached if stop is not None]
                    if not stops:
                        return
                    if len({stop.layer for stop in stops}) > 1 or len(stops) < len(reached):
                        raise RuntimeError(
                            f"the model takes another way with other images at {stops[0].layer}"
                        )
                    yield stops
            finally:
                for run in self._passes:
                    if not run.dead:
                        run.throw(greenlet.GreenletExit)

    @contextmanager
    def _halting(self) -> Iterator[None]:
        """Hooks by which a pass stops and returns control to :meth:`stops`."""
        with ExitStack() as hooks:
            for name, module in self._layers.items():
                halt: Callable[..., None]
                if self._outputs:

                    def halt(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                        _halt(Stop(name, output))

                    hooks.callback(module.register_forward_hook(halt).remove)
                else:

                    def halt(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                        _halt(Stop(name, inputs[0]))

                    hooks.callback(module.register_forward_pre_hook(halt).remove)
            yield


def _forward(model: nn.Module, images: Tensor) -> Callable[[], None]:
    def forward() -> None:
        model(images)  # the outputs are not used

    return forward


def _halt(stop: Stop) -> None:
    parent = greenlet.getcurrent().parent
    assert parent is not None, "the hooks are there only while passes are driven"
    parent.switch(stop)
