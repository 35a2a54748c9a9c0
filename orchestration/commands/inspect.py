"""``espalier inspect``: the prunable layers of a model, their zeros, and its costs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from orchestration.commands.model_source import Patterns, is_architecture, layers_of, load, skeleton
from pruners.allocation.sharing import group_layers
from pruners.model.costs import Costs, cost_model
from pruners.model.layers import PrunableLayer
from pruners.model.left_dense import LeftDense
from pruners.model.sparsity_pattern import Pattern
from trainers.checkpoint.folder import Checkpoint
from trainers.config.structured import format_cut
from trainers.models import factory

PATTERNS = ("2:4", "4:8", "1x4")


@dataclass(frozen=True)
class Description:
    """A model's layers, their zeros by parameter name (empty if no weights were loaded), and its costs."""

    name: str
    method: str | None
    layers: list[PrunableLayer]
    left_out: int
    zeros: dict[str, int] | None
    held: dict[str, bool]
    costs: Costs
    dense: LeftDense
    cut: Mapping[str, Any] | None = None

    @property
    def weights(self) -> int:
        return sum(layer.numel for layer in self.layers)

    def pruned(self, layers: list[PrunableLayer] | None = None) -> int | None:
        """Zeros of some layers, or all."""
        if self.zeros is None:
            return None
        return sum(self.zeros[layer.name] for layer in (self.layers if layers is None else layers))

    def as_json(self) -> dict[str, Any]:
        """The table and the totals."""
        costs = self.costs
        return {
            "model": self.name,
            "method": self.method,
            "layers": [
                {"name": layer.name, "module": layer.module, "stage": layer.stage, "shape": list(layer.shape)}
                | self._figures([layer])
                for layer in self.layers
            ],
            "layers_left_dense": self.left_out,
            "left_dense": self.dense.as_json(),
            "prunable": self._figures(self.layers),
            "whole_model_sparsity": None if self.zeros is None else self.share_of_all,
            "parameters": {"dense": costs.parameters, "non_zero": self._known(costs.parameters_sparse)},
            "macs": {"dense": costs.macs, "sparse": self._known(costs.macs_sparse)},
            "modules": {key: self._figures(group) for key, group in self.by(lambda layer: layer.module)},
            "stages": {key: self._figures(group) for key, group in self.by(lambda layer: layer.stage)},
            "patterns": self.held,
            "structured": self.cut,
        }

    @property
    def share_of_all(self) -> float:
        return (self.pruned() or 0) / max(self.costs.parameters, 1)

    def by(self, key: Callable[[PrunableLayer], Hashable]) -> Iterator[tuple[str, list[PrunableLayer]]]:
        """Layers by module or stage."""
        for name, group in group_layers(self.layers, key).items():
            yield str(name), group

    def table(self) -> Table:
        """A row for each prunable layer."""
        table = Table(title=f"{self.name}: prunable layers", title_justify="left")
        for heading in ("layer", "module"):
            table.add_column(heading, overflow="fold")
        for heading in ("stage", "shape", "weights", "zeros", "sparsity"):
            table.add_column(heading, justify="right", no_wrap=True)
        for layer in self.layers:
            zeros = self.pruned([layer])
            shape = "×".join(map(str, layer.shape))
            counts = f"{layer.numel:,}", "–" if zeros is None else f"{zeros:,}"
            table.add_row(
                layer.name, layer.module, str(layer.stage), shape, *counts, _share(zeros, layer.numel)
            )
        return table

    def lines(self) -> Iterator[tuple[str, str]]:
        """The totals, by their headings."""
        costs, zeros = self.costs, self.pruned()
        more = f" ({self.left_out} more were left dense)" if self.left_out else ""
        yield "prunable", f"{self.weights:,} weights in {len(self.layers)} layers{more}"
        yield "left dense", f"{self.dense} (--layers MODULE=REGEX takes others)"
        if zeros is None:
            yield "parameters", f"{costs.parameters:,}"
            yield "MACs", f"{costs.macs:,}"
            for heading, groups in self._groups():
                yield heading, ", ".join(f"{key}: {_numel(group):,}" for key, group in groups)
            return
        if self.method is not None:
            yield "method", self.method
        if self.cut is not None:
            before = f"of {self.cut['dense_parameters']:,} parameters and {self.cut['dense_macs']:,} MACs"
            yield "structured", f"{format_cut(self.cut['cut'])}, {before}"
        whole = f"{100 * self.share_of_all:.2f} % of the whole model"
        yield "sparsity", f"{_share(zeros, self.weights)} ({zeros:,} zeros), {whole}"
        for heading, groups in self._groups():
            shares = (f"{key}: {_share(self.pruned(group), _numel(group))}" for key, group in groups)
            yield heading, ", ".join(shares)
        held = [name for name, holds in self.held.items() if holds]
        none = f"none of {', '.join(PATTERNS)} in all layers"
        yield "pattern", f"{' and '.join(held)} in all layers" if held else none
        yield "parameters", f"{costs.parameters:,} → {costs.parameters_sparse:,} non-zero"
        yield "MACs", f"{costs.macs:,} → {costs.macs_sparse:,} where zeros cost nothing"

    def _groups(self) -> Iterator[tuple[str, Iterator[tuple[str, list[PrunableLayer]]]]]:
        yield "by module", self.by(lambda layer: layer.module)
        yield "by stage", self.by(lambda layer: layer.stage)

    def _figures(self, layers: list[PrunableLayer]) -> dict[str, Any]:
        zeros, weights = self.pruned(layers), _numel(layers)
        sparsity = None if zeros is None else zeros / max(weights, 1)
        return {"weights": weights, "zeros": zeros, "sparsity": sparsity}

    def _known(self, count: int) -> int | None:
        return None if self.zeros is None else count


def describe(name: str, patterns: Patterns | None = None) -> Description:
    """Describe a checkpoint folder, a model of the hub, or (by shapes alone) a timm architecture.

    Raises:
        InputError: no such model, or one without any layer that is known to be prunable.
    """
    if not name.startswith("hf-hub:") and is_architecture(name):
        model = skeleton(name)
        shapes = layers_of(Checkpoint(model, None), patterns)
        return Description(name, None, shapes, 0, None, {}, _costs(model, {}), LeftDense.of(model, shapes))
    loaded = load(name, patterns)
    prunable = layers_of(loaded, patterns)
    # layers that were left dense on purpose count neither here nor when the model was pruned
    masks = loaded.masks
    layers = [layer for layer in prunable if masks is None or layer.name in masks]
    parameters = dict(loaded.model.named_parameters())
    zeros = {layer.name: parameters[layer.name].detach() == 0 for layer in layers}
    counts = {layer.name: int(zeros[layer.name].sum()) for layer in layers}
    held = {text: any(counts.values()) and _holds(text, layers, zeros) for text in PATTERNS}
    method = loaded.record.get("method")
    left_out = len(prunable) - len(layers)
    cut = loaded.record.get("structured")
    costs, dense = _costs(loaded.model, counts), LeftDense.of(loaded.model, layers)
    return Description(name, method, layers, left_out, counts, held, costs, dense, cut)


def _holds(text: str, layers: list[PrunableLayer], zeros: dict[str, Tensor]) -> bool:
    """Return whether every layer's zeros keep a pattern."""
    pattern = Pattern.parse(text)
    return all(pattern.fits(layer) and _kept(pattern, zeros[layer.name]) for layer in layers)


def _kept(pattern: Pattern, zeros: Tensor) -> bool:
    fallen = pattern.flat(zeros).reshape(-1, pattern.group).sum(1)
    if pattern.whole:
        return bool(((fallen == 0) | (fallen == pattern.group)).all())
    return bool((fallen >= pattern.group - pattern.keep).all())


def _costs(model: nn.Module, zeros: dict[str, int]) -> Costs:
    return cost_model(model, factory.input_size(model)).at(zeros)


def _numel(layers: list[PrunableLayer]) -> int:
    return sum(layer.numel for layer in layers)


def _share(zeros: int | None, weights: int) -> str:
    return "–" if zeros is None else f"{100 * zeros / max(weights, 1):.2f} %"
