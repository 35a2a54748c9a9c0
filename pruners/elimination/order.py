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
from pruners.elimination.updates import UpdateSegment
from pruners.errors import InputError
from pruners.model.masks import MaskSet
from pruners.model.sparsity_pattern import UNSTRUCTURED, Pattern

ORDER, UPDATES = "order.safetensors", "updates.safetensors"
_FORMAT = "espalier-order-3"
_READ = {_FORMAT, "espalier-order-2"}  # the updates of which are in float32


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
        scores: (k,), the numbers by which layers are compared, if not by their losses.
        start: (d,), the weights after the first ``least`` are pruned, in float32, if ``updates`` begin there.
        least: the smallest number of pruned weights for which the order can give weights.
    """

    indices: Tensor
    losses: Tensor
    zeros: int = 0
    updates: tuple[UpdateSegment, ...] = ()
    block_size: int = 1
    pattern: Pattern = UNSTRUCTURED
    scores: Tensor | None = None
    start: Tensor | None = None
    least: int = 0

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
            InputError: the order is not long enough, or begins later.
        """
        keep = self._keep(weight.numel(), count)
        result = self.pattern.flat(weight.detach())
        if self.start is not None and count < self.least:
            raise InputError(
                "count", count, f"the order of this layer begins at {self.least} of {keep.numel()} weights"
            )
        if (self.updates or self.start is not None) and count > self.zeros:
            before = result
            start = result.float() if self.start is None else self.start.to(result.device)
            result = self._updated(start, keep).to(result.dtype)
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

    def beyond(self, weight: Tensor, count: int) -> LayerOrder:
        """The order without the parts that only masks of fewer than ``count`` pruned weights need.

        Args:
            weight: the weights that the order was computed from, in the layer's shape.
            count: the smallest number of pruned weights that will be asked for.

        Returns:
            The order, which takes less memory.
        """
        count = min(count, len(self.indices))
        if not self.updates or count <= max(self.zeros, self.least):
            return self
        keep = self._keep(weight.numel(), count)
        flat = self.pattern.flat(weight.detach()).float() if self.start is None else self.start
        start, eliminated = self._updated(flat, keep), self._eliminated(keep)
        later = tuple(segment.beyond(eliminated) for segment in self.updates)
        return replace(self, updates=tuple(one for one in later if one is not None), start=start, least=count)

    def _eliminated(self, keep: Tensor) -> Tensor:
        """Number of weights of each Fisher block that steps have eliminated, given the kept weights."""
        eliminated = ~keep
        # weights that were zero before were eliminated without a step
        eliminated[self.indices[: self.zeros].long()] = False
        return to_blocks(eliminated, self.block_size).sum(1)

    def _updated(self, flat: Tensor, keep: Tensor) -> Tensor:
        """The flat weights (d,), updated for all weights that are not kept."""
        numel, size = keep.numel(), self.block_size
        counts = self._eliminated(keep)
        weights = to_blocks(flat, size).clone(memory_format=torch.contiguous_format)

        def work(part: slice) -> None:
            for segment in self.updates:
                segment.apply_(weights, counts, part)

        if kernels.threads.supports(weights):
            kernels.threads.on_threads(work, len(weights))
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
        """The numbers by which layers are compared: (k,) for each layer, ascending along its order."""
        return {name: order.losses if order.scores is None else order.scores for name, order in self.items()}

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        tensors: list[Tensor | None] = []
        for order in self.values():
            tensors += [order.indices, order.losses, order.scores, order.start]
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
        if kernels.threads.supports(*weights.values()) and len(names) > 2 * threads:  # whole layers at once
            names = [name for first in range(threads) for name in names[first::threads]]
            pruned: dict[str, tuple[Tensor, Tensor]] = {}

            def work(part: slice) -> None:
                pruned.update({name: self[name].at(weights[name], allocation[name]) for name in names[part]})

            kernels.threads.on_threads(work, len(names))
        else:
            pruned = {name: self[name].at(weights[name], allocation[name]) for name in names}
        return {name: pruned[name][0] for name in self}, MaskSet({name: pruned[name][1] for name in self})

    def beyond(self, weights: Mapping[str, Tensor], counts: Mapping[str, int]) -> EliminationOrder:
        """The orders without the parts for smaller numbers of pruned weights (:meth:`LayerOrder.beyond`)."""
        return EliminationOrder(
            {name: order.beyond(weights[name], counts[name]) for name, order in self.items()}
        )

    def arrays(self, *, updates: bool = True) -> dict[str, Tensor]:
        """All tensors in one flat dictionary, to be stored or sent; :meth:`from_arrays` is the inverse."""
        flat: dict[str, Tensor] = {}
        for name, order in self.items():
            flat[f"{name}/indices"] = order.indices
            flat[f"{name}/losses"] = order.losses
            if order.scores is not None:
                flat[f"{name}/prices"] = order.scores
            described = {"zeros": order.zeros, "size": order.block_size, "pattern": order.pattern.name}
            if order.start is not None:
                described["least"] = order.least
                if updates:
                    flat[f"{name}/start"] = order.start
            flat[f"{name}/about"] = torch.frombuffer(
                bytearray(json.dumps(described).encode()), dtype=torch.uint8
            )
            for number, segment in enumerate(order.updates if updates else ()):
                prefix = f"{name}/updates/{number}"
                flat[f"{prefix}/block"] = torch.tensor(segment.block)
                flat[f"{prefix}/begin"] = torch.as_tensor(segment.begin)
                flat[f"{prefix}/panel"] = torch.tensor(segment.panel)
                flat[f"{prefix}/columns"] = segment.columns
                flat[f"{prefix}/coefficients"] = segment.coefficients
                flat[f"{prefix}/slots"] = segment.slots
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
                begin, columns = flat[f"{prefix}/begin"], flat[f"{prefix}/columns"]
                if columns.ndim == 2:
                    panel = int(flat[f"{prefix}/panel"])
                else:  # of an earlier version, (n, r, steps) with a segment for each panel
                    panel = columns.shape[2] if bool(flat[f"{prefix}/ranked"]) else 0
                    columns = columns.mT.flatten(1)
                segments.append(
                    UpdateSegment(
                        int(flat[f"{prefix}/block"]),
                        begin if begin.ndim else int(begin),
                        columns,
                        flat[f"{prefix}/coefficients"],
                        flat[f"{prefix}/slots"],
                        flat.get(f"{prefix}/end"),
                        panel,
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
                flat.get(f"{name}/start"),
                about.get("least", 0),
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

    def save(self, folder: Path, fingerprint: str, *, rounded: bool = True) -> None:
        """Write two files: indices and losses (2·d numbers), and the updates of the weights that stay.


        Args:
            folder: is created if it does not exist.
            fingerprint: of what the order was computed from (:func:`fingerprint`); :meth:`load` checks it.
            rounded: whether the updates are rounded to 16 bits
                (:meth:`pruners.elimination.updates.UpdateSegment.rounded`).
        """
        folder.mkdir(parents=True, exist_ok=True)
        about = {"format": _FORMAT, "fingerprint": fingerprint}
        order = self.arrays(updates=False)
        rest = {
            key: tensor
            for key, tensor in (self._rounded() if rounded else self).arrays().items()
            if key not in order
        }
        for name, tensors in ((ORDER, order), (UPDATES, rest)):
            save_file({key: t.contiguous().cpu() for key, t in tensors.items()}, folder / name, about)

    def _rounded(self) -> EliminationOrder:
        return EliminationOrder(
            {
                name: replace(order, updates=tuple(segment.rounded() for segment in order.updates))
                for name, order in self.items()
            }
        )

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
                    if about.get("format") in _READ and about.get("fingerprint") == fingerprint:
                        flat |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise InputError("order", str(path), f"must be a readable order ({error})") from None
            if about.get("format") not in _READ:
                raise InputError("order", str(path), "must be an elimination order written by espalier")
            if about.get("fingerprint") != fingerprint:
                raise InputError("order", str(path), "belongs to another model, other data or other settings")
        orders = cls.from_arrays(flat)
        if updates:
            return orders
        return cls({name: replace(order, updates=(), start=None) for name, order in orders.items()})


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
