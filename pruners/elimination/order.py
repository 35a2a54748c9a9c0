"""In which order the weights fall, and what falls with them: computed once, read for every allocation."""

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
class Stretch:
    """Some steps of the elimination of some Fisher blocks, and what they do to the weights that stay.

    ``w −= Σ y_i·v_i`` over the steps that have been taken, for blocks ``block`` … ``block + n`` of a layer:
    ``columns`` v (n, steps, r), in memory the steps side by side, ``coefficients`` y (n, steps); ``slots``
    (n, r) are the places in the block that the r numbers belong to, with ``ranked`` those that stay longest
    first. The block had lost ``begin`` weights when the stretch began, and counts no step at or beyond
    ``end`` (n,), where a later elimination took over.
    """

    block: int
    begin: int | Tensor
    columns: Tensor
    coefficients: Tensor
    slots: Tensor
    end: Tensor | None = None
    ranked: bool = False

    def take(self, weights: Tensor, fallen: Tensor, part: slice) -> None:
        """Do to ``part`` of a layer's ``weights`` (n, size) what the steps do when ``fallen`` (n,) fell."""
        first = max(self.block, part.start)
        last = min(self.block + len(self.columns), part.stop)
        if first >= last:
            return
        mine = slice(first - self.block, last - self.block)
        columns, coefficients, slots = self.columns[mine], self.coefficients[mine], self.slots[mine]
        weights, done = weights[first:last], fallen[first:last]
        _, steps, size = columns.shape
        device = fallen.device  # the stretch itself may lie in another memory
        if self.end is not None:
            done = torch.minimum(done, self.end[mine].to(device))
        done = done - (self.begin[mine].to(device) if isinstance(self.begin, Tensor) else self.begin)
        stay = (size - done).clamp_(0, size)  # of a ranked stretch only these matter
        done = done.clamp_(0, steps)
        most = int(done.max())
        if not most:
            return
        if kernels.fit(fallen, columns):
            widths = stay if self.ranked else torch.full_like(stay, size)
            arrays = (weights, done, widths, coefficients, columns.mT.contiguous(), slots)
            kernels.take_steps(*(array.numpy() for array in arrays))
            return
        taken = torch.arange(steps, device=device) < done.unsqueeze(1)
        y = (coefficients.to(device) * taken)[:, :most].unsqueeze(1)
        moved = torch.bmm(y, columns[:, :most].to(device)).squeeze(1)
        weights.scatter_add_(1, slots.to(device).long(), moved.neg_())


@dataclass(frozen=True)
class LayerOrder:
    """One layer's weights in the order in which they fall, as far as it is known.

    ``indices`` (≤ d,) are positions in the layer as ``pattern`` reads it (its :meth:`~Pattern.flat`),
    ``losses`` ascend along them; the first ``zeros`` were zero before. ``prices`` are by what layers are
    compared where that is something else than the losses. ``updates`` is what correlation-aware methods
    change in the weights that stay, in Fisher blocks of ``block_size``.
    """

    indices: Tensor
    losses: Tensor
    zeros: int = 0
    updates: tuple[Stretch, ...] = ()
    block_size: int = 1
    pattern: Pattern = UNSTRUCTURED
    prices: Tensor | None = None

    def mask(self, shape: Sequence[int], count: int) -> Tensor:
        """Kept weights when ``count`` have fallen."""
        return self.pattern.shaped(self._keep(torch.Size(shape).numel(), count), shape)

    def weight(self, weight: Tensor, count: int) -> Tensor:
        """The layer's weights when ``count`` have fallen: exact zeros there, the others updated."""
        return self.at(weight, count)[0]

    def at(self, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Weights and mask when ``count`` have fallen."""
        keep = self._keep(weight.numel(), count)
        result = self.pattern.flat(weight.detach())
        if self.updates and count > self.zeros:
            before = result
            result = self._updated(result.float(), keep).to(result.dtype)
            # what is kept stays a number of its own, though a short type may round it to nothing
            result.masked_fill_((result == 0) & keep & (before != 0), torch.finfo(result.dtype).tiny)
            result.masked_fill_(~keep, 0.0)
        else:
            result = result.masked_fill(~keep, 0.0)
        return self.pattern.shaped(result, weight.shape), self.pattern.shaped(keep, weight.shape)

    def _keep(self, numel: int, count: int) -> Tensor:
        if count > len(self.indices):
            raise InputError(
                "count", count, f"the order of this layer reaches {len(self.indices)} of {numel} weights"
            )
        keep = torch.ones(numel, dtype=torch.bool, device=self.indices.device)
        keep[self.indices[:count].long()] = False
        return keep

    def _updated(self, flat: Tensor, keep: Tensor) -> Tensor:
        """The flat weights (d,) when what is not kept has fallen, as if it had fallen step by step."""
        numel, size = keep.numel(), self.block_size
        fallen = ~keep
        # those that were zero before the elimination fell without a step of it
        fallen[self.indices[: self.zeros].long()] = False
        counts = to_blocks(fallen, size).sum(1)
        weights = to_blocks(flat, size).clone(memory_format=torch.contiguous_format)

        def work(part: slice) -> None:
            for stretch in self.updates:
                stretch.take(weights, counts, part)

        if kernels.fit(weights):
            kernels.on_threads(work, len(weights))
        else:
            work(slice(0, len(weights)))
        return weights.reshape(-1)[:numel]


class EliminationOrder(dict[str, LayerOrder]):
    """The orders of some layers, by parameter name ('prune once, allocate many times')."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """By what layers are compared: ascending, for each weight in the order of falling."""
        return {name: order.losses if order.prices is None else order.prices for name, order in self.items()}

    @property
    def nbytes(self) -> int:
        """What it keeps in memory."""
        kept = [one for order in self.values() for one in (order.indices, order.losses, order.prices)]
        for order in self.values():
            for stretch in order.updates:
                kept += [stretch.columns, stretch.coefficients, stretch.slots]
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def weights_at(
        self, weights: Mapping[str, Tensor], allocation: Allocation
    ) -> tuple[dict[str, Tensor], MaskSet]:
        """New weights and masks of the layers of this order, at any allocation.

        Args:
            weights: the weights that the order was computed from.
            allocation: pruned weights of each layer.
        """
        names = sorted(self, key=lambda name: -weights[name].numel())
        threads = torch.get_num_threads()
        if kernels.fit(*weights.values()) and len(names) > 2 * threads:  # whole layers at once
            names = [name for first in range(threads) for name in names[first::threads]]
            found: dict[str, tuple[Tensor, Tensor]] = {}

            def work(part: slice) -> None:
                found.update({name: self[name].at(weights[name], allocation[name]) for name in names[part]})

            kernels.on_threads(work, len(names))
        else:
            found = {name: self[name].at(weights[name], allocation[name]) for name in names}
        return {name: found[name][0] for name in self}, MaskSet({name: found[name][1] for name in self})

    def arrays(self, *, updates: bool = True) -> dict[str, Tensor]:
        """Flat tensors, to be stored or shared; :meth:`from_arrays` reads them back."""
        flat: dict[str, Tensor] = {}
        for name, order in self.items():
            flat[f"{name}/indices"] = order.indices
            flat[f"{name}/losses"] = order.losses
            if order.prices is not None:
                flat[f"{name}/prices"] = order.prices
            described = {"zeros": order.zeros, "size": order.block_size, "pattern": order.pattern.name}
            flat[f"{name}/about"] = torch.frombuffer(
                bytearray(json.dumps(described).encode()), dtype=torch.uint8
            )
            for number, stretch in enumerate(order.updates if updates else ()):
                place = f"{name}/updates/{number}"
                flat[f"{place}/block"] = torch.tensor(stretch.block)
                flat[f"{place}/begin"] = torch.as_tensor(stretch.begin)
                flat[f"{place}/ranked"] = torch.tensor(stretch.ranked)
                flat[f"{place}/columns"] = stretch.columns.mT.contiguous()
                flat[f"{place}/coefficients"] = stretch.coefficients.contiguous()
                flat[f"{place}/slots"] = stretch.slots.contiguous()
                if stretch.end is not None:
                    flat[f"{place}/end"] = stretch.end
        return flat

    @classmethod
    def from_arrays(cls, flat: Mapping[str, Tensor]) -> EliminationOrder:
        orders = cls()
        for name in (key.removesuffix("/indices") for key in flat if key.endswith("/indices")):
            about = json.loads(bytes(flat[f"{name}/about"].tolist()))
            stretches: list[Stretch] = []
            while f"{name}/updates/{len(stretches)}/columns" in flat:
                place = f"{name}/updates/{len(stretches)}"
                begin = flat[f"{place}/begin"]
                stretches.append(
                    Stretch(
                        int(flat[f"{place}/block"]),
                        begin if begin.ndim else int(begin),
                        flat[f"{place}/columns"].mT,
                        flat[f"{place}/coefficients"],
                        flat[f"{place}/slots"],
                        flat.get(f"{place}/end"),
                        bool(flat[f"{place}/ranked"]),
                    )
                )
            orders[name] = LayerOrder(
                flat[f"{name}/indices"],
                flat[f"{name}/losses"],
                about["zeros"],
                tuple(stretches),
                about["size"],
                Pattern.parse(about["pattern"]),
                flat.get(f"{name}/prices"),
            )
        return orders

    def on(self, device: str) -> EliminationOrder:
        """Order and losses on ``device``; what the weights need stays where it is until it is asked for."""
        moved = EliminationOrder()
        for name, order in self.items():
            prices = None if order.prices is None else order.prices.to(device)
            moved[name] = replace(
                order, indices=order.indices.to(device), losses=order.losses.to(device), prices=prices
            )
        return moved

    def save(self, folder: Path, fingerprint: str) -> None:
        """Write two files: order and losses (2·d numbers), and what the survivors' weights need.

        Args:
            fingerprint: of what it was computed from (:func:`fingerprint`); asked for when it is loaded.
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
        """Read what :meth:`save` wrote; without ``updates`` it gives losses and masks, but no weights.

        Raises:
            InputError: no such order, a broken one, or one of another model, data or settings.
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
    """One line for what an order is computed from: the weights bit for bit, and whatever else decides it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def merge(parts: Iterable[EliminationOrder]) -> EliminationOrder:
    """The orders of several groups of layers as one."""
    merged = EliminationOrder()
    for part in parts:
        merged.update(part)
    return merged
