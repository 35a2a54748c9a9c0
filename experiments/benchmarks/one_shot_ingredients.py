"""What rounds and reconstruction add to pruning in one shot, without any training.

    python experiments/benchmarks/one_shot_ingredients.py --model FOLDER --train A.parquet --test B.parquet
        [--methods ovit lamp dimap magnitude] [--gradients 256] [--images 1024] [--out FILE]

Each method prunes at once, in rounds (those of ROUNDS; the same gradients in all), with reconstruction after
it, and with both; methods that look at weights alone have no rounds of their own. The gradients are of the
first training images in order, without augmentation; test images only serve for the figures. Seconds are
those of processors, of the whole pruning. The last line sums up; the exit status is 1 when a stated top-1 or
the stated cost is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruners import prune
from pruners.methods.registry import SECOND_ORDER
from trainers.data import datasets as data
from trainers.models import factory as models

Batch = tuple[Tensor, Tensor]

SPARSITIES = {"ovit": (0.9, 0.95), "lamp": (0.75, 0.9), "dimap": (0.75, 0.9), "magnitude": (0.75, 0.9)}
WAYS = ("at once", "rounds", "reconstruct", "both")
# sparsity: those of its rounds, chosen on training images that no gradient saw
ROUNDS = {0.9: [0.5, 0.7, 0.82, 0.9], 0.95: [0.75, 0.9, 0.95]}
MOST_COST = 1.3  # of the same gradients at once
# (model, method, sparsity): least test top-1 in percent with all ingredients
LEAST = {
    ("vit_cifar10", "ovit", 0.9): 69.0,
    ("vit_cifar10", "ovit", 0.95): 67.8,
    ("swin_cifar10", "ovit", 0.9): 69.5,
    ("swin_cifar10", "ovit", 0.95): 66.0,
    ("vit_cifar10", "lamp", 0.75): 66.0,
    ("vit_cifar10", "dimap", 0.75): 65.0,
    ("vit_cifar10", "magnitude", 0.75): 65.0,
}


@torch.no_grad()
def top1(model: nn.Module, batches: list[Batch]) -> float:
    """Percent of images whose label comes first."""
    model.eval()
    hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * hits / sum(len(labels) for _, labels in batches)


def ingredients(method: str, sparsity: float, images: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of the ways to prune, and the options of each."""
    yield "at once", {}
    if method in SECOND_ORDER:
        yield "rounds", {"rounds": ROUNDS[sparsity]}
    yield "reconstruct", {"reconstruct": images}
    if method in SECOND_ORDER:
        yield "both", {"rounds": ROUNDS[sparsity], "reconstruct": images}


def misses(key: tuple[str, str, float], row: dict[str, dict[str, float]]) -> Iterator[str]:
    """What falls short of the stated figures, or was not measured."""
    _, method, sparsity = key
    what = f"{method} {100 * sparsity:g} %"
    best = row.get("both" if method in SECOND_ORDER else "reconstruct")
    least = LEAST.get(key, 0.0)
    if best is None or best["top1"] < least:
        yield f"{what}: {'not measured' if best is None else format(best['top1'], '.2f')} of {least} %"
    if method in SECOND_ORDER and best is not None:
        if "at once" not in row:
            yield f"{what}: cost of at once not measured"
        elif (cost := best["seconds"] / row["at once"]["seconds"]) > MOST_COST:
            yield f"{what}: {cost:.2f} times the cost of at once"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="timm folder")
    parser.add_argument("--train", required=True, help="Parquet (image, label)")
    parser.add_argument("--test", required=True)
    parser.add_argument("--methods", nargs="+", default=list(SPARSITIES), choices=SPARSITIES)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--gradients", type=int, default=256)
    parser.add_argument("--images", type=int, default=1024, help="of a reconstruction")
    parser.add_argument("--out", type=Path, default=Path("experiments/benchmarks/ingredients.json"))
    args = parser.parse_args()
    name = Path(args.model).name
    dense = models.load_timm_folder(Path(args.model)).eval()
    transform = data.eval_transform(models.data_config(dense))

    def batches(uri: str, size: int) -> Iterator[Batch]:
        yield from data.eval_loader(data.images(uri, transform, key="data"), size)

    training = list(itertools.islice(batches(args.train, 128), args.gradients))
    test = list(batches(args.test, 500))
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    model_results = results.setdefault(name, {"dense": top1(dense, test)})
    print(f"{name}: dense {model_results['dense']:.2f} %", flush=True)
    missed = []
    for method in args.methods:
        for sparsity in SPARSITIES[method]:
            row = model_results.setdefault(method, {}).setdefault(f"{sparsity:g}", {})
            for way, options in ingredients(method, sparsity, args.images):
                if way not in row and way not in args.ways:
                    continue
                if way not in row:
                    model = models.load_timm_folder(Path(args.model)).eval()
                    limit = {"gradients": args.gradients} if method in SECOND_ORDER else {}
                    began = time.process_time()
                    prune(model, method, sparsity, batches=training, **limit, **options)
                    row[way] = {"seconds": time.process_time() - began, "top1": top1(model, test)}
                    args.out.write_text(json.dumps(results, indent=1) + "\n")
                print(
                    f"{method:<10}{100 * sparsity:g} %  {way:<12}{row[way]['top1']:6.2f} %"
                    f"{row[way]['seconds']:7.0f} s",
                    flush=True,
                )
            missed += misses((name, method, sparsity), row)
    print("missed: " + "; ".join(missed) if missed else "all stated figures are met")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
