"""The layers that share channels: torch-pruning's dependency graph of a model, checked.

torch-pruning traces a forward pass and follows every channel through it. It miscounts in some models: where
Swin merges patches, a norm over four patches side by side is taken for a norm over one patch. A channel then
has fewer positions than it should. That is repaired in the known cases, and is an error otherwise.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruners.errors import InputError
from pruners.structured.channels import Channels, Member

if TYPE_CHECKING:
    from torch_pruning.dependency import DependencyGraph

# Here timm's PatchMerging concatenates several copies of all channels.
_CONCATENATED = re.compile(r"(?:^|\.)downsample\.(?:norm|reduction)\.")
_TABLES = re.compile(r"relative_position_bias_table$")  # one column for each head; no channel passes through


def check_installed(key: str = "structured") -> None:
    """Check that torch-pruning is installed.

    Args:
        key: the option or recipe key that needs it, for the error message.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        expected = "needs torch-pruning, which is not installed: pip install 'espalier[deploy]'"
        raise InputError(key, None, expected)


class ChannelDependencies:
    """The channel dependency graph of a model in eval mode. The model is left as it was.

    Args:
        model: the model, on the CPU.
        images: (2, channels, height, width), any values.

    Raises:
        InputError: torch-pruning is not installed.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        check_installed()
        import torch_pruning

        self._model = copy.deepcopy(model).eval().requires_grad_(True)
        self._parameters = {id(weight): name for name, weight in self._model.named_parameters()}
        ignored = [weight for name, weight in self._model.named_parameters() if _TABLES.search(name)]
        with warnings.catch_warnings(), torch.enable_grad():
            # it warns that lone parameters (class token, positions) are cut along their last dimension
            warnings.filterwarnings("ignore", message="Unwrapped parameters")
            self._graph: DependencyGraph = torch_pruning.DependencyGraph().build_dependency(
                self._model, example_inputs=images, ignored_params=ignored
            )

    def of(self, layer: str) -> Channels:
        """The output channels of a linear or convolutional layer, in all parameters that depend on them.

        Channels are numbered from 0. In a matrix for queries, keys and values one channel is a row of each
        of the three parts.

        Raises:
            InputError: torch-pruning miscounted the channels of a parameter.
        """
        root = self._model.get_submodule(layer)
        pairs_of: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for item in self._graph.get_pruning_group(root, self._function(root), self._numbers(root)).items:
            pairs = list(zip(item.root_idxs, item.idxs, strict=True))
            for name, dim in self._parts(item.dep):
                pairs_of.setdefault((name, dim), []).extend(pairs)
        count = 1 + max(channel for channel, _ in pairs_of[f"{layer}.weight", 0])
        members = []
        for (name, dim), pairs in pairs_of.items():
            size = self._model.get_parameter(name).shape[dim]
            members.append(Member(name, dim, _positions(name, sorted(set(pairs)), count, size)))
        return Channels(layer, tuple(members))

    def _numbers(self, root: nn.Module) -> list[int]:
        """The numbers of all channels of a layer; of a matrix that is split in three, those of one third."""
        outputs = len(next(root.parameters(recurse=False)))
        first = self._graph.get_pruning_group(root, self._function(root), [0]).items[0]
        return list(range(outputs // len(first.idxs)))

    @staticmethod
    def _function(root: nn.Module) -> Any:
        """torch-pruning's function that prunes the outputs of a layer."""
        import torch_pruning

        convolution = isinstance(root, nn.Conv2d)
        return (
            torch_pruning.prune_conv_out_channels if convolution else torch_pruning.prune_linear_out_channels
        )

    def _parts(self, dependency: Any) -> Iterable[tuple[str, int]]:
        """The parameters that a dependency cuts, and along which dimension."""
        layer = dependency.layer
        if isinstance(layer, nn.Parameter):
            shape = layer.shape
            last = max(dim for dim in range(layer.ndim) if shape[dim] > 1 or layer.ndim == 1)
            yield self._parameters[id(layer)], last
            return
        inputs = dependency.handler.__name__ == "prune_in_channels"
        for weight in layer.parameters(recurse=False) if isinstance(layer, nn.Module) else ():
            if weight.ndim > 1:
                yield self._parameters[id(weight)], 1 if inputs else 0
            elif not inputs or isinstance(layer, nn.LayerNorm):
                yield self._parameters[id(weight)], 0


def _positions(name: str, pairs: Sequence[tuple[int, int]], count: int, size: int) -> Tensor:
    """The positions of each channel in a parameter.

    Args:
        name: of the parameter.
        pairs: (channel, position), as torch-pruning finds them.
        count: number of channels.
        size: number of positions.

    Returns:
        (channels, k) long.

    Raises:
        InputError: a position belongs to no channel or to several.
    """
    positions: list[list[int]] = [[] for _ in range(count)]
    for channel, position in pairs:
        positions[channel].append(position)
    copies = size // count
    if copies > 1 and _CONCATENATED.search(name) and all(len(own) < copies for own in positions):
        positions = [[copy * count + channel for copy in range(copies)] for channel in range(count)]
    whole = sorted(position for own in positions for position in own) == list(range(size))
    if not whole or any(len(own) != copies for own in positions):
        expected = "torch-pruning finds no channel of its own for each position of it; cannot be cut"
        raise InputError("structured", name, expected)
    return torch.tensor(positions)
