"""The few collectives that training needs; each does nothing in a process that stands alone."""

from __future__ import annotations

from typing import TypeVar

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


def reduce_to(tensor: Tensor, owner: int) -> None:
    """The sum of every worker's tensor, in place, on ``owner`` alone."""
    if active():
        dist.reduce(tensor, dst=owner)


def share_from(tensor: Tensor, owner: int) -> Tensor:
    """``owner``'s tensor, in place, on all workers."""
    if active():
        whole = tensor.contiguous()  # others may have laid theirs out in another way
        dist.broadcast(whole, src=owner)
        if whole is not tensor:
            tensor.copy_(whole)
    return tensor


def gather(value: T) -> list[T]:
    """Every worker's value, on all of them."""
    if not active():
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def agree(text: str) -> bool:
    """Whether all workers have the same text."""
    return len(set(gather(text))) == 1


def bool_from(mask: Tensor, owner: int) -> Tensor:
    """A boolean tensor of ``owner`` on all workers (not every backend moves booleans)."""
    return share_from(mask.to(torch.uint8), owner).bool()
