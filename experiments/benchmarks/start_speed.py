"""Seconds until the first step of a run, and between two trials of a search, against another build.

    python experiments/benchmarks/start_speed.py --model FOLDER --train A.parquet --against CHECKOUT

``run1``, ``run2``: from ``espalier run`` to the first training step, with one worker and two. ``gap``: in a
search whose rule stops trials early (ASHA), from the last step of a trial to the first one of the next, two
workers. Both builds run by the same interpreter, in turns; a hook that every process of theirs reads notes
when their training steps begin. The last line sums up; the exit status is 1 when a stated ratio, or the
seconds of the gap, are missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

OURS = Path(__file__).resolve().parents[2]
AT_MOST = {"gap": 0.3, "run1": 0.5, "run2": 0.5}  # of the other build
GAP_SECONDS = 8.0
IMAGES, VALIDATION = 640, 128

# read by every Python process that has its folder on its path
HOOK = """
import importlib.abc, importlib.machinery, os, sys, time
FOLDER = os.environ.get("ESPALIER_STEPS")
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in ("trainers.gradual", "trainers.loop.gradual"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            return None
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            step = module.train_step
            def noted(session, batch):
                with open(f"{FOLDER}/{os.getpid()}", "a") as file:
                    file.write(f"{time.time()} {session.job.keep_folder}\\n")
                step(session, batch)
            module.train_step = noted
        spec.loader.exec_module = exec_module
        return spec
if FOLDER:
    sys.meta_path.insert(0, Finder())
"""


@dataclass(frozen=True)
class Steps:
    """When the training steps of a command began: of each run the first and the last one."""

    began: float
    runs: list[tuple[float, float]]

    @property
    def start(self) -> float:
        return self.runs[0][0] - self.began

    @property
    def gaps(self) -> list[float]:
        return [after[0] - before[1] for before, after in pairwise(self.runs)]


def recipe(args: argparse.Namespace, folder: Path, workers: int, trials: int) -> Path:
    """A recipe that both builds read: magnitude pruning of a small model, four short epochs."""
    content: dict[str, Any] = {
        "name": "start",
        "model": {"checkpoint": f"file://{args.model}", "classes": 10},
        "data": {"train": args.small, "validation": args.held_out},
        "dense": None,
        "pruning": {
            "methods": ["magnitude"],
            "sparsity": 0.5,
            "schedule": {"start": 0.5, "steps": 1, "last_at": 0.1},
        },
        "allocation": {"trials": 0},
        "recovery": {
            "epochs": 4,
            "batch_size": 32,
            "lr": {"kind": "constant", "peak": 1e-5},
            "checkpoint_every": 4,
        },
        # the recipe's own value comes first, and is better than all others: those are stopped early
        "schedule": {
            "trials": trials,
            "scheduler": "asha",
            "sampler": "random",
            "grace_epochs": 1,
            "reduction": 2,
            "space": {"recovery.lr.peak": {"log": [9e-6, 0.5]}},
        },
        "resources": {"workers": workers, "cpus_per_worker": 1},
    }
    file = folder / "start.yaml"
    file.write_text(json.dumps(content))  # which is YAML
    return file


def measured(args: argparse.Namespace, build: Path, words: list[str], workers: int, trials: int) -> Steps:
    """Run a command of a build to its end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "steps").mkdir()
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(HOOK)
        file = recipe(args, folder, workers, trials)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder / "hook"), str(build)]),
            "ESPALIER_STEPS": str(folder / "steps"),
        }
        began = time.time()
        command = [sys.executable, "-m", "orchestration.cli", *words, str(file)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{build}: {' '.join(words)} ended with {done.returncode}\n{done.stderr[-3000:]}")
        times: dict[str, list[float]] = {}
        for log in (folder / "steps").iterdir():
            for line in log.read_text().splitlines():
                seconds, run = line.split()
                times.setdefault(run, []).append(float(seconds))
        return Steps(began, sorted((min(run), max(run)) for run in times.values()))


def seconds_of(args: argparse.Namespace, build: Path, part: str) -> float:
    if part == "gap":
        gaps = measured(args, build, ["sweep"], 2, args.trials).gaps
        print(f"  {build.name}, {part}: " + ", ".join(f"{gap:.1f}" for gap in gaps) + " s", flush=True)
        return statistics.median(gaps)
    start = measured(args, build, ["run"], int(part[-1]), 1).start
    print(f"  {build.name}, {part}: {start:.1f} s", flush=True)
    return start


def small_files(args: argparse.Namespace, folder: str) -> None:
    table = pq.read_table(args.train)
    args.small, args.held_out = f"{folder}/small.parquet", f"{folder}/held_out.parquet"
    pq.write_table(table.slice(0, IMAGES), args.small)
    pq.write_table(table.slice(IMAGES, VALIDATION), args.held_out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--against", help="checkout of another build; without it there are no ratios")
    parser.add_argument("--parts", nargs="+", choices=list(AT_MOST), default=list(AT_MOST))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=4, help="of the search")
    args = parser.parse_args()
    args.model, args.train = str(Path(args.model).absolute()), str(Path(args.train).absolute())
    builds = [OURS] if args.against is None else [Path(args.against).resolve(), OURS]
    seconds: dict[tuple[str, Path], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        small_files(args, folder)
        for _ in range(args.rounds):
            for part in args.parts:
                for build in builds:
                    seconds.setdefault((part, build), []).append(seconds_of(args, build, part))
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    missed, summaries = [], []
    for part in args.parts:
        ours = medians[part, OURS]
        text, late = f"{part} {ours:.1f} s", part == "gap" and ours > GAP_SECONDS
        if len(builds) > 1:
            ratio = ours / medians[part, builds[0]]
            text, late = f"{text} ({ratio:.2f} of the other build)", late or ratio > AT_MOST[part]
        summaries.append(text)
        missed += [part] * late
    print(
        f"start: {', '.join(summaries)}"
        + (f"; missed: {', '.join(missed)}" if missed else "; nothing missed")
    )
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
