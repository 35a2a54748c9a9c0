"""What ``espalier prune`` did: for ``pruning.json``, and in a few lines for the one who ran it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.commands.prune_options import PruneOptions
from pruners.methods.base import Pruner
from pruners.methods.second_order import SecondOrder
from pruners.model.costs import Costs
from pruners.model.layers import PrunableLayer
from pruners.one_shot import PruneReport
from trainers.checkpoint.folder import size_on_disk
from trainers.loop.evaluation import Evaluation

_FISHER = ("gradients", "block_size", "damp", "relative")


@dataclass(frozen=True)
class Outcome:
    """A model as it was pruned; ``tests`` are its figures before and after."""

    options: PruneOptions
    layers: list[PrunableLayer]
    pruner: Pruner
    report: PruneReport
    costs: Costs
    tests: tuple[Evaluation, Evaluation] | None

    def record(self) -> dict[str, Any]:
        """What ``pruning.json`` says besides versions and checksums."""
        options, report = self.options, self.report
        source = options.model
        record = {
            "method": report.method,
            "sparsity": report.sparsity,
            "allocation": report.allocation,
            "costs": self.costs.as_dict(),
            "seed": options.seed,
            "source": Path(source).name if Path(source).expanduser().exists() else source,  # no path of ours
            "options": options.as_record() | self._resolved(),
        }
        if report.damp is not None:
            tried = report.damp.losses.items()
            losses = {f"{damp:g}": loss if math.isfinite(loss) else None for damp, loss in tried}
            record["damp"] = {"chosen": report.damp.damp, "held_out_losses": losses}
        if self.tests is not None:
            before, after = self.tests
            record["figures"] = {"test_top1_before": before.top1, "test_top1": after.top1}
        return record

    def summary(self, target: Path) -> Iterator[tuple[str, str]]:
        """Headings and figures, once the checkpoint is at ``target``."""
        report, costs = self.report, self.costs
        pattern = f", {self.pruner.form.name}" if self.pruner.form.structured else ""
        source = f", {gradients_taken(self.options, self.pruner)}" if self.pruner.gradients else ""
        yield "method", f"{report.method}{pattern}{source}"
        if isinstance(self.pruner, SecondOrder):
            yield "λ", self._damp(self.pruner)
        modules = Counter(layer.module for layer in self.layers)
        by_module = ", ".join(f"{count} {module}" for module, count in modules.items())
        yield "layers", f"{len(self.layers)} ({by_module})"
        weights = sum(layer.numel for layer in self.layers)
        yield "pruned", f"{sum(report.allocation.values()):,} of {weights:,} weights"
        yield "sparsity", f"{100 * report.sparsity:.2f} % ({', '.join(self._shares())})"
        yield "parameters", f"{costs.parameters:,} → {costs.parameters_sparse:,} non-zero"
        yield "MACs", f"{costs.macs:,} → {costs.macs_sparse:,} where zeros cost nothing"
        if self.tests is not None:
            before, after = self.tests
            figures = f"{100 * before.top1:.2f} % → {100 * after.top1:.2f} %"
            yield "top-1", f"{figures} on {after.images:,} images of {self.options.test}"
        yield "written to", f"{self.options.out} ({size_on_disk(target) / 1e6:.2f} MB)"
        yield "load it by", f"timm.create_model({f'local-dir:{target}'!r}, pretrained=True)"

    def _damp(self, pruner: SecondOrder) -> str:
        choice = self.report.damp
        if choice is None:
            return f"{pruner.damp:g}" + (" of the mean of each layer's diagonal" if pruner.relative else "")
        tried = ", ".join(f"{damp:g}: {loss:.4f}" for damp, loss in choice.losses.items())
        return f"{choice.damp:g}, by the lowest held-out loss after one shot ({tried})"

    def _shares(self) -> Iterator[str]:
        weights, pruned = Counter[str](), Counter[str]()
        for layer in self.layers:
            weights[layer.module] += layer.numel
            pruned[layer.module] += self.report.allocation[layer.name]
        for module, count in weights.items():
            yield f"{module} {100 * pruned[module] / count:.2f} %"

    def _resolved(self) -> dict[str, Any]:
        """What the method takes where nothing was said."""
        if not isinstance(self.pruner, SecondOrder):
            return {}
        names = ("gradients", "block_size") if self.options.tries_damps else _FISHER
        return {name: getattr(self.pruner, name) for name in names}


def gradients_taken(options: PruneOptions, pruner: Pruner) -> str:
    """How many, and of what."""
    of = "single images" if options.per_sample else f"{options.batch_size} images each"
    return f"{pruner.gradients:,} gradients of {of}"
