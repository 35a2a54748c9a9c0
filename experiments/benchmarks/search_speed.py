"""How fast a search is: cheap trials against pruning anew, the loop itself, more actors, a dear trial.

    python experiments/benchmarks/search_speed.py --model FOLDER --train A.parquet [--parts trial loop …]

``trial``: an elimination anew with its evaluation, against a trial that reads the stored one; and a trial
against its evaluation alone. ``loop``: trials that do nothing, a second, and how the time of one grows with
their number. ``actors``: trials of half a second each on 1, 2 and 4 nodes of a processor each, simulated
on this machine. ``train``: a Tune trial around a Ray Train run of one step, from the end of the one before to
its own. The last line sums up; the exit status is 1 when a stated ratio is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import ray
import torch
from ray import tune

from orchestration.cluster.connect import connect
from orchestration.recipe.schema import Resources
from orchestration.recipe.search import AllocationSearch
from orchestration.search.one_shot_trial import OneShotInputs, OneShotTrial
from orchestration.search.runner import run_search
from orchestration.search.space import AllocationSpace
from orchestration.search.spec import Search
from orchestration.search.training_trial import TrainingTrial
from orchestration.state.order_store import StoredOrder
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep.tasks import order_facts
from trainers.config.data import DataSettings
from trainers.config.jobs import OrderJob, TrainJob
from trainers.config.pruning import PruningSettings
from trainers.loop.elimination import write_order
from trainers.loop.evaluation import evaluate

AT_LEAST = {"anew": 50.0, "loop": 5.0}
AT_MOST = {"trial": 1.3, "growth": 2.0, "memory": 1.5, "start": 7.0, "again": 7.0}
SPARSITY, IMAGES = 0.75, 1000


class Idle(tune.Trainable):  # type: ignore[misc]
    """A trial that waits, and says that all is well."""

    def setup(self, config: dict[str, float], seconds: float = 0.0) -> None:
        self._config, self._seconds = config, seconds

    def reset_config(self, new_config: dict[str, float]) -> bool:
        self._config = new_config
        return True

    def step(self) -> dict[str, Any]:
        time.sleep(self._seconds)
        score = -sum(value * value for value in self._config.values())
        return {"score": score, "val_top1": 0.5, "sparsity": 0.5, "complete": True, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


class Clock:
    """An observer that notes when trials end."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.bytes: list[int] = []  # of this process, resident

    def trial_started(self, *_: Any) -> None: ...

    def trial_reported(self, *_: Any) -> None: ...

    def trial_ended(self, trial_id: str, record: TrialRecord) -> None:
        self.ends.append(time.perf_counter())
        self.bytes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)


def stored(args: argparse.Namespace, folder: str) -> tuple[OneShotInputs, float]:
    """An order of the model, what trials need to read it, and the seconds that the order took."""
    pruning = PruningSettings.model_validate(
        {"sparsity": SPARSITY, "fisher": {"gradients": args.gradients, "damp": 1e-8}}
    )
    data = DataSettings(train=args.train, holdout=0.04)
    order = StoredOrder(f"{folder}/order", "benchmark")
    job = OrderJob(
        checkpoint=args.model,
        data=data,
        pruning=pruning,
        method="ovit",
        threads=args.threads,
        folder=order.folder,
        fingerprint=order.fingerprint,
    )
    began = time.perf_counter()
    write_order(job, torch.device("cpu"))
    seconds = time.perf_counter() - began
    facts = order_facts(args.model, pruning, "ovit", order, [SPARSITY])
    search = AllocationSearch(images=IMAGES, cpus_per_trial=args.threads)
    space = AllocationSpace.of(search, pruning, facts.layers, facts.own[SPARSITY])
    return OneShotInputs(args.model, data, 0, search, space, order, facts.costs, args.model), seconds


def trials(args: argparse.Namespace) -> dict[str, float]:
    """``anew``: pruning anew over a trial; ``trial``: a trial over its evaluation alone."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, order_seconds = stored(args, folder)
        trial = OneShotTrial.__new__(OneShotTrial)  # as Tune makes one, without a cluster
        trial.setup({}, inputs)
        sampler = optuna.samplers.RandomSampler(seed=0)
        study = optuna.create_study(sampler=sampler)
        whole, alone = [], []
        for _ in range(args.rounds + 1):
            trial.reset_config(study.ask(dict(inputs.space.distributions())).params)
            began = time.perf_counter()
            trial.step()
            between = time.perf_counter()
            evaluate(trial._model, trial._parts[0])
            whole.append(between - began)
            alone.append(time.perf_counter() - between)
    # the first of each touches memory that the others find ready
    trial_seconds, evaluation = statistics.median(whole[1:]), statistics.median(alone[1:])
    print(
        f"order of {args.gradients} gradients {order_seconds:.1f} s; trial {trial_seconds:.3f} s, its "
        f"evaluation of {IMAGES:,} images {evaluation:.3f} s ({args.threads} threads)",
        flush=True,
    )
    return {"anew": (order_seconds + evaluation) / trial_seconds, "trial": trial_seconds / evaluation}


def run_idle(folder: str, count: int, concurrent: int, seconds: float, sampler: str = "tpe") -> Clock:
    """So many trials, and when they ended."""
    clock = Clock()
    space = {f"x{n}": optuna.distributions.FloatDistribution(0.0, 1.0) for n in range(6)}
    search = Search(
        name=f"idle-{count}-{concurrent}",
        trainable=tune.with_resources(tune.with_parameters(Idle, seconds=seconds), {"CPU": 1}),
        space=dict(space),
        trials=count,
        concurrent=concurrent,
        storage=f"{folder}/tune",
        seed=0,
        sampler=sampler,
        reuse_actors=True,
    )
    run_search(search, TrialLog(f"{folder}/trials.json", one_shot=True), clock)
    return clock


def loop(args: argparse.Namespace) -> dict[str, float]:
    """``loop``: trials a second that do nothing; ``growth``: seconds of one among the last over the first.

    ``memory``: of the driver, the last tenth over the second.
    """
    with connect(None), tempfile.TemporaryDirectory() as folder:
        clock = run_idle(folder, args.trials, 2, 0.0, args.sampler)
    ends = clock.ends
    tenth = max(len(ends) // 10, 2)
    first = (ends[2 * tenth - 1] - ends[tenth - 1]) / tenth  # the very first wait for the actors
    last = (ends[-1] - ends[-1 - tenth]) / tenth
    early, late = clock.bytes[2 * tenth - 1], clock.bytes[-1]
    print(
        f"{len(ends):,} idle trials ({args.sampler}): {1000 * first:.0f} ms each at first, "
        f"{1000 * last:.0f} ms at the end; driver {early / 1e6:.0f} → {late / 1e6:.0f} MB"
    )
    rate = len(ends[tenth:]) / (ends[-1] - ends[tenth - 1])
    return {"loop": rate, "growth": last / first, "memory": late / early}


def actors(args: argparse.Namespace) -> dict[str, float]:
    """Trials a second of half a second each, by the number of nodes."""
    from ray.cluster_utils import Cluster

    rates = {}
    for nodes in (1, 2, 4):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            for _ in range(nodes - 1):
                cluster.add_node(num_cpus=1)
            ray.init(cluster.address, log_to_driver=False)
            with connect(None), tempfile.TemporaryDirectory() as folder:
                ends = run_idle(folder, 20 * nodes + 1, nodes, 0.5).ends
            rates[nodes] = (len(ends) - 2 * nodes) / (ends[-1] - ends[2 * nodes - 1])
        finally:
            ray.shutdown()
            cluster.shutdown()
    print(
        "trials of 0.5 s each, a second: " + ", ".join(f"{n} actors {rate:.2f}" for n, rate in rates.items())
    )
    return {f"actors{n}": rate / rates[1] for n, rate in rates.items()}


def train(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a Tune trial around a Ray Train run of one step, the first trial left out.

    ``start``: in a process of its own; ``again``: in that of the trial before, as where nothing stops trials.
    """
    with connect(None):
        return {name: _train(args, reuse) for name, reuse in (("start", False), ("again", True))}


def _train(args: argparse.Namespace, reuse: bool) -> float:
    job = {
        "name": "bench",
        "model": {"checkpoint": args.model, "classes": 10},
        "data": {"train": args.small, "validation": args.small},
        "training": {"epochs": 1, "batch_size": 8, "lr": {"kind": "constant", "peak": 1e-4}},
        "threads": 1,
    }
    content = TrainJob.model_validate(job)
    clock = Clock()
    began: list[float] = []
    clock.trial_started = lambda *_: began.append(time.perf_counter())  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        trainable = tune.with_parameters(
            TrainingTrial, jobs=lambda values: content, resources=Resources(), storage=f"{folder}/train"
        )
        search = Search(
            name="train",
            trainable=tune.with_resources(trainable, {"memory": 1 << 20}),
            space={"x": optuna.distributions.FloatDistribution(0.0, 1.0)},
            trials=4,
            concurrent=1,
            storage=f"{folder}/tune",
            seed=0,
            reuse_actors=reuse,
        )
        run_search(search, TrialLog(f"{folder}/trials.json"), clock)
    # from the end of one to the end of the next: what starts a process is in it
    each = [end - start for start, end in zip([began[0], *clock.ends], clock.ends, strict=False)]
    how = "in the process of the one before" if reuse else "in a process of its own"
    print(f"a Tune trial around a Train run of one step, {how}: " + ", ".join(f"{one:.1f} s" for one in each))
    return statistics.median(each[1:])


def small_file(folder: str, train_file: str) -> str:
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(train_file).slice(0, 8), f"{folder}/small.parquet")
    return f"{folder}/small.parquet"


PARTS = {"trial": trials, "loop": loop, "actors": actors, "train": train}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--gradients", type=int, default=256, help="of the order")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--trials", type=int, default=300, help="of the idle loop")
    parser.add_argument("--sampler", default="tpe", help="of the idle loop")
    args = parser.parse_args()
    args.model, args.train = str(Path(args.model).absolute()), str(Path(args.train).absolute())
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        args.small = small_file(folder, args.train)
        for part in args.parts:
            ratios |= PARTS[part](args)
    missed = [key for key, least in AT_LEAST.items() if ratios.get(key, least) < least]
    missed += [key for key, most in AT_MOST.items() if ratios.get(key, most) > most]
    summary = ", ".join(f"{key} {value:.2f}" for key, value in ratios.items())
    print(f"search: {summary}" + (f"; missed: {', '.join(missed)}" if missed else "; nothing missed"))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
