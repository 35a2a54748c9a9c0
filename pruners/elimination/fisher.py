"""The block-diagonal empirical Fisher (oViT §3; METHODS: F = λI + (1/m) Σ g gᵀ over B×B diagonal blocks).

F itself is accumulated, as matrix products over chunks of gradients: m rank-one updates of its inverse
would read and write d·B numbers m times. It is inverted once, in float64, where λ = 1e-8 still counts.

======================  ==============================================
paper                   here
======================  ==============================================
B                       ``block_size``
m, the gradients        ``count``
λ ("damp")              ``damp``, and ``damping(name)`` as it is used
Σ g gᵀ                  ``sums[name]``, ``total(name)`` (n, B, B)
======================  ==============================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pruners.elimination import kernels
from pruners.errors import InputError, did_you_mean
from pruners.model.layers import PrunableLayer
from pruners.model.sparsity_pattern import Pattern

_CHUNK = 128
RESIDENT = 1.5
"""Sums (¾ of d·B numbers), and gradients that wait for their matrix product, are no more than this."""
HALVED = 64
"""From this size on sums are kept by halves."""
_LARGEST = 32767  # positions in a block are kept in 16 bits


class BlockFisher:
    """Sums of g gᵀ over gradients g, for the B×B diagonal blocks of each flattened layer.

    They are symmetric: ``sums[name]`` holds the first half of the rows (n, h, B), and of the others the
    second half (n, B − h, B − h), three quarters of the numbers and of the work.

    Args:
        block_size: B, for all layers or for each module by name; cut to the layer, and rounded up to
            whole groups of ``pattern``.
        damp: λ; with ``relative`` a share of the mean of the layer's diagonal.
        dtype: of the sums (float32, or float64).
    """

    def __init__(
        self,
        layers: Sequence[PrunableLayer],
        *,
        block_size: int | Mapping[str, int] = 192,
        damp: float = 1e-8,
        relative: bool = False,
        pattern: Pattern | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not damp > 0 or math.isinf(damp):
            raise InputError("damp", damp, "must be positive")
        self.damp = damp
        self.relative = relative
        self.pattern = Pattern() if pattern is None else pattern
        self.count = 0
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._dtype = dtype
        self._sizes = block_sizes(layers, block_size, self.pattern)
        self._waiting: dict[str, Tensor] = {}
        self._taken = 0
        self._chunk = min(_CHUNK, max(1, self._room(layers)))

    def block_size(self, name: str) -> int:
        return self._sizes[name]

    def _room(self, layers: Sequence[PrunableLayer]) -> int:
        """How many gradients of these layers may wait."""
        waiting, room = 0, 0.0
        for layer in layers:
            size = self._sizes[layer.name]
            half = _half(size)
            blocks = -(-layer.numel // size)
            waiting += blocks * size
            room += blocks * (RESIDENT * size**2 - half * size - (size - half) ** 2)
        return int(room / max(waiting, 1))

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Take one gradient of the loss (a tensor for each layer, of the layer's shape)."""
        self.add_many({name: gradients[name].unsqueeze(0) for name in self._sizes})

    def add_many(self, gradients: Mapping[str, Tensor]) -> None:
        """Take k gradients at once: for each layer (k, *shape).

        Raises:
            InputError: gradients with NaN or Inf, naming layer and number; they are found when the sums
                are brought up to date, by the latest in :meth:`flush`.
        """
        total = len(next(iter(gradients.values())))
        done = 0
        while done < total:
            took = min(total - done, self._chunk - self._taken)
            for name, size in self._sizes.items():
                rows = self.pattern.flat(gradients[name].detach()[done : done + took], batched=True)
                blocks = to_blocks(rows, size)  # (took, n, B)
                if name not in self._waiting:
                    shape = (blocks.shape[1], self._chunk, size)
                    self._waiting[name] = torch.empty(shape, device=rows.device)
                self._waiting[name][:, self._taken : self._taken + took] = blocks.transpose(0, 1)
            done += took
            self._taken += took
            self.count += took
            if self._taken == self._chunk:
                self._fold()

    def flush(self) -> None:
        """Fold the gradients that wait into the sums, and give their memory back."""
        self._fold()
        self._waiting.clear()

    def parts(self, layer: PrunableLayer, device: torch.device) -> tuple[Tensor, Tensor]:
        """``sums`` of a layer; zeros on ``device`` where no gradient was taken."""
        if layer.name not in self.sums:
            size = self._sizes[layer.name]
            half, blocks = _half(size), -(-layer.numel // size)
            shapes = (blocks, half, size), (blocks, size - half, size - half)
            first, last = (torch.zeros(shape, dtype=self._dtype, device=device) for shape in shapes)
            self.sums[layer.name] = first, last
        return self.sums[layer.name]

    def discard(self, name: str) -> None:
        """Give the memory of a layer back."""
        self.sums.pop(name, None)

    def _fold(self) -> None:
        if not self._taken:
            return
        for name, waiting in self._waiting.items():
            rows = waiting[:, : self._taken].to(self._dtype)
            half = _half(rows.shape[2])
            parts = (rows[:, :, :half], rows), (rows[:, :, half:], rows[:, :, half:])
            if name in self.sums:
                for total, (left, right) in zip(self.sums[name], parts, strict=True):
                    total.baddbmm_(left.transpose(1, 2), right)
            else:
                first, last = (torch.bmm(left.transpose(1, 2), right) for left, right in parts)
                self.sums[name] = first, last
            # a sum of squares is finite if every number in it is, and much shorter than the gradients
            if not torch.isfinite(self._diagonal(name).sum()):
                self._name_the_bad(name, rows)
        self._taken = 0

    @property
    def blank(self) -> bool:
        """Whether gradients were taken, and all of them are zero: F is λI then, and says nothing."""
        return self.count > 0 and not any(bool(self._diagonal(name).any()) for name in self.sums)

    def total(self, name: str, chosen: slice = slice(None)) -> Tensor:
        """Σ g gᵀ of some blocks of a layer as whole matrices (k, B, B)."""
        first, last = (part[chosen] for part in self.sums[name])
        half, size = first.shape[1:]
        whole = first.new_empty(len(first), size, size)
        whole[:, :half] = first
        whole[:, half:, :half] = first[:, :, half:].mT
        whole[:, half:, half:] = last
        return whole

    def _diagonal(self, name: str) -> Tensor:
        return torch.cat([part.diagonal(dim1=1, dim2=2) for part in self.sums[name]], dim=1)

    def _name_the_bad(self, name: str, rows: Tensor) -> None:
        bad = (~torch.isfinite(rows).all(2).all(0)).nonzero()
        if len(bad):
            number = self.count - self._taken + int(bad[0])
            raise InputError("gradient", name, f"has NaN or Inf in batch {number}")
        raise InputError("gradient", name, f"its squares overflow {self._dtype} by batch {self.count}")

    def damping(self, name: str) -> float:
        """λ as it is added to the diagonal of a layer's blocks.

        Raises:
            InputError: no gradient was taken.
        """
        self._need_gradients()
        if not self.relative:
            return self.damp
        diagonal = self._diagonal(name)
        alive = diagonal[diagonal > 0]
        mean = float(alive.double().mean()) / self.count if len(alive) else 0.0
        return max(
            self.damp * mean, torch.finfo(torch.float32).tiny
        )  # a layer without any gradient falls first

    def blocks(self, name: str, chosen: slice, slots: Tensor, alive: Tensor) -> Tensor:
        """F (k, r, r) in float64 of the ``slots`` of some blocks of a layer; what is not alive stands alone.

        Args:
            slots: (k, r), positions in the block.
            alive: (k, r), ``False`` for weights that are zero already, and for padding.
        """
        self._need_gradients()
        sums = self.total(name, chosen)
        everything = torch.arange(sums.shape[1], device=slots.device).expand(len(slots), -1)
        if not torch.equal(slots, everything):  # some are left out, or what is alive was put first
            sums = sums.gather(1, slots.unsqueeze(2).expand(-1, -1, sums.shape[2]))
            sums = sums.gather(2, slots.unsqueeze(1).expand(-1, slots.shape[1], -1))
        fisher = sums.double().div_(self.count)
        if not bool(alive.all()):
            fisher *= (alive.unsqueeze(1) & alive.unsqueeze(2)).to(fisher.dtype)
        fisher.diagonal(dim1=1, dim2=2).add_(self.damping(name))
        return fisher

    def inverse(self, name: str, chosen: slice, slots: Tensor, alive: Tensor) -> Tensor:
        """F⁻¹ (k, r, r) of :meth:`blocks`, in float64.

        Raises:
            InputError: no gradient was taken, or a block that is not positive definite even with λ and the
                rounding of its sums.
        """
        self._need_gradients()
        inverse, sound = self._inverted(name, chosen, slots, alive)
        if not bool(sound.all()):
            # The sums carry their own rounding: what is less than that in a direction is not known to be
            # positive, so the blocks concerned are damped at that level.
            failed = self.blocks(name, chosen, slots, alive)[~sound]
            rounding = torch.finfo(self._dtype).eps * failed.abs().sum(2).amax(1)
            failed += torch.diag_embed(rounding.unsqueeze(1).expand(-1, failed.shape[1]))
            inverse[~sound], again = invert(failed)
            if not bool(again.all()):
                damp = self.damping(name)
                raise InputError(
                    "damp", damp, f"too small: a Fisher block of {name} is not positive definite"
                )
        return inverse

    def _inverted(self, name: str, chosen: slice, slots: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        first, last = (part[chosen] for part in self.sums[name])
        if not kernels.fit(first) or slots.shape[1] > kernels.LARGEST:
            return invert(self.blocks(name, chosen, slots, alive))
        inverse = torch.empty(*slots.shape, slots.shape[1], dtype=torch.float64)
        sound = torch.empty(len(slots), dtype=torch.bool)
        scale, damp = 1 / self.count, self.damping(name)

        def work(part: slice) -> None:
            ins = (
                first[part].numpy(),
                last[part].numpy(),
                scale,
                damp,
                slots[part].numpy(),
                alive[part].numpy(),
            )
            kernels.invert(*ins, inverse[part].numpy(), sound[part].numpy())

        kernels.on_threads(work, len(slots))
        return inverse, sound

    def _need_gradients(self) -> None:
        if self.count == 0:
            raise InputError("gradients", 0, "at least one gradient is needed for the Fisher")


def _half(size: int) -> int:
    return size // 2 if size >= HALVED else size


def block_sizes(
    layers: Sequence[PrunableLayer], block_size: int | Mapping[str, int], pattern: Pattern
) -> dict[str, int]:
    """B of each layer, by parameter name.

    Raises:
        InputError: a size below 1, a module that no layer has, or one without a size.
    """
    modules = sorted({layer.module for layer in layers})
    if not isinstance(block_size, Mapping):
        block_size = dict.fromkeys(modules, block_size)
    for size in block_size.values():
        if not 1 <= size <= _LARGEST:
            raise InputError("block_size", size, f"must lie between 1 and {_LARGEST}")
    missing = [module for module in modules if module not in block_size]
    if missing:
        known = f"needs a size for {missing[0]} too{did_you_mean(missing[0], block_size)}"
        raise InputError("block_size", dict(block_size), known)
    return {
        layer.name: min(math.ceil(block_size[layer.module] / pattern.group) * pattern.group, layer.numel)
        for layer in layers
    }


def invert(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of symmetric matrices (k, r, r), and whether each was positive definite (k,)."""
    factor, info = torch.linalg.cholesky_ex(matrices)
    # an infinite sum has a factor too, and an inverse of 0
    sound = (info == 0) & torch.isfinite(factor.diagonal(dim1=1, dim2=2)).all(1)
    if not bool(sound.all()):  # half a factor may have zeros on its diagonal, which LAPACK refuses
        factor[~sound] = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    return torch.cholesky_inverse(factor), sound


def to_blocks(flat: Tensor, size: int) -> Tensor:
    """Cut (…, d) into (…, n, size); the last block is padded with zeros."""
    blocks = -(-flat.shape[-1] // size)
    short = blocks * size - flat.shape[-1]
    padded = torch.nn.functional.pad(flat, (0, short)) if short else flat
    return padded.reshape(*flat.shape[:-1], blocks, size)
