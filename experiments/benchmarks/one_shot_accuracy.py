"""Accuracy after pruning in one shot, without any fine-tuning: every method at every sparsity.

    python experiments/benchmarks/one_shot_accuracy.py --model FOLDER --train A.parquet --test B.parquet

FOLDER is timm's (several: --model again). Each method orders the weights once and is read at every sparsity.
The gradients are of the first training images in order, without augmentation; ``ovit (auto)`` picks λ for
each sparsity by the loss on the training images that follow. Test images only serve for the figures.
Writes ``one_shot.json``, ``one_shot.md`` and ``one_shot.png`` into --out, and takes up what is there already.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn

from pruners import EliminationOrder, MaskSet, Pruner, Sharing, create_pruner, find_layers
from pruners.allocation.projection import budget
from pruners.elimination.damping import LADDER
from pruners.elimination.fisher import BlockFisher
from pruners.elimination.gradients import gradients, summed_loss
from pruners.errors import InputError
from pruners.methods.second_order import SecondOrder
from pruners.order_builder import write_weights
from trainers.data import datasets as data
from trainers.models import factory as models

SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)
METHODS = (
    "ovit",
    "ovit (auto)",
    "woodfisher",
    "lamp",
    "magnitude",
    "dimap+ovit",
    "dimap",
    "magnitude_global",
    "ovit_fast",
)
HELD_OUT = 8  # batches
Batch = tuple[Tensor, Tensor]


@dataclass
class Bench:
    """One model, the images it is pruned by and judged on; gradients are taken once for all methods."""

    model: nn.Module
    training: list[Batch]
    held_out: list[Batch]
    test: list[Batch]
    block_size: int

    def __post_init__(self) -> None:
        self.layers = find_layers(self.model)
        self.masks = MaskSet.dense(self.model, self.layers)
        self.weights = {
            layer.name: self.model.get_parameter(layer.name).detach().clone() for layer in self.layers
        }

    @cached_property
    def fisher(self) -> BlockFisher:
        fisher = BlockFisher(self.layers, block_size=self.block_size)
        loss = nn.functional.cross_entropy
        for gradient in gradients(self.model, self.layers, self.masks, self.training, loss):
            fisher.add_many(gradient)
        fisher.flush()
        return fisher

    def rows(self, method: str, known: Mapping[str, Any]) -> dict[float, dict[str, float]]:
        """Sparsity → test top-1 in percent, and the λ where several were tried.

        Args:
            known: what other methods gave: λ = 1e-8 of ``ovit (auto)`` is ``ovit``.
        """
        pruner = create_pruner(method.removesuffix(" (auto)"))
        try:
            if not method.endswith("(auto)"):
                order = self._order(pruner)
                return {sparsity: {"top1": self._top1_at(order, pruner, sparsity)} for sparsity in SPARSITIES}
            assert isinstance(pruner, SecondOrder), "only second-order methods are damped"
            results: dict[float, dict[str, float]] = {}
            for damp, sparsities in self._damps(pruner).items():
                order = None
                for sparsity in sparsities:
                    same = known.get("ovit", {}).get(str(sparsity)) if damp == pruner.damp else None
                    if same is None:
                        order = order or self._order(replace(pruner, damp=damp))
                    value = self._top1_at(order, pruner, sparsity) if same is None else same["top1"]
                    results[sparsity] = {"top1": value, "damp": damp}
            return dict(sorted(results.items()))
        finally:
            write_weights(self.model, self.weights)

    def _order(self, pruner: Pruner) -> EliminationOrder:
        if not isinstance(pruner, SecondOrder):
            return pruner.order(self.weights, self.layers, self.masks, None)
        self.fisher.damp, self.fisher.relative = pruner.damp, pruner.relative
        return pruner.order(self.weights, self.layers, self.masks, self.fisher)

    def _prune(self, order: EliminationOrder, pruner: Pruner, sparsity: float) -> None:
        total = budget(self.layers, sparsity)
        allocation = Sharing(pruner.scope).allocate(order.losses, self.layers, total)
        weights, kept = order.weights_at(self.weights, allocation)
        assert sum(kept.pruned().values()) == total, "the count is exact"
        write_weights(self.model, weights)

    def _top1_at(self, order: EliminationOrder | None, pruner: Pruner, sparsity: float) -> float:
        assert order is not None, "an order is made before it is read"
        self._prune(order, pruner, sparsity)
        return top1(self.model, self.test)

    def _damps(self, pruner: SecondOrder) -> dict[float, list[float]]:
        """λ → the sparsities at which it has the least held-out loss."""
        losses: dict[float, dict[float, float]] = {sparsity: {} for sparsity in SPARSITIES}
        for damp in LADDER:
            try:
                order = self._order(replace(pruner, damp=damp))
            except InputError as error:
                print(f"    {damp:g}: {error}", flush=True)
                continue
            for sparsity in SPARSITIES:
                self._prune(order, pruner, sparsity)
                value, images = summed_loss(self.model, self.held_out, nn.functional.cross_entropy)
                losses[sparsity][damp] = value / images
        chosen: dict[float, list[float]] = {}
        for sparsity, tried in losses.items():
            print(f"    {sparsity}: " + ", ".join(f"{d:g} {v:.4f}" for d, v in tried.items()), flush=True)
            chosen.setdefault(min(tried, key=lambda d: (tried[d], -d)), []).append(sparsity)
        return chosen


@torch.no_grad()
def top1(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Percent of images whose label comes first."""
    model.eval()
    hits = images = 0
    for inputs, labels in batches:
        hits += int((model(inputs).argmax(1) == labels).sum())
        images += len(labels)
    return 100 * hits / images


def batches(uri: str, transform: Any, size: int) -> Iterator[Batch]:
    """The images of a table in order, decoded once."""
    yield from data.eval_loader(data.images(uri, transform, key="data"), size)


def open_bench(folder: str, args: argparse.Namespace) -> Bench:
    model = models.load_timm_folder(Path(folder))
    transform = data.eval_transform(models.data_config(model))
    training = list(
        itertools.islice(batches(args.train, transform, args.batch_size), args.gradients + HELD_OUT)
    )
    return Bench(
        model,
        training[: args.gradients],
        training[args.gradients :],
        list(batches(args.test, transform, 64)),
        args.block_size,
    )


def table(name: str, content: dict[str, Any]) -> str:
    """Markdown, methods by their top-1 at 75 %."""
    head = " | ".join(f"{100 * sparsity:g} %" for sparsity in SPARSITIES)
    lines = [f"`{name}`, dense {content['dense']:.2f} %", "", f"| method | {head} |", "|---" * 8 + "|"]
    rows = sorted(content["methods"].items(), key=lambda row: -row[1]["0.75"]["top1"])
    for method, by_sparsity in rows:
        cells = " | ".join(f"{by_sparsity[str(sparsity)]['top1']:.2f}" for sparsity in SPARSITIES)
        lines.append(f"| {method} | {cells} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6.5 * len(results), 4.5), squeeze=False)
    for axis, (name, content) in zip(axes[0], results.items(), strict=True):
        for method in (one for one in METHODS if one in content["methods"]):
            by_sparsity = content["methods"][method]
            values = [by_sparsity[str(sparsity)]["top1"] for sparsity in SPARSITIES]
            axis.plot([100 * s for s in SPARSITIES], values, marker="o", markersize=3, label=method)
        axis.axhline(content["dense"], color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=name, xlabel="sparsity of the prunable weights (%)", ylabel="test top-1 (%)")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, help="timm folder")
    parser.add_argument("--train", required=True, help="Parquet (image, label)")
    parser.add_argument("--test", required=True)
    parser.add_argument("--gradients", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=192)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--out", type=Path, default=Path("experiments/benchmarks"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "one_shot.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for folder in args.model:
        name = Path(folder).name
        bench = open_bench(folder, args)
        content = results.setdefault(name, {"methods": {}})
        if "dense" not in content:
            content["dense"] = top1(bench.model, bench.test)
            print(f"{name}: dense {content['dense']:.2f} %", flush=True)
        for method in args.methods:
            if method in content["methods"]:
                continue
            started = time.perf_counter()
            rows = bench.rows(method, content["methods"])
            content["methods"][method] = {str(sparsity): found for sparsity, found in rows.items()}
            shown = " ".join(f"{found['top1']:.2f}" for found in rows.values())
            print(f"{name} {method:<18}{shown}   ({time.perf_counter() - started:.0f} s)", flush=True)
            path.write_text(json.dumps(results, indent=1))
    tables = "\n\n".join(table(name, content) for name, content in results.items())
    (args.out / "one_shot.md").write_text(tables + "\n")
    plot(results, args.out / "one_shot.png")
    print(tables)


if __name__ == "__main__":
    main()
