"""Tensors that say they lie on ``cuda`` and hold their numbers on the CPU, for machines without a GPU.

PyTorch's own fake tensors know shapes and devices, but no values: what an elimination decides by its numbers
(``int(alive.sum())``) cannot run with them, and neither can a backward pass for ``cuda`` without a driver.
These have values too. Every operation is checked by the rule of fake tensors (all on one device, but for
single numbers of the CPU and for indices), then done on the CPU.

Not shown so: autocast and the scaler (PyTorch turns both off where there is no CUDA), NCCL, compilation and
quantization-aware training (both trace a model, which takes tensors of PyTorch's own), streams, memory,
pinning, kernels that round otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
_Generator = torch.Generator
_INSIDE = torch.device("meta")  # what autograd is told: on a CUDA device it would ask the driver

aten = torch.ops.aten
# these read from one device and write to another, or take indices and single numbers from the CPU
_CROSSING = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


class MixedDevicesError(RuntimeError):
    """Tensors of two devices in one operation."""


class OnCuda(Tensor):
    """A tensor whose numbers are those of ``held``, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCuda:
        made: OnCuda = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_INSIDE,
            requires_grad=False,
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"OnCuda({self.held!r})"

    def numpy(self, **_: object) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], *_: object) -> OnCuda:
        return OnCuda(inner["held"])

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _run(func, args, kwargs or {})


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """``change`` of each leaf; PyTorch's own trees are slow, and this runs for every operation."""
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)([_mapped(change, one) for one in value])
    return change(value)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnCuda) else value


def _check(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> bool:
    """Whether the operation is one of the device; raises where tensors of both are given."""
    indices = func in _INDEXING
    operands = [args[0]] if indices else tensors
    ours = any(isinstance(one, OnCuda) for one in operands)
    if func in _CROSSING:
        return ours
    if ours and any(one.ndim and not isinstance(one, OnCuda) for one in operands):
        shapes = [tuple(one.shape) for one in operands if not isinstance(one, OnCuda)]
        raise MixedDevicesError(f"{func}: cuda:0 and cpu, the latter of shape {shapes[0]}")
    if indices and not ours and any(isinstance(one, OnCuda) for one in tensors):
        raise MixedDevicesError(f"{func}: indices on cuda:0 for a tensor on the cpu")
    return ours


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = list(_tensors([*args, *kwargs.values()]))
    on_device = _check(func, args, tensors)
    changed = {key: _mapped(_held, value) for key, value in kwargs.items()}
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == _INSIDE.type
        changed["device"] = torch.device("cpu")
    if "pin_memory" in kwargs:
        changed["pin_memory"] = False
    result = func(*(_mapped(_held, one) for one in args), **changed)
    given = {id(_held(one)): one for one in tensors}

    def given_back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in given:  # in place: the very tensor that was given
            return given[id(value)]
        return OnCuda(value) if on_device else value

    return _mapped(given_back, result)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _renamed(value: Any) -> Any:
    """``cuda`` as what autograd is told, before PyTorch looks for a driver."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return _INSIDE
    return _INSIDE if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class _Function(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func == Tensor.data.__set__ and isinstance(args[0], OnCuda):  # type: ignore[attr-defined]
            func(*args)  # shape and type; the numbers are ours to exchange
            args[0].held = args[1].held
            return None
        if func is Tensor.cuda:
            return args[0].to(_INSIDE)
        if func is Tensor.tolist and isinstance(args[0], OnCuda):  # PyTorch refuses it of subclasses
            return args[0].held.tolist()
        renamed = {key: _renamed(value) for key, value in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and renamed.get("device") == _INSIDE:
            # filled below dispatch, where a tensor of autograd's device would have no values
            return func(*args, **{**renamed, "device": "cpu"}).to(_INSIDE)
        return func(*(_renamed(one) for one in args), **renamed)


@contextmanager
def labelled_cuda() -> Iterator[torch.device]:
    """Within, ``cuda`` is a device whose tensors must not meet others."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the objects they are
    free = mock.patch.object(torch.cuda, "mem_get_info", return_value=(1 << 33, 1 << 33))
    drawn = mock.patch.object(torch, "Generator", side_effect=lambda device=None: _Generator())
    try:
        with free, drawn, _Dispatch(), _Function():
            yield CUDA
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
