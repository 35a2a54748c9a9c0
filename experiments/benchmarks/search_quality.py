"""Does a searched allocation beat the method's own on test images? Several seeds, with spread.

    python experiments/benchmarks/search_quality.py --model NAME=FOLDER … --train A.parquet --test B.parquet \
        --out search_quality.json

For each model, method and sparsity one elimination is made; each seed then searches by stage and module on
training images that are held out, by their loss (top-1 on a thousand images tells few models apart), begun
with the method's own allocation; what was best there is measured on test. What the file holds already is not
measured again. Prints a table in Markdown; the last line sums up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray import tune

from orchestration.cluster.connect import connect
from orchestration.common.hashing import content_hash
from orchestration.recipe.search import AllocationSearch
from orchestration.search.one_shot_trial import OneShotInputs, OneShotTrial
from orchestration.search.runner import run_search
from orchestration.search.schedulers import stopping
from orchestration.search.space import AllocationSpace
from orchestration.search.spec import Search
from orchestration.state.order_store import StoredOrder
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep.tasks import order_facts
from trainers.checkpoint.folder import load_checkpoint
from trainers.config.data import DataSettings
from trainers.config.jobs import OrderJob
from trainers.config.pruning import PruningSettings
from trainers.data import datasets as data
from trainers.loop.elimination import write_order
from trainers.loop.evaluation import evaluate
from trainers.models import factory as models

PLAN = {"dimap": (0.75, 0.8), "lamp": (0.75, 0.8), "ovit": (0.9, 0.95)}
CLASSES = 10


class Quiet:
    """An observer that does not listen."""

    def trial_started(self, *_: Any) -> None: ...

    def trial_reported(self, *_: Any) -> None: ...

    def trial_ended(self, trial_id: str, record: TrialRecord) -> None:
        print(".", end="", file=sys.stderr, flush=True)


def elimination(args: argparse.Namespace, model: str, method: str, sparsity: float) -> OneShotInputs:
    """What all searches at a sparsity share; the elimination is kept beside the output."""
    pruning = PruningSettings.model_validate(
        {"methods": [method], "sparsity": sparsity, "fisher": {"gradients": args.gradients, "damp": 1e-8}}
    )
    images = DataSettings(train=args.train, test=args.test, holdout=args.holdout)
    root = f"{Path(args.out).absolute().parent}/search_quality"
    order = StoredOrder.of(root, method, pruning, weights=content_hash(model), data="benchmark", seed=0)
    if not order.known:
        job = OrderJob(
            checkpoint=model,
            data=images,
            pruning=pruning,
            method=method,
            seed=0,
            threads=2,
            folder=order.folder,
            fingerprint=order.fingerprint,
        )
        write_order(job, torch.device("cpu"))
    facts = order_facts(model, pruning, method, order, [sparsity])
    search = AllocationSearch(
        trials=args.trials,
        images=args.images,
        first_images=args.images // 4,
        range=args.range,
        objective=args.objective,
    )
    space = AllocationSpace.of(search, pruning, facts.layers, facts.own[sparsity])
    return OneShotInputs(model, images, 0, search, space, order, facts.costs, model)


def searched(inputs: OneShotInputs, seed: int) -> TrialRecord:
    """The best trial of a search with this seed."""
    first, last = inputs.search.first_images or 1, inputs.search.images
    with tempfile.TemporaryDirectory() as folder:
        log = TrialLog(f"{folder}/trials.json", one_shot=True)
        trainable = tune.with_parameters(OneShotTrial, inputs=inputs)
        search = Search(
            name="quality",
            trainable=tune.with_resources(trainable, {"CPU": 1}),
            space=dict(inputs.space.distributions()),
            trials=inputs.search.trials,
            concurrent=2,
            storage=f"{folder}/tune",
            seed=seed,
            first=[inputs.space.own_values()],
            scheduler=partial(stopping, "asha", "images", first, inputs.search.reduction, last),
            reuse_actors=True,
            complete=lambda metrics: bool(metrics["complete"]),
        )
        run_search(search, log, Quiet())
        return log.best()


def on_test(inputs: OneShotInputs, allocation: dict[str, int]) -> float:
    """Top-1 on all test images, in percent."""
    torch.set_num_threads(2)
    model = load_checkpoint(inputs.checkpoint).model.eval()
    order, parameters = inputs.order.open(), dict(model.named_parameters())
    weights, _ = order.weights_at({name: parameters[name].detach() for name in order}, allocation)
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    transform = data.eval_transform(models.data_config(model))
    images = data.split(inputs.data, "test", transform, 0)
    return 100 * evaluate(model, data.eval_loader(images, 128)).top1


def table(results: dict[str, Any], seeds: Sequence[int]) -> list[str]:
    """A row for each model, method and sparsity."""
    lines = ["| model | method | sparsity | own | searched | gain |", "|---|---|---|---|---|---|"]
    for key, entry in results.items():
        values = [entry[str(seed)]["test"] for seed in seeds if str(seed) in entry]
        if not values:
            continue
        mean = statistics.mean(values)
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        name, method, sparsity = key.split(" ")
        level = f"{100 * float(sparsity):g} %"
        gain = f"{mean - entry['own']:+.2f}"
        lines.append(f"| {name} | {method} | {level} | {entry['own']:.2f} | {mean:.2f}{spread} | {gain} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", required=True, help="JSON file; eliminations are kept beside it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(PLAN), default=list(PLAN))
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--objective", choices=("cross_entropy", "top1"), default="cross_entropy")
    parser.add_argument("--holdout", type=float, default=0.04)
    parser.add_argument("--range", type=float, default=0.15)
    parser.add_argument("--gradients", type=int, default=256)
    args = parser.parse_args()
    args.train, args.test = str(Path(args.train).absolute()), str(Path(args.test).absolute())
    out = Path(args.out)
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    with connect(None):
        for named in args.model:
            name, _, folder = named.partition("=")
            for method, sparsity in ((one, level) for one in args.methods for level in PLAN[one]):
                entry = results.setdefault(f"{name} {method} {sparsity}", {})
                missing = [seed for seed in args.seeds if str(seed) not in entry]
                if not missing:
                    continue
                inputs = elimination(args, str(Path(folder).absolute()), method, sparsity)
                if "own" not in entry:
                    entry["own"] = on_test(inputs, dict(inputs.space.own))
                for seed in missing:
                    best = searched(inputs, seed)
                    test = on_test(inputs, best.metrics["allocation"])
                    entry[str(seed)] = {"test": test, "validation": 100 * best.metrics["val_top1"]}
                    print(f" {name} {method} {sparsity} seed {seed}: own {entry['own']:.2f}, {test:.2f}")
                    out.write_text(json.dumps(results, indent=1))
    lines = table(results, args.seeds)
    print("\n".join(lines))
    gains = [float(line.split("|")[-2]) for line in lines[2:]]
    print(f"searched over own on test: {sum(gain > 0 for gain in gains)} of {len(gains)} better")


if __name__ == "__main__":
    main()
