"""Is there an allocation better than a method's own? Random neighbours of it, on many images.

    python experiments/benchmarks/allocation_neighbours.py --model FOLDER --train A.parquet --out FILE.json
        [--method ovit] [--sparsity 0.95] [--gradients 128] [--trials 40] [--ranges 0.15 0.03]
        [--test B.parquet]

Neighbours are drawn as an allocation search draws them: each stage's and module's sparsity within a range of
the method's own, projected onto the budget. Each is evaluated on three sets of training images that no
gradient saw: as many as a search sees (``--images``), and two larger ones. Printed are the rank correlation
between the search's loss and the larger set's, the standard error of a difference to the own allocation on
both, how many neighbours are better than it on the larger set, and what the best of them gains on the third
set, which chose nothing. With ``--test`` the own allocation and that best one are measured there too, once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from orchestration.recipe.search import AllocationSearch
from orchestration.search.space import AllocationSpace
from pruners import EliminationOrder, prune
from pruners.methods.registry import SECOND_ORDER
from pruners.model.layers import find_layers
from pruners.order_builder import write_weights
from trainers.config.pruning import PruningSettings
from trainers.data import datasets as data
from trainers.models import factory as models

BATCH = 128
LARGE = 10_000
Batches = list[tuple[Tensor, Tensor]]
Figures = dict[str, np.ndarray]


class Models:
    """One model that takes any allocation of an order, and its losses on images.

    Args:
        model: the dense model.
        order: of its weights.
    """

    def __init__(self, model: nn.Module, order: EliminationOrder) -> None:
        self._model, self._order = model, order
        parameters = dict(model.named_parameters())
        self._dense = {name: parameters[name].detach().clone() for name in order}

    @torch.no_grad()
    def measured(self, allocation: dict[str, int] | None, sets: dict[str, Batches]) -> dict[str, Figures]:
        """Of each set the loss of each image, and whether it is classified correctly."""
        weights = self._dense
        if allocation is not None:
            weights, _ = self._order.weights_at(self._dense, allocation)
        write_weights(self._model, weights)
        return {part: self._figures(batches) for part, batches in sets.items()}

    def _figures(self, batches: Batches) -> Figures:
        losses, hits = [], []
        for images, labels in batches:
            outputs = self._model(images)
            losses.append(functional.cross_entropy(outputs, labels, reduction="none"))
            hits.append(outputs.argmax(1) == labels)
        return {"loss": torch.cat(losses).double().numpy(), "hit": torch.cat(hits).double().numpy()}


def ranks(values: list[float]) -> np.ndarray:
    """The place of each value among all."""
    return np.argsort(np.argsort(values))


def summary(rows: list[dict[str, Any]]) -> str:
    """What the neighbours within a range show; the first row is the own allocation."""
    own, *others = rows
    small, large = ([row[part]["loss"] for row in others] for part in ("search", "large"))
    correlation = float(np.corrcoef(ranks(small), ranks(large))[0, 1])
    better = sum(loss < own["large"]["loss"] for loss in large)
    best = others[int(np.argmin(large))]
    chosen = min(rows, key=lambda row: float(row["search"]["loss"]))
    gains = {part: 100 * (best[part]["top1"] - own[part]["top1"]) for part in ("large", "fresh")}
    error = 100 * best["fresh"]["top1_error"]
    return (
        f"rank correlation {correlation:.2f}; a loss differs from the own one's by "
        f"{np.mean([row['search']['loss_error'] for row in others]):.4f} of standard error on the search's "
        f"images, {np.mean([row['large']['loss_error'] for row in others]):.4f} on {LARGE:,}; "
        f"{better} of {len(others)} better than the own ({own['large']['loss']:.4f}), the best "
        f"{min(large):.4f}: {gains['large']:+.2f} points of top-1, on fresh images {gains['fresh']:+.2f} ± "
        f"{error:.2f}; "
        f"what the search would take: {100 * (chosen['fresh']['top1'] - own['fresh']['top1']):+.2f}"
    )


def order_of(args: argparse.Namespace, batches: Batches) -> EliminationOrder:
    """The order of the method, kept beside the output with the allocation that is its own."""
    folder = args.out.with_suffix(".order")
    if not folder.exists():
        options = {"damp": 1e-8, "gradients": args.gradients} if args.method in SECOND_ORDER else {}
        model = models.load_timm_folder(Path(args.model)).eval()
        report = prune(model, args.method, args.sparsity, batches=batches, **options)
        args.out.with_suffix(".own.json").write_text(json.dumps(report.allocation))
        report.order.save(folder, "neighbours")
    return EliminationOrder.load(folder, "neighbours")


def compared(measured: Figures, base: Figures) -> dict[str, float]:
    """Figures of a set of images, and standard errors of the differences from the own allocation."""
    errors = {key: (measured[key] - base[key]).std() / len(base[key]) ** 0.5 for key in base}
    return {
        "loss": float(measured["loss"].mean()),
        "top1": float(measured["hit"].mean()),
        "loss_error": float(errors["loss"]),
        "top1_error": float(errors["hit"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="timm folder")
    parser.add_argument("--train", required=True, help="Parquet (image, label)")
    parser.add_argument("--test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="ovit")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--gradients", type=int, default=128)
    parser.add_argument("--images", type=int, default=1000, help="of a search")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--ranges", type=float, nargs="+", default=[0.15, 0.03])
    args = parser.parse_args()
    model = models.load_timm_folder(Path(args.model)).eval()
    transform = data.eval_transform(models.data_config(model))
    table = data.images(args.train, transform, key="train")
    rows = np.random.default_rng(0).permutation(len(table)).tolist()
    used = args.gradients * BATCH

    def batches(first: int, count: int) -> Batches:
        return list(DataLoader(Subset(table, rows[first : first + count]), BATCH))

    order = order_of(args, batches(0, used))
    own: dict[str, int] = json.loads(args.out.with_suffix(".own.json").read_text())
    sets = {
        "search": batches(used, args.images),
        "large": batches(used + args.images, LARGE),
        "fresh": batches(used + args.images + LARGE, LARGE),
    }
    every = Models(model, order)
    bases = every.measured(own, sets)

    def figures(allocation: dict[str, int] | None) -> dict[str, Any]:
        return {
            part: compared(figures, bases[part]) for part, figures in every.measured(allocation, sets).items()
        }

    settings = PruningSettings.model_validate({"methods": [args.method], "sparsity": args.sparsity})
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    results.setdefault("dense", figures(None))
    results.setdefault("own", figures(own))
    for width in args.ranges:
        space = AllocationSpace.of(AllocationSearch(range=width), settings, find_layers(model), own)
        known = results.setdefault(f"range {width:g}", [])
        generator = np.random.default_rng(1)
        for number in range(args.trials):
            domains = space.distributions().items()
            values = {key: float(generator.uniform(domain.low, domain.high)) for key, domain in domains}
            if number < len(known):
                continue
            allocation = space.allocation(values, order.losses)
            known.append(figures(allocation) | {"allocation": allocation})
            args.out.write_text(json.dumps(results) + "\n")
        print(f"within {width:g}: {summary([results['own'], *known])}", flush=True)
    if args.test is not None:
        test = list(data.eval_loader(data.images(args.test, transform, key="test"), 500))
        neighbours = [row for width in args.ranges for row in results[f"range {width:g}"]]
        best = min(neighbours, key=lambda row: float(row["large"]["loss"]))
        for name, allocation in (("own", own), ("best neighbour", best["allocation"])):
            hits = every.measured(allocation, {"test": test})["test"]["hit"]
            print(f"test, {name}: {100 * hits.mean():.2f} %", flush=True)


if __name__ == "__main__":
    main()
