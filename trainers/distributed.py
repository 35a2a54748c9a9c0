"""The few collectives that training needs; each does nothing in a process that stands alone."""

from __future__ import annotations

import functools
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def sum_over_workers(tensor: Tensor) -> Tensor:
    """The sum of every worker's tensor, in place, on all of them."""
    if active():
        dist.all_reduce(tensor)
    return tensor


def reduce(tensor: Tensor, owner: int) -> None:
    """The sum of every worker's tensor, in place, on ``owner`` alone."""
    if active():
        dist.reduce(tensor, dst=owner)


def broadcast(tensor: Tensor, owner: int) -> Tensor:
    """``owner``'s tensor, in place, on all workers."""
    if active():
        whole = tensor.contiguous()  # others may have laid theirs out in another way
        dist.broadcast(whole, src=owner)
        if whole is not tensor:
            tensor.copy_(whole)
    return tensor


def all_gather(value: T) -> list[T]:
    """Every worker's value, on all of them."""
    if not active():
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_equal(text: str) -> bool:
    """Whether all workers have the same text."""
    return len(set(all_gather(text))) == 1


def mean_over_workers(tensor: Tensor) -> Tensor:
    """The mean of every worker's tensor, added up in the order of their ranks."""
    if not active():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts).sum(0) / world_size()


def broadcast_int(value: int) -> int:
    """The first worker's answer, on all of them; devices are not waited for."""
    if not active():
        return value
    answer = torch.tensor([value])
    dist.broadcast(answer, src=0, group=_host_group())
    return int(answer)


@functools.cache
def _host_group() -> dist.ProcessGroup | None:
    """A group that talks through the hosts' memory, whatever moves the gradients."""
    if dist.get_backend() == "gloo":
        return None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


def broadcast_bool(mask: Tensor, owner: int) -> Tensor:
    """A boolean tensor of ``owner`` on all workers (not every backend moves booleans)."""
    return broadcast(mask.to(torch.uint8), owner).bool()
