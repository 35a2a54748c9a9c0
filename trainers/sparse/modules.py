"""Replace single layers of any torch model by the sparse kernel, for models that cannot be packed.

    swapped = sparse_linear_modules(model, images)
    swapped.sparse      # names of the layers that run without their zeros now

Between such a layer and its neighbours, which stay torch's, activations change their order in memory, and
nothing is fused: a model that :mod:`trainers.sparse.packing` takes is faster there.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainers.sparse.break_even import break_even
from trainers.sparse.engine import LinearLayer
from trainers.sparse.families.tensors import numbers
from trainers.sparse.kernels import host
from trainers.sparse.layout import WIDEST
from trainers.sparse.plan import Executor, Weights
from trainers.sparse.program import Level, Linear, Patches, Program, Rows

RELATIVE = 1e-3  # the largest accepted difference of outputs, as a share of the largest output


class SparseLinear(nn.Module):
    """A :class:`torch.nn.Linear` on the sparse kernel, for inference on the CPU.

    Args:
        dense: the layer that it replaces; its zeros are left out.
        threads: how many share the work of a call.
    """

    def __init__(self, dense: nn.Linear, *, threads: int = 1) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        bias = torch.zeros(dense.out_features) if dense.bias is None else dense.bias
        layer = LinearLayer.of(
            numbers(dense.weight), numbers(bias), lanes=host.lanes(), widest=WIDEST, sparse_from=0.0
        )
        operations = (Patches("x"), Linear("layer", "x", "y"), Rows("y"))
        buffers = {"x": self.in_features, "y": self.out_features}
        level = Level((1, 1), operations)
        # every token is an image of one row of pixels, so that a batch has as many as there are
        size = 1, 1, self.in_features
        program = Program(*size, (1, self.in_features), buffers, ("x", "y"), (level,), "y", "token", 1)
        self._executor = Executor(program, Weights({"layer": layer}), threads=threads)
        self._lock = threading.Lock()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (…, inputs), float32, to outputs (…, outputs).

        Raises:
            ValueError: inputs of another type, or on another device.
        """
        if inputs.dtype != torch.float32 or inputs.device.type != "cpu":
            raise ValueError(f"float32 on the processor is needed, not {inputs.dtype} on {inputs.device}")
        rows = inputs.detach().reshape(-1, 1, 1, self.in_features).contiguous()
        outputs = torch.empty(len(rows), self.out_features)
        if len(rows):
            with self._lock:
                self._executor.run(len(rows), rows.numpy(), outputs.numpy())
        return outputs.reshape(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Inputs and outputs, for ``print`` of a model."""
        return f"{self.in_features}, {self.out_features}"


@dataclass(frozen=True)
class Swapped:
    """What became of the linear layers of a model.

    Attributes:
        sparse: names of those that were replaced.
        dense: names of those that have too few zeros to gain anything.
        left: name -> why the layer stays as it is, of all others.
    """

    sparse: tuple[str, ...]
    dense: tuple[str, ...]
    left: dict[str, str]


def sparse_linear_modules(
    model: nn.Module, example: Tensor, *, threads: int = 1, sparse_from: float | None = None
) -> Swapped:
    """Replace the linear layers of a model by :class:`SparseLinear`, in place, where zeros save time.

    Args:
        model: any model, in evaluation mode, float32, on the processor.
        example: inputs of the model, of any shape that it takes; its outputs for them are compared before
            and after.
        threads: how many share the work of a layer.
        sparse_from: share of zeros (0 to 1) from which a layer is replaced; default: where the kernel is
            faster on this machine.

    Returns:
        Which layers were replaced, which were not, and why.

    Raises:
        ValueError: no layer has enough zeros and can be replaced (named, with the reasons), or an output
            differs by more than a thousandth of the largest (the model is as it was before).
    """
    least = break_even() if sparse_from is None else sparse_from
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected, called = _answer(model, example, linear)
    left, dense, chosen = {}, [], []
    for name, module in linear.items():
        reason = _reason(module, called=name in called)
        if reason is not None:
            left[name] = reason
        elif float((module.weight == 0).float().mean()) < least:
            dense.append(name)
        else:
            chosen.append(name)
    if not chosen:
        reasons = "; ".join(f"{name} {reason}" for name, reason in left.items()) or "none"
        raise ValueError(
            f"{type(model).__name__}: no linear layer can run sparse: {len(dense)} have less than "
            f"{least:.0%} zeros; cannot be replaced: {reasons}"
        )
    for name in chosen:
        _replace(model, name, SparseLinear(linear[name], threads=threads))
    try:
        answer, _ = _answer(model, example, {})
        off = float((answer - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if not off <= RELATIVE:
            raise ValueError(f"answers differ by {off:.2g} of the largest")
    except Exception as error:
        for name in chosen:
            _replace(model, name, linear[name])
        raise ValueError(f"{type(model).__name__} with {', '.join(chosen)} replaced: {error}") from error
    return Swapped(tuple(chosen), tuple(dense), left)


def _reason(module: nn.Linear, *, called: bool) -> str | None:
    """The reason why a layer cannot be replaced; ``None`` if it can."""
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}"
    if not called:
        return "is not called as a module: its weight is read elsewhere"
    if module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
        return f"is {module.weight.dtype} on {module.weight.device}"
    return None


def _answer(model: nn.Module, example: Tensor, watched: dict[str, nn.Linear]) -> tuple[Tensor, set[str]]:
    """A model's answer, and which of the watched layers were called for it."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in watched.items()
    ]
    try:
        with torch.no_grad():
            answer: Any = model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(answer, Tensor):
        raise ValueError(f"{type(model).__name__}: one tensor is needed as an answer, not {type(answer)}")
    return answer, called


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, part = name.rpartition(".")
    setattr(model.get_submodule(owner), part, module)
