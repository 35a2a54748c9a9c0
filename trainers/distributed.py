"""The collectives that training needs; in a process without a process group each returns its input."""

from __future__ import annotations

import functools
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def active() -> bool:
    """Return whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This worker's rank; 0 without a process group."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """The number of workers; 1 without a process group."""
    return dist.get_world_size() if active() else 1


def sum_over_workers(tensor: Tensor) -> Tensor:
    """Sum a tensor over the workers (all-reduce), in place, on all of them."""
    if active():
        dist.all_reduce(tensor)
    return tensor


def reduce(tensor: Tensor, owner: int) -> None:
    """Sum a tensor over the workers, in place, on the rank ``owner`` alone."""
    if active():
        dist.reduce(tensor, dst=owner)


def broadcast(tensor: Tensor, owner: int) -> Tensor:
    """Copy the tensor of the rank ``owner`` to all workers, in place."""
    if active():
        whole = tensor.contiguous()  # the workers' tensors may have different memory formats
        dist.broadcast(whole, src=owner)
        if whole is not tensor:
            tensor.copy_(whole)
    return tensor


def all_gather(value: T) -> list[T]:
    """Every worker's value in the order of ranks, on all of them."""
    if not active():
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_equal(text: str) -> bool:
    """Return whether all workers have the same text."""
    return len(set(all_gather(text))) == 1


def mean_over_workers(tensor: Tensor) -> Tensor:
    """The mean of a tensor over the workers, added up in the order of ranks: the same bits on all of them."""
    if not active():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts).sum(0) / world_size()


def broadcast_int(value: int) -> int:
    """Broadcast an int from rank 0 over gloo, without synchronising the GPU."""
    if not active():
        return value
    tensor = torch.tensor([value])
    dist.broadcast(tensor, src=0, group=_host_group())
    return int(tensor)


def forget_groups() -> None:
    """Forget the groups made beside a default one that is gone; a process may get another."""
    _host_group.cache_clear()


@functools.cache
def _host_group() -> dist.ProcessGroup | None:
    """A gloo group, which communicates through host memory; ``None``: the default group is one."""
    if dist.get_backend() == "gloo":
        return None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


def broadcast_bool(mask: Tensor, owner: int) -> Tensor:
    """Broadcast a boolean tensor from the rank ``owner``, as uint8: not every backend takes booleans."""
    return broadcast(mask.to(torch.uint8), owner).bool()
