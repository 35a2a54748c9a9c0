"""Our training loop against a bare one of twenty lines: same model, data, threads and workers, in one run.

    python experiments/benchmarks/loop_overhead.py --model FOLDER --train A.parquet [--workers 1 2]

Ours is the worker's own loop (:func:`trainers.loop.gradual.run`) under Ray Train, with DDP, masks of 75 %
zeros held, metrics, and checkpoints at the default interval. The bare loop is torch's DataLoader, DDP, AdamW
and clipping. Both time their steps after a warm-up; the two take turns and the medians are compared. Start-up
(from the command to the first step) is told apart.

    python experiments/benchmarks/loop_overhead.py --device cuda [--architecture deit_small_patch16_224]

Our step (bfloat16, torch.compile, zeros held, meter) against a bare one with autocast and torch.compile, in
one process on images that lie ready, without Ray; and the share of the device's own bfloat16 rate.

The last line sums up; the exit status is 1 when a stated ratio is missed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn

LIMIT = 1.05
WARM = 5


def times_of(steps: list[float]) -> float:
    """The median seconds between the starts of two steps, after a warm-up."""
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    return statistics.median(gaps[WARM:])


def bare(rank: int, world: int, folder: str, args: argparse.Namespace) -> None:
    """Twenty lines of PyTorch."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    from trainers.checkpoint.folder import load_checkpoint
    from trainers.data import datasets as data
    from trainers.models import factory as models

    os.nice(15)  # as Ray's workers are: the same share of a machine that has other things to do
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = load_checkpoint(args.model).model.train()
    network = DistributedDataParallel(model)
    images = data.images(args.train, data.eval_transform(models.data_config(model)), key="t")
    sampler = DistributedSampler(images, world, rank, seed=0)
    loader = DataLoader(images, args.batch // world, sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    criterion = nn.CrossEntropyLoss()
    steps, work = [], []
    for pixels, labels in loader:
        steps.append(time.perf_counter())
        work.append(time.process_time())
        loss = criterion(network(pixels), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if len(steps) == args.steps:
            break
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, "steps.json").write_text(json.dumps({"steps": steps, "work": work}))


def ours(args: argparse.Namespace, workers: int, folder: str) -> dict[str, Any]:
    """The product's own worker on a Ray cluster of this machine, timed from within by a hook on its steps."""
    job = {
        "name": "bench",
        "model": {"checkpoint": args.pruned, "classes": args.classes},
        "data": {"train": args.train, "holdout": 0.01},
        "training": {"epochs": 1, "batch_size": args.batch, "lr": {"kind": "constant", "peak": 1e-4}},
        "pruning": {"methods": ["magnitude"], "sparsity": 0.75, "schedule": {"kind": "constant"}},
        "method": "magnitude",
        "threads": args.threads,
    }
    Path(folder, "job.json").write_text(json.dumps(job))
    command = [sys.executable, __file__, "--drive", folder, "--workers", str(workers)]
    command += ["--steps", str(args.steps)]
    began = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    measured: dict[str, Any] = json.loads(Path(folder, "steps.json").read_text())
    return measured | {"began": began}


def timed_worker(config: dict[str, Any]) -> None:
    """:func:`trainers.ray_worker.train_worker`, which notes when steps begin and ends after some of them."""
    import trainers.loop.gradual
    from trainers.ray_worker import RUN, train_worker

    steps: list[float] = []
    work: list[float] = []
    original = trainers.loop.gradual.train_step

    class Enough(Exception):  # noqa: N818 - it is none
        pass

    def step(session: Any, batch: Any) -> None:
        steps.append(time.perf_counter())
        work.append(time.process_time())
        if len(steps) == 1:
            config["first"] = time.time()
        original(session, batch)
        if len(steps) == config["steps"]:
            raise Enough

    trainers.loop.gradual.train_step = step
    try:
        train_worker(config["job"] | {RUN: "timed"})
    except Enough:
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            content = {"steps": steps, "work": work, "first": config["first"]}
            Path(config["folder"], "steps.json").write_text(json.dumps(content))


def drive(folder: str, workers: int, steps: int) -> None:
    """The driver's process: Ray, one Ray Train run with the product's settings."""
    from orchestration.cluster.connect import connect
    from orchestration.recipe.schema import Resources
    from orchestration.search.standing_workers import StandingTrainer, WorkerPool
    from orchestration.search.training_trial import Reports, train_run
    from trainers.config.jobs import TrainJob

    job = TrainJob.model_validate_json(Path(folder, "job.json").read_text())
    with connect(None):
        resources = Resources(workers=workers, cpus_per_worker=1.0, retries=0)
        pool = WorkerPool()
        plain = train_run(job, resources, f"{folder}/runs", "run", Reports(), pool=pool)
        StandingTrainer(
            timed_worker,
            train_loop_config={"job": job.model_dump(mode="json"), "folder": folder, "steps": steps},
            scaling_config=plain.scaling_config,
            run_config=plain.run_config,
            pool=pool,
            callback=Reports(),
        ).fit()


def compare(args: argparse.Namespace, workers: int) -> float:
    """Our seconds a step over the bare loop's."""
    theirs, product, starts, work = [], [], [], []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(bare, (workers, folder, args), nprocs=workers)
            bare_steps = json.loads(Path(folder, "steps.json").read_text())
            theirs.append(times_of(bare_steps["steps"]))
        with tempfile.TemporaryDirectory() as folder:
            measured = ours(args, workers, folder)
            product.append(times_of(measured["steps"]))
            starts.append(measured["first"] - measured["began"])
            work.append(times_of(measured["work"]) / times_of(bare_steps["work"]))
    ratio = statistics.median(product) / statistics.median(theirs)
    spread = [", ".join(f"{1000 * one:.1f}" for one in times) for times in (theirs, product)]
    print(f"{workers} workers of {args.threads} threads, batch {args.batch}: {ratio:.3f} (≤ {LIMIT})")
    print(f"  ms a step, bare: {spread[0]}; ours: {spread[1]}")
    # what Ray's own processes take of the same processors is in the times, and not in this
    print(f"  processor time of a worker's step over the bare one's: {statistics.median(work):.3f}")
    print(f"  from the command to the first step: {statistics.median(starts):.1f} s")
    return ratio


def image_file(folder: str, side: int, count: int) -> str:
    """A Parquet file of noise."""
    rows = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)).save(
            file, "JPEG"
        )
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": number % 10})
    pq.write_table(pa.Table.from_pylist(rows), f"{folder}/images.parquet")
    return f"{folder}/images.parquet"


def seconds(step: Callable[[], Any], device: torch.device, count: int) -> float:
    """Of a step, over ``count`` of them that the device works off without a halt."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return (time.perf_counter() - began) / count


def on_device(args: argparse.Namespace) -> float:
    """Our step's seconds over the bare one's, on images that lie ready."""
    import timm

    from trainers.checkpoint.folder import save_checkpoint
    from trainers.config.jobs import TrainJob
    from trainers.loop.session import Session
    from trainers.loop.train_step import train_step

    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(
            Path(folder, "dense"), timm.create_model(args.architecture), model_args={}, masks=None, record={}
        )
        checkpoint, classes = pruned_copy(f"{folder}/dense", f"{folder}/pruned")
        side = timm.create_model(args.architecture).default_cfg["input_size"][-1]
        training = {"epochs": 1, "batch_size": args.batch, "precision": "bfloat16", "compile": True}
        content = {
            "name": "bench",
            "model": {"checkpoint": checkpoint, "classes": classes},
            "data": {"train": image_file(folder, side, args.batch + 8), "holdout": 0.03},
            "training": {**training, "lr": {"kind": "constant", "peak": 1e-4}},
            "pruning": {"methods": ["magnitude"], "sparsity": 0.75, "schedule": {"kind": "constant"}},
            "method": "magnitude",
        }
        session = Session.open(TrainJob.model_validate(content), device)
        batch = next(iter(session.train))
        ready = session.normalise(*(part.to(device) for part in batch[:2])).cpu()
        model = timm.create_model(args.architecture).to(device).train()
    network, criterion = torch.compile(model), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)

    def product_step() -> None:
        train_step(session, batch)
        session.step = 1  # the epoch has one batch; every tenth step looks at the loss

    def theirs() -> None:
        images, labels = (part.to(device, non_blocking=True) for part in (ready, batch[2]))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = criterion(network(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for step in (theirs, product_step):
        seconds(step, device, 3)
    turns = [
        (seconds(theirs, device, args.steps), seconds(product_step, device, args.steps))
        for _ in range(args.rounds)
    ]
    bare, ours = (statistics.median(times) for times in zip(*turns, strict=True))
    size = 8192 if device.type == "cuda" else 1024
    square = torch.ones(size, size, device=device, dtype=torch.bfloat16)
    seconds(lambda: square @ square, device, 3)
    rate = 2 * size**3 / seconds(lambda: square @ square, device, 20)
    work = 3 * 2 * session.costs.at({}).macs * len(batch[0])  # forward, and backward of twice as much
    print(
        f"{args.architecture}, {len(batch[0])} images of {side}² a step, bfloat16, compiled, {device.type}: "
        f"bare {1000 * bare:.1f} ms, ours {1000 * ours:.1f} ms: {ours / bare:.3f} (≤ {LIMIT}); "
        f"{100 * work / ours / rate:.0f} % of the device's bfloat16 rate ({rate / 1e12:.1f} TFLOP/s)"
    )
    return ours / bare


def pruned_copy(model: str, folder: str) -> tuple[str, int]:
    """The model with 75 % zeros, as a checkpoint, and its classes."""
    from pruners import prune
    from trainers.checkpoint.folder import load_checkpoint, model_args, save_checkpoint
    from trainers.models.factory import classes

    loaded = load_checkpoint(model).model
    masks = prune(loaded, "magnitude", 0.75).masks
    arguments = model_args(Path(model))
    save_checkpoint(Path(folder), loaded, model_args=arguments, masks=masks, record={})
    return folder, classes(loaded)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--train")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", help="cuda: steps alone, without Ray")
    parser.add_argument("--architecture", default="deit_small_patch16_224")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device:
        ratio = on_device(args)
        verdict = "missed" if ratio > LIMIT else "within"
        print(f"our step over a bare one on {args.device}: {ratio:.3f}; {verdict} {LIMIT}")
        sys.exit(ratio > LIMIT)
    if args.drive:
        drive(args.drive, args.workers[0], args.steps)
        return
    if not (args.model and args.train):
        parser.error("--model and --train are needed")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.train = str(Path(args.train).absolute())
    with tempfile.TemporaryDirectory() as folder:
        args.pruned, args.classes = pruned_copy(args.model, f"{folder}/pruned")
        ratios = {workers: compare(args, workers) for workers in args.workers}
    missed = [workers for workers, ratio in ratios.items() if ratio > LIMIT]
    summary = ", ".join(f"{workers} workers {ratio:.3f}" for workers, ratio in ratios.items())
    print(f"our loop over a bare one: {summary}; {'missed' if missed else 'all'} within {LIMIT}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
