"""Forward passes of many batches side by side, which all stop at the same layer.

A layer's new weights change what the layers after it receive. With one batch after the other that would take
a pass over all images for each layer. Here every batch has a forward pass of its own, a greenlet, that is
halted at the layer until its weights are there, and then goes on to the next one: one pass in all. Halted, a
batch holds what the rest of the model needs of it, the activations at that place.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import greenlet
from torch import Tensor, nn


class Stop(NamedTuple):
    """Where a forward pass is halted: at which layer, and that layer's input or output there."""

    layer: str
    tensor: Tensor


class Lockstep:
    """Forward passes of one model on some batches, which are halted at each of some layers.

    Args:
        model: in evaluation mode.
        layers: the modules at which to halt, by name.
        batches: images, (batch, channels, height, width), on the model's device.
        outputs: whether to halt behind a layer, with its output, instead of before it, with its input. Before
            it, the layer then runs with the weights that it has when the pass goes on.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor], *, outputs: bool
    ) -> None:
        self._layers, self._outputs = layers, outputs
        self._passes = [greenlet.greenlet(_forward(model, images)) for images in batches]

    def stops(self) -> Generator[list[Stop]]:
        """For each layer, in the order in which the model calls them, where all batches are halted.

        The passes go on when the next stop is asked for. Whoever leaves before the end ends them.

        Raises:
            RuntimeError: the batches do not take the same way through the model.
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
        """Hooks by which a pass returns to whoever drives it."""
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
        model(images)  # what it answers is of no interest

    return forward


def _halt(stop: Stop) -> None:
    parent = greenlet.getcurrent().parent
    assert parent is not None, "the hooks are there only while passes are driven"
    parent.switch(stop)
