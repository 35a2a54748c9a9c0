"""Parameters and multiply-accumulates of a model, dense and sparse-counted (a zero weight costs nothing)."""

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
    """Counts for one image; ``macs`` include the attention products."""

    parameters: int
    parameters_sparse: int
    macs: int
    macs_sparse: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class CostModel:
    """What a model costs at any allocation: totals, and each weight's size and MACs (by parameter name)."""

    parameters: int
    macs: int
    weights: Mapping[str, int]
    weight_macs: Mapping[str, float]

    def at(self, pruned: Mapping[str, int]) -> Costs:
        """Costs with so many weights pruned in each layer."""
        saved = sum(self.weight_macs[name] * count / self.weights[name] for name, count in pruned.items())
        return Costs(
            self.parameters, self.parameters - sum(pruned.values()), self.macs, self.macs - round(saved)
        )


def cost_model(model: nn.Module, input_size: tuple[int, int, int]) -> CostModel:
    """Count a model once.

    Nothing is computed: the forward runs on the meta device, so any size is counted in a moment. A product's
    MACs go to the weights that it multiplies, whatever module they lie in and however it is called.

    Args:
        input_size: (channels, height, width).
    """
    skeleton = _on_meta(model).eval()
    weights = dict(skeleton.named_parameters())
    counter = _MacsByWeight(weights)
    floating = [weight.dtype for weight in weights.values() if weight.is_floating_point()]
    images = torch.empty(1, *input_size, device="meta", dtype=floating[0] if floating else None)
    # what the counter sees through: the mathematical form of the attention, and no fused encoder layer
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _slow_attention():
        skeleton(images)
    return CostModel(
        parameters=sum(weight.numel() for weight in weights.values()),
        macs=counter.macs,
        weights={name: weight.numel() for name, weight in weights.items()},
        weight_macs=counter.weight_macs,
    )


def count_costs(model: nn.Module, input_size: tuple[int, int, int], pruned: Mapping[str, int]) -> Costs:
    """Parameters and MACs of a model with so many weights pruned in each layer (by parameter name)."""
    return cost_model(model, input_size).at(pruned)


class _MacsByWeight(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's own formulas (:data:`flop_registry`), also for each weight that is an operand.

    A weight is known by its storage, which its views share: chunks, transposes, another shape.
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
            with self:  # what is composed of other operations is counted by those
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            macs = formula(*args, **kwargs, out_val=result) // 2
            self.macs += macs
            operands = args[1:] if operation in self._SUMS else args
            places = {_storage(x) for x in tree_leaves(operands) if isinstance(x, Tensor)}
            for place in places & self._owner.keys():
                self.weight_macs[self._owner[place]] += macs
        elif operation in self._COPIES and (name := self._owner.get(_storage(args[0]))):
            self._owner[_storage(result)] = name
            self._copies.append(result)  # kept, or its place in memory would be another tensor's
        return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without values: ``Module.to`` would need one with them first, and cuts tied weights apart."""
    memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    return copy.deepcopy(model, memo)


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Without the fast paths of ``nn.MultiheadAttention`` and its encoder: operations without a formula.

    (torch takes neither on the meta device so far, which is nothing to rely on.)
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
