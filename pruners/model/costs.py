"""Parameters and multiply-accumulates (MACs) of a model, dense and sparse.

In the sparse counts a zero weight costs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


@dataclass(frozen=True)
class Costs:
    """Costs of one image.

    Attributes:
        parameters: all parameters of the model.
        parameters_sparse: the same without the pruned ones.
        macs: multiply-accumulates of a forward pass, the products of attention included.
        macs_sparse: the same without those of pruned weights.
    """

    parameters: int
    parameters_sparse: int
    macs: int
    macs_sparse: int

    def as_dict(self) -> dict[str, int]:
        """The four counts by name, as records and logs keep them."""
        return asdict(self)


@dataclass(frozen=True)
class CostModel:
    """The costs of a model at any allocation.

    Attributes:
        parameters: all parameters of the dense model.
        macs: multiply-accumulates of the dense model for one image.
        weights: number of entries of each parameter, by its name.
        weight_macs: multiply-accumulates of each parameter, by its name.
    """

    parameters: int
    macs: int
    weights: Mapping[str, int]
    weight_macs: Mapping[str, float]

    def at(self, pruned: Mapping[str, int]) -> Costs:
        """The costs of the model when ``pruned`` weights of each layer are zero."""
        saved = sum(self.weight_macs[name] * count / self.weights[name] for name, count in pruned.items())
        return Costs(
            self.parameters, self.parameters - sum(pruned.values()), self.macs, self.macs - round(saved)
        )


def cost_model(model: nn.Module, input_size: tuple[int, int, int]) -> CostModel:
    """Count the costs of a model once, for all allocations.

    The forward pass runs on the meta device, where nothing is computed. The MACs of a matrix product are
    counted for the parameters that it multiplies, whichever module holds them and whichever function is
    called.

    Args:
        model: the model; it is left as it was.
        input_size: (channels, height, width) of an image.

    Returns:
        The dense totals, and the share of each parameter.
    """
    skeleton = _on_meta(model).eval()
    weights = dict(skeleton.named_parameters())
    counter = _MacsByWeight(weights)
    floating = [weight.dtype for weight in weights.values() if weight.is_floating_point()]
    images = torch.empty(1, *input_size, device="meta", dtype=floating[0] if floating else None)
    # Attention as plain matrix products, and no fused encoder layer: the counter has no formula for those.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _slow_attention():
        skeleton(images)
    return CostModel(
        parameters=sum(weight.numel() for weight in weights.values()),
        macs=counter.macs,
        weights={name: weight.numel() for name, weight in weights.items()},
        weight_macs=counter.weight_macs,
    )


def count_costs(model: nn.Module, input_size: tuple[int, int, int], pruned: Mapping[str, int]) -> Costs:
    """Count the parameters and MACs of a model.

    >>> report = pruners.prune(model, "dimap", 0.75)
    >>> costs = count_costs(model, (3, 16, 16), report.allocation)
    >>> costs.parameters - costs.parameters_sparse == sum(report.allocation.values())
    True

    Args:
        model: the model; it is left as it was.
        input_size: (channels, height, width) of an image.
        pruned: number of pruned weights in each layer, by parameter name.

    Returns:
        The costs for one image, dense and sparse.
    """
    return cost_model(model, input_size).at(pruned)


class _MacsByWeight(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up MACs by torch's own formulas (:data:`flop_registry`), in total and for each parameter.

    A parameter is recognised by its storage, which its views share (chunks, transposes, reshapes).
    """

    _COPIES = (aten.clone, aten._to_copy)
    _SUMS = (aten.addmm, aten.baddbmm)  # the first operand is added, not multiplied

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.weight_macs = dict.fromkeys(weights, 0.0)
        self._owner = {_storage(weight): name for name, weight in weights.items() if weight.ndim >= 2}
        self._copies: list[Tensor] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operation = func._overloadpacket
        formula: Callable[..., int] | None = flop_registry.get(operation)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # an operation that is composed of others is counted through those
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            macs = formula(*args, **kwargs, out_val=result) // 2
            self.macs += macs
            operands = args[1:] if operation in self._SUMS else args
            storages = {_storage(x) for x in tree_leaves(operands) if isinstance(x, Tensor)}
            for storage in storages & self._owner.keys():
                self.weight_macs[self._owner[storage]] += macs
        elif operation in self._COPIES and (name := self._owner.get(_storage(args[0]))):
            self._owner[_storage(result)] = name
            self._copies.append(result)  # kept alive: another tensor could get its storage otherwise
        return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _on_meta(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, without values.

    ``Module.to`` needs a copy with values first, and separates tied weights.
    """
    memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    return copy.deepcopy(model, memo)


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Switch off the fast paths of ``nn.MultiheadAttention`` and its encoder, which have no formula.

    torch takes neither of them on the meta device today, but does not promise that.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
