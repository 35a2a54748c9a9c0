"""Which layers share their channels: read off a model's graph by torch-pruning, and checked.

torch-pruning traces a forward pass and follows every channel through it. Where it loses count (as where Swin
merges patches: a norm over four patches beside each other is taken for one over a single patch) a channel has
fewer places than the parameter has room for, which is repaired if it is known how, and an error otherwise.
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

# Copies of all channels one after the other, as timm's PatchMerging flattens them.
_BESIDE_EACH_OTHER = re.compile(r"(?:^|\.)downsample\.(?:norm|reduction)\.")
_TABLES = re.compile(r"relative_position_bias_table$")  # one column for each head; no channel passes through


def check_installed(key: str = "structured") -> None:
    """Raises:
    InputError: torch-pruning is not here.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        expected = "needs torch-pruning, which is not installed: pip install 'espalier[deploy]'"
        raise InputError(key, None, expected)


class Couplings:
    """The graph of a model, in eval mode; the model is left as it was.

    Args:
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
            # it says that lone parameters (class token, positions) are cut along their last dimension
            warnings.filterwarnings("ignore", message="Unwrapped parameters")
            self._graph: DependencyGraph = torch_pruning.DependencyGraph().build_dependency(
                self._model, example_inputs=images, ignored_params=ignored
            )

    def of(self, layer: str) -> Channels:
        """The output channels of a linear or convolutional layer, with all that is coupled to them.

        Channels are numbered from 0; those of a matrix for queries, keys and values as each of the three
        numbers them.

        Raises:
            InputError: not every channel was found in every parameter.
        """
        root = self._model.get_submodule(layer)
        found: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for item in self._graph.get_pruning_group(root, self._function(root), self._numbers(root)).items:
            pairs = list(zip(item.root_idxs, item.idxs, strict=True))
            for name, dim in self._parts(item.dep):
                found.setdefault((name, dim), []).extend(pairs)
        count = 1 + max(channel for channel, _ in found[f"{layer}.weight", 0])
        members = []
        for (name, dim), pairs in found.items():
            size = self._model.get_parameter(name).shape[dim]
            members.append(Member(name, dim, _places(name, sorted(set(pairs)), count, size)))
        return Channels(layer, tuple(members))

    def _numbers(self, root: nn.Module) -> list[int]:
        """All channels of a root; where a matrix is split in three, those of its first third name all."""
        outputs = len(next(root.parameters(recurse=False)))
        first = self._graph.get_pruning_group(root, self._function(root), [0]).items[0]
        return list(range(outputs // len(first.idxs)))

    @staticmethod
    def _function(root: nn.Module) -> Any:
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


def _places(name: str, pairs: Sequence[tuple[int, int]], count: int, size: int) -> Tensor:
    """(channel, position) as (channels, k): every position of the parameter belongs to one channel.

    Raises:
        InputError: it does not.
    """
    places: list[list[int]] = [[] for _ in range(count)]
    for channel, position in pairs:
        places[channel].append(position)
    copies = size // count
    if copies > 1 and _BESIDE_EACH_OTHER.search(name) and all(len(one) < copies for one in places):
        places = [[copy * count + channel for copy in range(copies)] for channel in range(count)]
    whole = sorted(position for one in places for position in one) == list(range(size))
    if not whole or any(len(one) != copies for one in places):
        expected = "torch-pruning finds no channel of its own for each position of it; cannot be cut"
        raise InputError("structured", name, expected)
    return torch.tensor(places)
