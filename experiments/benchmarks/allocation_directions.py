"""Is there an allocation better than a method's own? The loss along each direction of an allocation search.

    python experiments/benchmarks/allocation_directions.py --model FOLDER --train A.parquet --out FILE.json
        [--method ovit] [--sparsity 0.95] [--gradients 128] [--by stage module] [--steps 0.002 0.01]
        [--images 5000] [--test B.parquet]

Each stage's and module's sparsity (``--by``, as in a recipe) is moved up and down by a step, and the rest
follows so that the budget is kept, as in a search. The loss is compared with the own allocation's image by
image, on training images that no gradient saw. Through the three points of a direction goes a parabola: its
lowest point says where to move and what that would gain. All these moves together are one allocation, which
is measured on other images: what the search has to win there, beyond its noise. With ``--test`` the own one
and this one are measured there too, once.
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
FURTHEST = 2.0  # steps: the parabola is not trusted beyond
Batches = list[tuple[Tensor, Tensor]]
Allocation = dict[str, int]


class Models:
    """One model that takes any allocation of an order, and its losses on images."""

    def __init__(self, model: nn.Module, order: EliminationOrder) -> None:
        self._model, self._order = model, order
        parameters = dict(model.named_parameters())
        self._dense = {name: parameters[name].detach().clone() for name in order}

    @torch.no_grad()
    def measured(self, allocation: Allocation, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
        """The loss of each image, and whether it is classified correctly."""
        write_weights(self._model, self._order.weights_at(self._dense, allocation)[0])
        losses, hits = [], []
        for images, labels in batches:
            outputs = self._model(images)
            losses.append(functional.cross_entropy(outputs, labels, reduction="none"))
            hits.append(outputs.argmax(1) == labels)
        return torch.cat(losses).double().numpy(), torch.cat(hits).double().numpy()


def difference(values: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """The mean difference image by image, and its standard error."""
    gaps = values - base
    return float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5)


def lowest(down: float, up: float, step: float) -> tuple[float, float]:
    """The move to the lowest point of a parabola through (-step, down), (0, 0), (step, up), and its value."""
    slope, curvature = (up - down) / (2 * step), (up + down) / step**2
    reach = FURTHEST * step
    if curvature > 0:
        move = float(np.clip(-slope / curvature, -reach, reach))
        return move, slope * move + curvature * move**2 / 2
    return min(((-step, down), (0.0, 0.0), (step, up)), key=lambda point: point[1])


def order_of(args: argparse.Namespace, batches: Batches) -> EliminationOrder:
    """The order of the method, kept beside the output with the allocation that is its own."""
    folder = args.out.with_suffix(".order")
    if not folder.exists():
        options = {"damp": 1e-8, "gradients": args.gradients} if args.method in SECOND_ORDER else {}
        model = models.load_timm_folder(Path(args.model)).eval()
        report = prune(model, args.method, args.sparsity, batches=batches, **options)
        args.out.with_suffix(".own.json").write_text(json.dumps(report.allocation))
        report.order.save(folder, "directions")
    return EliminationOrder.load(folder, "directions")


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
    parser.add_argument("--by", nargs="+", default=["stage", "module"])
    parser.add_argument("--steps", type=float, nargs="+", default=[0.002, 0.01])
    parser.add_argument("--images", type=int, default=5000)
    args = parser.parse_args()
    model = models.load_timm_folder(Path(args.model)).eval()
    transform = data.eval_transform(models.data_config(model))
    table = data.images(args.train, transform, key="train")
    rows = np.random.default_rng(0).permutation(len(table)).tolist()
    used = args.gradients * BATCH

    def batches(first: int, count: int) -> Batches:
        return list(DataLoader(Subset(table, rows[first : first + count]), BATCH))

    order = order_of(args, batches(0, used))
    own: Allocation = json.loads(args.out.with_suffix(".own.json").read_text())
    chosen, fresh = batches(used, args.images), batches(used + args.images, args.images)
    every = Models(model, order)
    base, _ = every.measured(own, chosen)
    fresh_base, fresh_hits = every.measured(own, fresh)
    settings = PruningSettings.model_validate({"methods": [args.method], "sparsity": args.sparsity})
    space = AllocationSpace.of(AllocationSearch(by=tuple(args.by)), settings, find_layers(model), own)
    values = space.own_values()
    results: dict[str, Any] = {"own": {"loss": base.mean(), "values": values}}
    print(f"own: loss {base.mean():.4f}, top-1 {100 * fresh_hits.mean():.2f} % on other images", flush=True)
    best: Allocation = own
    for step in args.steps:
        moves, promised = dict.fromkeys(values, 0.0), 0.0
        for key in values:
            sides = [
                difference(
                    every.measured(
                        space.allocation({**values, key: values[key] + side}, order.losses), chosen
                    )[0],
                    base,
                )
                for side in (-step, step)
            ]
            moves[key], gained = lowest(sides[0][0], sides[1][0], step)
            promised += gained
            results.setdefault(f"step {step:g}", {})[key] = {
                "sides": sides,
                "move": moves[key],
                "gain": gained,
            }
            changes = ", ".join(f"{mean:+.4f} ± {error:.4f}" for mean, error in sides)
            print(
                f"  {key} {100 * values[key]:.2f} %, ∓{100 * step:g} points: loss {changes}; lowest at "
                f"{100 * moves[key]:+.2f} points: {gained:+.4f}",
                flush=True,
            )
        moved = space.allocation({key: values[key] + moves[key] for key in values}, order.losses)
        loss, hits = every.measured(moved, fresh)
        gain, top1 = difference(loss, fresh_base), difference(hits, fresh_hits)
        results[f"step {step:g}"]["all"] = {"loss": gain, "top1": top1, "allocation": moved}
        args.out.write_text(json.dumps(results) + "\n")
        print(
            f"step {100 * step:g} points: all moves together promise {promised:+.4f}; on other images loss "
            f"{gain[0]:+.4f} ± {gain[1]:.4f}, top-1 {100 * top1[0]:+.2f} ± {100 * top1[1]:.2f} points",
            flush=True,
        )
        best = moved
    if args.test is not None:
        test = list(data.eval_loader(data.images(args.test, transform, key="test"), 500))
        for name, allocation in (("own", own), ("moved", best)):
            print(f"test, {name}: {100 * every.measured(allocation, test)[1].mean():.2f} %", flush=True)


if __name__ == "__main__":
    main()
