"""The block-diagonal empirical Fisher (oViT §3; METHODS: F = λI + (1/m) Σ g gᵀ over B×B diagonal blocks).

The code accumulates F itself, by matrix products over chunks of gradients. (The paper updates its inverse by
m rank-one updates, which read and write d·B numbers m times.) F is inverted once, in float64, where λ = 1e-8
is not lost by rounding.

======================  ==============================================
paper                   here
======================  ==============================================
B                       ``block_size``
m, the gradients        ``count``
λ ("damp")              ``damp``, and ``damping(name)`` for a layer
Σ g gᵀ                  ``sums[name]``, ``total(name)`` (n, B, B)
======================  ==============================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.arithmetic import ceil_div
from pruners.elimination import kernels
from pruners.errors import InputError, did_you_mean
from pruners.model.layers import PrunableLayer
from pruners.model.sparsity_pattern import Pattern

_BUFFER_LENGTH = 128  # gradients that one matrix product adds to the sums
RESIDENT = 1.5
"""Limit on the memory of the sums and of buffered gradients, in multiples of d·B numbers."""
HALVED = 64
"""Blocks of at least this size store three quarters of their symmetric sums."""
_LARGEST = 32767  # positions in a block are stored in 16 bits


@dataclass(frozen=True)
class SumsOfGradients:
    """The input of the compiled loops that compute the inverses of k Fisher blocks.

    Attributes:
        first: the first h rows of the sums, (k, h, B).
        last: the last B − h columns of the other rows, (k, B − h, B − h).
        scale: 1/m.
        damp: λ.
        slots: (k, r), the positions in each block.
    """

    first: Tensor
    last: Tensor
    scale: float
    damp: float
    slots: Tensor


class BlockFisher:
    """Sums of g gᵀ over gradients g, for the B×B diagonal blocks of each flattened layer.

    The blocks are symmetric, and so three quarters of them are computed and stored: ``sums[name]`` holds the
    first h rows (n, h, B), and the last B − h columns of the other rows (n, B − h, B − h). A layer of d
    weights has n = ⌈d / B⌉ blocks.

    Args:
        layers: the layers.
        block_size: B, for all layers, or for each module by name. It is limited to the size of the layer,
            and rounded up to whole groups of ``pattern``.
        damp: λ.
        relative: whether λ is a share of the mean of each layer's diagonal.
        pattern: the sparsity pattern, which decides in which order weights are flattened.
        dtype: of the sums, float32 or float64.

    Attributes:
        count: number of gradients so far.
        sums: the two parts of each layer's sums, by parameter name.

    Raises:
        InputError: λ is not positive, or a block size cannot be used.
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
        self._buffers: dict[str, Tensor] = {}
        self._buffered = 0
        self._buffer_length = min(_BUFFER_LENGTH, max(1, self._gradients_that_fit(layers)))

    def block_size(self, name: str) -> int:
        """B of a layer, by parameter name."""
        return self._sizes[name]

    def _gradients_that_fit(self, layers: Sequence[PrunableLayer]) -> int:
        """Number of gradients that the buffers may hold within the memory limit."""
        numel, room = 0, 0.0
        for layer in layers:
            size = self._sizes[layer.name]
            half = _half(size)
            blocks = ceil_div(layer.numel, size)
            numel += blocks * size
            room += blocks * (RESIDENT * size**2 - half * size - (size - half) ** 2)
        return int(room / max(numel, 1))

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add one gradient of the loss: for each layer a tensor of the layer's shape."""
        self.add_many({name: gradients[name].unsqueeze(0) for name in self._sizes})

    def add_many(self, gradients: Mapping[str, Tensor]) -> None:
        """Add k gradients at once: for each layer (k, *shape).

        Raises:
            InputError: gradients with NaN or Inf; the error names the layer and the number of the gradient.
                They are noticed when the buffers are added to the sums, in :meth:`flush` at the latest.
        """
        total = len(next(iter(gradients.values())))
        done = 0
        while done < total:
            added = min(total - done, self._buffer_length - self._buffered)
            for name, size in self._sizes.items():
                rows = self.pattern.flat(gradients[name].detach()[done : done + added], batched=True)
                blocks = to_blocks(rows, size)  # (added, n, B)
                if name not in self._buffers:
                    shape = (self._buffer_length, blocks.shape[1], size)
                    self._buffers[name] = torch.empty(shape, device=rows.device)
                self._buffers[name][self._buffered : self._buffered + added] = blocks
            done += added
            self._buffered += added
            self.count += added
            if self._buffered == self._buffer_length:
                self._add_buffers()

    def flush(self) -> None:
        """Add the buffered gradients to the sums, make these symmetric, and free the buffers."""
        self._add_buffers()
        for name, rows in self._buffers.items():
            if self._by_tiles(rows):
                first, last = self.sums[name]

                def work(part: slice, first: Tensor = first, last: Tensor = last) -> None:
                    kernels.sums.complete(first[part].numpy(), last[part].numpy())

                kernels.threads.on_threads(work, len(first))
        self._buffers.clear()

    def parts(self, layer: PrunableLayer, device: torch.device) -> tuple[Tensor, Tensor]:
        """The sums of a layer; zeros on ``device`` if there was no gradient."""
        if layer.name not in self.sums:
            size = self._sizes[layer.name]
            half, blocks = _half(size), ceil_div(layer.numel, size)
            shapes = (blocks, half, size), (blocks, size - half, size - half)
            first, last = (torch.zeros(shape, dtype=self._dtype, device=device) for shape in shapes)
            self.sums[layer.name] = first, last
        return self.sums[layer.name]

    def discard(self, name: str) -> None:
        """Free the memory of a layer."""
        self.sums.pop(name, None)

    def _add_buffers(self) -> None:
        if not self._buffered:
            return
        for name, gradients in self._buffers.items():
            rows = gradients[: self._buffered].to(self._dtype)
            self._add_rows(name, rows)
            # The diagonal has far fewer numbers than the gradients, and is finite if all of them are.
            if not torch.isfinite(self._diagonal(name).sum()):
                self._raise_not_finite(name, rows)
        self._buffered = 0

    def _by_tiles(self, rows: Tensor) -> bool:
        """Return whether compiled loops add gradients (k, n, B) to the sums."""
        half = _half(rows.shape[2])
        halved = kernels.threads.supports(rows) and half < rows.shape[2]
        return halved and self._dtype == torch.float32 and half >= kernels.sums.LEAST_HALF

    def _add_rows(self, name: str, rows: Tensor) -> None:
        """Add gradients (k, n, B) to the sums of a layer."""
        _, blocks, size = rows.shape
        half, fresh = _half(size), name not in self.sums
        if self._by_tiles(rows):
            if fresh:
                shapes = (blocks, half, size), (blocks, size - half, size - half)
                self.sums[name] = torch.empty(shapes[0]), torch.empty(shapes[1])
            first, last = self.sums[name]

            def work(part: slice) -> None:
                sums = first[part].numpy(), last[part].numpy()
                kernels.sums.accumulate(*sums, rows.numpy(), part.start, fresh)

            kernels.threads.on_threads(work, blocks)
            return
        rows = rows.transpose(0, 1)
        parts = (rows[:, :, :half], rows), (rows[:, :, half:], rows[:, :, half:])
        if fresh:
            first, last = (torch.bmm(left.transpose(1, 2), right) for left, right in parts)
            self.sums[name] = first, last
        else:
            for total, (left, right) in zip(self.sums[name], parts, strict=True):
                total.baddbmm_(left.transpose(1, 2), right)

    @property
    def blank(self) -> bool:
        """Return whether all gradients so far are zero; F is then λI, which is useless."""
        return self.count > 0 and not any(bool(self._diagonal(name).any()) for name in self.sums)

    def total(self, name: str, chosen: slice = slice(None)) -> Tensor:
        """Σ g gᵀ of the ``chosen`` blocks of a layer, as full matrices (k, B, B)."""
        first, last = (part[chosen] for part in self.sums[name])
        half, size = first.shape[1:]
        whole = first.new_empty(len(first), size, size)
        whole[:, :half] = first
        whole[:, half:, :half] = first[:, :, half:].mT
        whole[:, half:, half:] = last
        return whole

    def _diagonal(self, name: str) -> Tensor:
        """The diagonals (n, B) of the sums of a layer."""
        return torch.cat([part.diagonal(dim1=1, dim2=2) for part in self.sums[name]], dim=1)

    def _raise_not_finite(self, name: str, rows: Tensor) -> None:
        """Raise the error that names the first gradient with NaN or Inf."""
        bad = (~torch.isfinite(rows).all(2).all(1)).nonzero()
        if len(bad):
            number = self.count - self._buffered + int(bad[0])
            raise InputError("gradient", name, f"has NaN or Inf in batch {number}")
        raise InputError("gradient", name, f"its squares overflow {self._dtype} by batch {self.count}")

    def damping(self, name: str) -> float:
        """λ as it is added to the diagonal of a layer's blocks, in absolute terms.

        Raises:
            InputError: there was no gradient.
        """
        self._need_gradients()
        if not self.relative:
            return self.damp
        diagonal = self._diagonal(name)
        alive = diagonal[diagonal > 0]
        mean = float(alive.double().mean()) / self.count if len(alive) else 0.0
        # A layer without any gradient gets the smallest λ, and so is pruned first.
        return max(self.damp * mean, torch.finfo(torch.float32).tiny)

    def blocks(self, name: str, chosen: slice, slots: Tensor, alive: Tensor) -> Tensor:
        """F for some positions of some blocks of a layer.

        Args:
            name: of the layer.
            chosen: which k of the layer's blocks.
            slots: (k, r), positions in each block.
            alive: (k, r) bool, ``False`` for weights that are zero already, and for padding. Their rows and
                columns are zero but for λ on the diagonal.

        Returns:
            (k, r, r), in float64.

        Raises:
            InputError: there was no gradient.
        """
        self._need_gradients()
        sums = self.total(name, chosen)
        everything = torch.arange(sums.shape[1], device=slots.device).expand(len(slots), -1)
        if not torch.equal(slots, everything):  # positions are left out, or in another order
            sums = sums.gather(1, slots.unsqueeze(2).expand(-1, -1, sums.shape[2]))
            sums = sums.gather(2, slots.unsqueeze(1).expand(-1, slots.shape[1], -1))
        fisher = sums.double().div_(self.count)
        if not bool(alive.all()):
            fisher *= (alive.unsqueeze(1) & alive.unsqueeze(2)).to(fisher.dtype)
        fisher.diagonal(dim1=1, dim2=2).add_(self.damping(name))
        return fisher

    def inverse(self, name: str, chosen: slice, slots: Tensor, alive: Tensor) -> Tensor:
        """Invert F for some positions of some blocks of a layer (see :meth:`blocks`).

        Args:
            name: of the layer.
            chosen: which k of the layer's blocks.
            slots: (k, r), positions in each block.
            alive: (k, r) bool, ``False`` for weights that are zero already, and for padding.

        Returns:
            F⁻¹ (k, r, r), in float64.

        Raises:
            InputError: there was no gradient, or a block is not positive definite even with λ and the
                rounding error of its sums on its diagonal.
        """
        self._need_gradients()
        inverse, sound = self._inverted(name, chosen, slots, alive)
        if not bool(sound.all()):
            # The sums have a rounding error. An eigenvalue below it may be negative by chance, so these
            # blocks are damped by that amount.
            failed = self.blocks(name, chosen, slots, alive)[~sound]
            rounding = torch.finfo(self._dtype).eps * failed.abs().sum(2).amax(1)
            failed += torch.diag_embed(rounding.unsqueeze(1).expand(-1, failed.shape[1]))
            inverse[~sound], sound_now = invert(failed)
            if not bool(sound_now.all()):
                damp = self.damping(name)
                raise InputError(
                    "damp", damp, f"too small: a Fisher block of {name} is not positive definite"
                )
        return inverse

    def on_cpu(self, name: str, chosen: slice, slots: Tensor) -> SumsOfGradients | None:
        """The sums of some blocks of a layer, if the compiled loops can invert them.

        Args:
            name: of the layer.
            chosen: which k of the layer's blocks.
            slots: (k, r), positions in each block.

        Raises:
            InputError: there was no gradient.
        """
        self._need_gradients()
        first, last = (part[chosen] for part in self.sums[name])
        if not kernels.threads.supports(first) or slots.shape[1] > kernels.inverse.LARGEST:
            return None
        return SumsOfGradients(first, last, 1 / self.count, self.damping(name), slots)

    def _inverted(self, name: str, chosen: slice, slots: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Inverses (k, r, r), and whether each block was positive definite (k,)."""
        sums = self.on_cpu(name, chosen, slots)
        if sums is None:
            return invert(self.blocks(name, chosen, slots, alive))
        inverse = torch.empty(*slots.shape, slots.shape[1], dtype=torch.float64)
        sound = torch.empty(len(slots), dtype=torch.bool)

        def work(part: slice) -> None:
            first, last = sums.first[part].numpy(), sums.last[part].numpy()
            rest = (one[part].numpy() for one in (slots, alive, inverse, sound))
            kernels.inverse.invert(first, last, sums.scale, sums.damp, *rest)

        kernels.threads.on_threads(work, len(slots))
        return inverse, sound

    def _need_gradients(self) -> None:
        if self.count == 0:
            raise InputError("gradients", 0, "at least one gradient is needed for the Fisher")


def _half(size: int) -> int:
    """h, the number of rows that are stored in full."""
    return size // 2 if size >= HALVED else size


def block_sizes(
    layers: Sequence[PrunableLayer], block_size: int | Mapping[str, int], pattern: Pattern
) -> dict[str, int]:
    """Choose the block size B of each layer.

    Args:
        layers: the layers.
        block_size: B, for all layers, or for each module by name.
        pattern: the sparsity pattern; blocks hold whole groups of it.

    Returns:
        B of each layer, by parameter name.

    Raises:
        InputError: a size below 1 or too large, or a module without a size.
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
    """Invert symmetric matrices (k, r, r) by their Cholesky factors.

    Returns:
        The inverses (k, r, r), and whether each matrix was positive definite (k,); the inverse of another
        matrix means nothing.
    """
    factor, info = torch.linalg.cholesky_ex(matrices)
    # a matrix with an infinite entry can have a factor too, and an inverse of 0
    sound = (info == 0) & torch.isfinite(factor.diagonal(dim1=1, dim2=2)).all(1)
    if not bool(sound.all()):  # an unfinished factor may have zeros on its diagonal, which LAPACK refuses
        factor[~sound] = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    return torch.cholesky_inverse(factor), sound


def to_blocks(flat: Tensor, size: int) -> Tensor:
    """Divide (…, d) numbers into blocks (…, n, size); the last block is padded with zeros."""
    blocks = ceil_div(flat.shape[-1], size)
    short = blocks * size - flat.shape[-1]
    padded = torch.nn.functional.pad(flat, (0, short)) if short else flat
    return padded.reshape(*flat.shape[:-1], blocks, size)
