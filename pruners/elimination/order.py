"""Elimination orders: which weight is pruned when, and how that changes the others.

An order is computed once, and gives masks and weights at every allocation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pruners.allocation.sharing import Allocation
from pruners.elimination import kernels
from pruners.elimination.fisher import to_blocks
from pruners.errors import InputError
from pruners.model.masks import MaskSet
from pruners.model.sparsity_pattern import UNSTRUCTURED, Pattern

ORDER, UPDATES = "order.safetensors", "updates.safetensors"
_FORMAT = "espalier-order-2"


@dataclass(frozen=True)
class UpdateSegment:
    """Consecutive steps of the elimination of n Fisher blocks, and how they update the weights that stay.

    Over the steps that are taken, ``w −= Σ y_i·v_i``.

    Attributes:
        block: number of the first of the n blocks in the layer.
        begin: how many weights the blocks had lost before the first step: one number, or (n,).
        columns: v (n, steps, r); in memory the steps lie side by side.
        coefficients: y (n, steps).
        slots: (n, r), the positions in the block that the r numbers of a column belong to.
        end: (n,), how many weights of each block were eliminated when a later elimination took over; steps
            from there on do not count. ``None``: all count.
        ranked: whether the positions that are eliminated last come first.
    """

    block: int
    begin: int | Tensor
    columns: Tensor
    coefficients: Tensor
    slots: Tensor
    end: Tensor | None = None
    ranked: bool = False

    def apply_(self, weights: Tensor, eliminated: Tensor, part: slice) -> None:
        """Update weights in place.

        Args:
            weights: (blocks, B), all Fisher blocks of a layer.
            eliminated: (blocks,), how many weights of each block are eliminated; steps beyond do nothing.
            part: which blocks to update.
        """
        first = max(self.block, part.start)
        last = min(self.block + len(self.columns), part.stop)
        if first >= last:
            return
        own = slice(first - self.block, last - self.block)
        columns, coefficients, slots = self.columns[own], self.coefficients[own], self.slots[own]
        weights, done = weights[first:last], eliminated[first:last]
        _, steps, size = columns.shape
        device = eliminated.device  # the segment itself may be in other memory
        if self.end is not None:
            done = torch.minimum(done, self.end[own].to(device))
        done = done - (self.begin[own].to(device) if isinstance(self.begin, Tensor) else self.begin)
        stay = (size - done).clamp_(0, size)  # of a ranked segment only the first numbers matter
        done = done.clamp_(0, steps)
        most = int(done.max())
        if not most:
            return
        if kernels.supports(eliminated, columns):
            widths = stay if self.ranked else torch.full_like(stay, size)
            arrays = (weights, done, widths, coefficients, columns.mT.contiguous(), slots)
            kernels.apply_steps(*(array.numpy() for array in arrays))
            return
        taken = torch.arange(steps, device=device) < done.unsqueeze(1)
        y = (coefficients.to(device) * taken)[:, :most].unsqueeze(1)
        change = torch.bmm(y, columns[:, :most].to(device)).squeeze(1)
        weights.scatter_add_(1, slots.to(device).long(), change.neg_())


@dataclass(frozen=True)
class LayerOrder:
    """The order in which the weights of a layer are pruned, as far as it has been computed.

    Attributes:
        indices: (k,), k ≤ d, positions in the layer as ``pattern`` flattens it
            (:meth:`pruners.model.sparsity_pattern.Pattern.flat`).
        losses: (k,), ascending.
        zeros: how many weights were zero before; they come first.
        updates: how correlation-aware methods change the weights that stay.
        block_size: B, size of the Fisher blocks that ``updates`` are for.
        pattern: the sparsity pattern of the zeros.
        scores: (k,), what layers are compared by, if not by their losses.
    """

    indices: Tensor
    losses: Tensor
    zeros: int = 0
    updates: tuple[UpdateSegment, ...] = ()
    block_size: int = 1
    pattern: Pattern = UNSTRUCTURED
    scores: Tensor | None = None

    def mask(self, shape: Sequence[int], count: int) -> Tensor:
        """The mask (``True``: kept) of a layer of ``shape`` when ``count`` weights are pruned.

        Raises:
            InputError: the order is not long enough.
        """
        return self.pattern.shaped(self._keep(torch.Size(shape).numel(), count), shape)

    def weight(self, weight: Tensor, count: int) -> Tensor:
        """The weights of the layer when ``count`` of them are pruned (see :meth:`at`)."""
        return self.at(weight, count)[0]

    def at(self, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Weights and mask of the layer when ``count`` weights are pruned.

        Args:
            weight: the weights that the order was computed from, in the layer's shape.
            count: number of pruned weights.

        Returns:
            New weights, exactly zero where they are pruned, and the mask (``True``: kept), both in the
            layer's shape.

        Raises:
            InputError: the order is not long enough.
        """
        keep = self._keep(weight.numel(), count)
        result = self.pattern.flat(weight.detach())
        if self.updates and count > self.zeros:
            before = result
            result = self._updated(result.float(), keep).to(result.dtype)
            # a kept weight must not become zero, though a half-precision type may round it to zero
            result.masked_fill_((result == 0) & keep & (before != 0), torch.finfo(result.dtype).tiny)
            result.masked_fill_(~keep, 0.0)
        else:
            result = result.masked_fill(~keep, 0.0)
        return self.pattern.shaped(result, weight.shape), self.pattern.shaped(keep, weight.shape)

    def _keep(self, numel: int, count: int) -> Tensor:
        """The flat mask (d,) when ``count`` weights are pruned."""
        if count > len(self.indices):
            raise InputError(
                "count", count, f"the order of this layer reaches {len(self.indices)} of {numel} weights"
            )
        keep = torch.ones(numel, dtype=torch.bool, device=self.indices.device)
        keep[self.indices[:count].long()] = False
        return keep

    def _updated(self, flat: Tensor, keep: Tensor) -> Tensor:
        """The flat weights (d,), updated for all weights that are not kept."""
        numel, size = keep.numel(), self.block_size
        eliminated = ~keep
        # weights that were zero before were eliminated without a step
        eliminated[self.indices[: self.zeros].long()] = False
        counts = to_blocks(eliminated, size).sum(1)
        weights = to_blocks(flat, size).clone(memory_format=torch.contiguous_format)

        def work(part: slice) -> None:
            for segment in self.updates:
                segment.apply_(weights, counts, part)

        if kernels.supports(weights):
            kernels.on_threads(work, len(weights))
        else:
            work(slice(0, len(weights)))
        return weights.reshape(-1)[:numel]


class EliminationOrder(dict[str, LayerOrder]):
    """The orders of some layers, by parameter name: prune once, allocate many times.

    >>> before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    >>> order = pruners.prune(model, "ovit", 0.75, batches=loader, block_size=16).order
    >>> allocation = pruners.allocate(order.losses, layers, total=3000, scope="global")
    >>> weights, masks = order.weights_at(before, allocation)
    >>> sum(masks.pruned().values())
    3000
    """

    @property
    def losses(self) -> dict[str, Tensor]:
        """What layers are compared by: for each of them (k,) numbers, ascending along its order."""
        return {name: order.losses if order.scores is None else order.scores for name, order in self.items()}

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        tensors: list[Tensor | None] = []
        for order in self.values():
            tensors += [order.indices, order.losses, order.scores]
            for segment in order.updates:
                tensors += [segment.columns, segment.coefficients, segment.slots]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def weights_at(
        self, weights: Mapping[str, Tensor], allocation: Allocation
    ) -> tuple[dict[str, Tensor], MaskSet]:
        """New weights and masks of the layers of this order, at any allocation.

        Args:
            weights: the weights that the order was computed from, by parameter name.
            allocation: number of pruned weights in each layer.

        Returns:
            The new weights by parameter name, and the masks.

        Raises:
            InputError: the order of a layer is not long enough.
        """
        names = sorted(self, key=lambda name: -weights[name].numel())
        threads = torch.get_num_threads()
        if kernels.supports(*weights.values()) and len(names) > 2 * threads:  # whole layers at once
            names = [name for first in range(threads) for name in names[first::threads]]
            pruned: dict[str, tuple[Tensor, Tensor]] = {}

            def work(part: slice) -> None:
                pruned.update({name: self[name].at(weights[name], allocation[name]) for name in names[part]})

            kernels.on_threads(work, len(names))
        else:
            pruned = {name: self[name].at(weights[name], allocation[name]) for name in names}
        return {name: pruned[name][0] for name in self}, MaskSet({name: pruned[name][1] for name in self})

    def arrays(self, *, updates: bool = True) -> dict[str, Tensor]:
        """All tensors in one flat dictionary, to be stored or sent; :meth:`from_arrays` is the inverse."""
        flat: dict[str, Tensor] = {}
        for name, order in self.items():
            flat[f"{name}/indices"] = order.indices
            flat[f"{name}/losses"] = order.losses
            if order.scores is not None:
                flat[f"{name}/prices"] = order.scores
            described = {"zeros": order.zeros, "size": order.block_size, "pattern": order.pattern.name}
            flat[f"{name}/about"] = torch.frombuffer(
                bytearray(json.dumps(described).encode()), dtype=torch.uint8
            )
            for number, segment in enumerate(order.updates if updates else ()):
                prefix = f"{name}/updates/{number}"
                flat[f"{prefix}/block"] = torch.tensor(segment.block)
                flat[f"{prefix}/begin"] = torch.as_tensor(segment.begin)
                flat[f"{prefix}/ranked"] = torch.tensor(segment.ranked)
                flat[f"{prefix}/columns"] = segment.columns.mT.contiguous()
                flat[f"{prefix}/coefficients"] = segment.coefficients.contiguous()
                flat[f"{prefix}/slots"] = segment.slots.contiguous()
                if segment.end is not None:
                    flat[f"{prefix}/end"] = segment.end
        return flat

    @classmethod
    def from_arrays(cls, flat: Mapping[str, Tensor]) -> EliminationOrder:
        """Read what :meth:`arrays` returned."""
        orders = cls()
        for name in (key.removesuffix("/indices") for key in flat if key.endswith("/indices")):
            about = json.loads(bytes(flat[f"{name}/about"].tolist()))
            segments: list[UpdateSegment] = []
            while f"{name}/updates/{len(segments)}/columns" in flat:
                prefix = f"{name}/updates/{len(segments)}"
                begin = flat[f"{prefix}/begin"]
                segments.append(
                    UpdateSegment(
                        int(flat[f"{prefix}/block"]),
                        begin if begin.ndim else int(begin),
                        flat[f"{prefix}/columns"].mT,
                        flat[f"{prefix}/coefficients"],
                        flat[f"{prefix}/slots"],
                        flat.get(f"{prefix}/end"),
                        bool(flat[f"{prefix}/ranked"]),
                    )
                )
            orders[name] = LayerOrder(
                flat[f"{name}/indices"],
                flat[f"{name}/losses"],
                about["zeros"],
                tuple(segments),
                about["size"],
                Pattern.parse(about["pattern"]),
                flat.get(f"{name}/prices"),
            )
        return orders

    def on(self, device: str) -> EliminationOrder:
        """Copy indices, losses and scores to a device; updates are copied when weights are asked for."""
        moved = EliminationOrder()
        for name, order in self.items():
            scores = None if order.scores is None else order.scores.to(device)
            moved[name] = replace(
                order, indices=order.indices.to(device), losses=order.losses.to(device), scores=scores
            )
        return moved

    def save(self, folder: Path, fingerprint: str) -> None:
        """Write two files: indices and losses (2·d numbers), and the updates of the weights that stay.

        Args:
            folder: is created if it does not exist.
            fingerprint: of what the order was computed from (:func:`fingerprint`); :meth:`load` checks it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        about = {"format": _FORMAT, "fingerprint": fingerprint}
        order = self.arrays(updates=False)
        rest = {key: tensor for key, tensor in self.arrays().items() if key not in order}
        for name, tensors in ((ORDER, order), (UPDATES, rest)):
            save_file({key: t.contiguous().cpu() for key, t in tensors.items()}, folder / name, about)

    @classmethod
    def load(
        cls, folder: Path, fingerprint: str, *, device: str = "cpu", updates: bool = True
    ) -> EliminationOrder:
        """Read the files that :meth:`save` wrote.

        Args:
            folder: where they are.
            fingerprint: what it must have been saved with.
            device: where the tensors go.
            updates: whether to read the updates too; without them the order gives losses and masks only.

        Returns:
            The order.

        Raises:
            InputError: there is no order, it is damaged, or it is of another model, data or settings.
        """
        flat: dict[str, Tensor] = {}
        for name in (ORDER, UPDATES) if updates else (ORDER,):
            path = folder / name
            try:
                with safe_open(path, framework="pt", device=device) as file:
                    about = dict(file.metadata() or {})
                    if about.get("format") == _FORMAT and about.get("fingerprint") == fingerprint:
                        flat |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise InputError("order", str(path), f"must be a readable order ({error})") from None
            if about.get("format") != _FORMAT:
                raise InputError("order", str(path), "must be an elimination order written by espalier")
            if about.get("fingerprint") != fingerprint:
                raise InputError("order", str(path), "belongs to another model, other data or other settings")
        orders = cls.from_arrays(flat)
        if updates:
            return orders
        return cls({name: replace(order, updates=()) for name, order in orders.items()})


def fingerprint(weights: Mapping[str, Tensor], settings: Mapping[str, object]) -> str:
    """A hash of everything that an order depends on: the weights bit for bit, and all settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def merge(parts: Iterable[EliminationOrder]) -> EliminationOrder:
    """Join the orders of several groups of layers."""
    merged = EliminationOrder()
    for part in parts:
        merged.update(part)
    return merged
