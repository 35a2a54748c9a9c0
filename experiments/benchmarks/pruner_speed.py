"""The Fisher, its inverse and the elimination against the obvious way to compute them, in one run.

    python experiments/benchmarks/pruner_speed.py [--device cuda] [--threads 1 2]
    python experiments/benchmarks/pruner_speed.py --against FOLDER [--threads 2]

The obvious way: m rank-one updates of the inverse Fisher blocks (Woodbury), then for each weight that falls a
full downdate of its block, in float64 as ours is (in float32 it takes other pivots; its time is shown too).
Same gradients, same machine, same pivots (checked). Its m updates are extrapolated from 64. Layers are those
of a small ViT for 32-pixel images (width 192, 6 blocks, 2.65 M weights) and the first encoder block of DeiT-S
(1.77 M; the whole model's Fisher would take 12 GB), on CUDA all of DeiT-B. With --against another
checkout takes turns with this one, round by round. The last line sums up; the exit status is 1 when a stated
ratio is missed. The process keeps what memory it frees (:func:`keep_memory`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from obvious import DAMP, B, Clock, Obvious, Problem, bandwidth, layer_sets, matrix_rate
from torch import Tensor

from pruners import PrunableLayer, create_pruner, find_layers
from pruners.allocation.sharing import Sharing
from pruners.elimination.fisher import BlockFisher
from pruners.elimination.obs import eliminate
from pruners.methods.second_order import SecondOrder, State, Task, chunks

LEAST_FISHER = {256: 10.0, 1024: 20.0, 4096: 40.0}
LEAST_BOTH = {256: 12.0, 1024: 18.0}


@dataclass
class Report:
    """Ratios with what they must be."""

    lines: list[tuple[str, float, float, str]] = field(default_factory=list)

    def need(self, what: str, value: float, bound: float, *, most: bool = False) -> None:
        ok = value <= bound if most else value >= bound
        sign = "≤" if most else "≥"
        self.lines.append((what, value, bound, "ok" if ok else "MISSED"))
        print(f"  {what:<58}{value:>8.2f}  ({sign} {bound:g})  {'ok' if ok else 'MISSED'}", flush=True)

    @property
    def missed(self) -> list[str]:
        return [what for what, _, _, state in self.lines if state == "MISSED"]


def same_pivots(device: torch.device) -> float:
    """The share of equal pivots on some blocks, both ways in float64 from the same gradients."""
    layer = PrunableLayer("a.weight", "MLP", 0, (32, B))
    problem = Problem("check", [layer], device)
    fisher = BlockFisher([layer], block_size=B, damp=DAMP, dtype=torch.float64)
    obvious = Obvious(32, device)
    for gradient in problem.gradients(0, 256):
        fisher.add(gradient)
        obvious.add(problem.blocks(gradient), 256)
    theirs = obvious.eliminate(problem.blocks(problem.weights))
    task, state = started(problem, layer, fisher)
    ours = torch.cat(
        [
            one.slots.gather(1, eliminate(one.weights, one.inverse, one.alive).order)
            for one in chunks(task, state.weight, state.alive)
        ]
    )
    return float((ours == theirs).double().mean())


def started(problem: Problem, layer: PrunableLayer, fisher: BlockFisher) -> tuple[Task, State]:
    fisher.flush()
    pattern = create_pruner("ovit").sparsity_pattern
    task = Task.of(layer, problem.weights[layer.name], problem.masks[layer.name], fisher, pattern)
    return task, State.after(task, task.initial_order())


def time_obvious(problem: Problem, dtype: torch.dtype, updates: int, steps: int) -> tuple[float, float]:
    """Seconds of one update, and of one elimination step."""
    weights = problem.blocks(problem.weights)
    obvious = Obvious(len(weights), problem.device, dtype)
    blocks = [problem.blocks(one) for one in problem.gradients(0, min(8, updates))]
    obvious.add(blocks[0], 256)
    with Clock(problem.device) as update:
        for number in range(updates):
            obvious.add(blocks[number % len(blocks)], 256)
    with Clock(problem.device) as elimination:
        obvious.eliminate(weights, steps)
    return update.spent / updates, elimination.spent / steps


@dataclass
class Ours:
    """Seconds: gradients to sums by their number (``steady``: of one, once memory is there), and so on."""

    accumulate: dict[int, float]
    steady: float
    inverse: float
    order: float
    weights_at: float
    kept: int


def time_ours(problem: Problem, most: int) -> Ours:
    pruner = create_pruner("ovit", block_size=B, damp=DAMP)
    assert isinstance(pruner, SecondOrder), "oViT is one"
    fisher = pruner.fisher(problem.layers)
    clock, done, accumulate = Clock(problem.device), 0, {}
    for count in (m for m in LEAST_FISHER if m <= most):
        before = clock.spent
        for first in range(done, count, 128):
            for gradient in problem.gradients(first, min(first + 128, count)):
                with clock:
                    fisher.add(gradient)
        steady = (clock.spent - before) / (count - done)
        with clock:
            fisher.flush()
        done = count
        accumulate[count] = clock.spent
    inverses, orders = [], []
    for _ in range(2):  # the smaller of two: they are subtracted
        eliminated = None
        with Clock(problem.device) as inverse:
            for layer in problem.layers:
                for chunk in chunks(*unpacked(started(problem, layer, fisher))):
                    assert chunk.inverse is not None, "it is computed when it is asked for"
        with Clock(problem.device) as order:
            eliminated = pruner.order(problem.weights, problem.layers, problem.masks, fisher)
        inverses.append(inverse.spent)
        orders.append(order.spent)
    assert eliminated is not None, "it was computed twice"
    reads = []
    for sparsity in (0.5, 0.75, 0.9):
        total = round(sparsity * problem.numel)
        allocation = Sharing("global").allocate(eliminated.losses, problem.layers, total)
        with Clock(problem.device) as read:
            eliminated.weights_at(problem.weights, allocation)
        reads.append(read.spent)
    return Ours(accumulate, steady, min(inverses), min(orders), sorted(reads)[1], eliminated.nbytes)


def unpacked(pair: tuple[Task, State]) -> tuple[Task, Tensor, Tensor]:
    task, state = pair
    return task, state.weight, state.alive


def compare(problem: Problem, report: Report, rate: float, most: int) -> None:
    d = problem.numel
    warm = time_ours(problem, 256)  # code is compiled, and memory has been touched
    del warm
    gc.collect()
    ours = time_ours(problem, most)
    update, step = time_obvious(problem, torch.float64, 64, B)
    update32, step32 = time_obvious(problem, torch.float32, 8, 8)
    gc.collect()
    elimination = max(ours.order - ours.inverse, 1e-9)
    counts = sorted(ours.accumulate)
    print(
        "  ours: accumulation "
        + ", ".join(f"{ours.accumulate[m]:.2f} s (m = {m})" for m in counts)
        + f"; inverse {ours.inverse:.2f} s, elimination {elimination:.2f} s, "
        f"weights_at {ours.weights_at:.3f} s"
    )
    print(
        f"  obvious: {update:.3f} s an update (64 timed), elimination {step * B:.1f} s; "
        f"in float32 {update32:.3f} s and {step32 * B:.1f} s (8 of each timed)"
    )
    for count in counts:
        both = (ours.accumulate[count] + ours.inverse, update * count)
        report.need(f"Fisher and inverse, m = {count}: times", both[1] / both[0], LEAST_FISHER[count])
    flops = 2 * B * d / ours.steady
    report.need("accumulation: % of the machine's own sgemm", 100 * flops / rate, 75.0)
    report.need("elimination of every weight: times", step * B / elimination, 10.0)
    for count in (m for m in LEAST_BOTH if m in ours.accumulate):
        ours_total = ours.accumulate[count] + ours.order
        theirs = update * count + step * B
        report.need(f"both, m = {count}: times", theirs / ours_total, LEAST_BOTH[count])
    report.need(
        f"weights_at, % of our elimination (keeps {ours.kept / 1e6:,.0f} MB)",
        100 * ours.weights_at / elimination,
        5.0,
        most=True,
    )


def sorts(report: Report, device: torch.device) -> None:
    """DIMAP and LAMP on Swin-B, in sorts of the same weights."""
    with torch.device("meta"):
        layers = find_layers(timm.create_model("swin_base_patch4_window7_224"))
    random = torch.Generator(device).manual_seed(0)
    weights = {one.name: torch.randn(one.shape, generator=random, device=device) for one in layers}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    total = sum(layer.numel for layer in layers) // 2

    def one_sort() -> None:
        for weight in weights.values():
            torch.sort(weight.abs().reshape(-1))

    def pruned(method: str) -> Callable[[], None]:
        pruner = create_pruner(method)

        def work() -> None:
            order = pruner.order(weights, layers, masks, None)
            Sharing(pruner.scope).allocate(order.losses, layers, total)

        return work

    times = {}
    for name, work in {"sort": one_sort, "dimap": pruned("dimap"), "lamp": pruned("lamp")}.items():
        work()
        with Clock(device) as clock:
            work()
        times[name] = clock.spent
    print(f"  Swin-B, {2 * total / 1e6:.1f} M weights: one sort {times['sort']:.2f} s")
    for name in ("dimap", "lamp"):
        report.need(
            f"{name} on Swin-B, in sorts of the same data", times[name] / times["sort"], 3.0, most=True
        )


def peak(device: torch.device) -> tuple[float, float]:
    """Bytes that a Fisher with its elimination takes beyond what was there, and its bound."""
    problem = Problem("peak", layer_sets(device)["vit 192×6"], device)
    small = Problem("warm", problem.layers[1:2], device)
    pruner = create_pruner("ovit", block_size=B, damp=DAMP)

    def work(case: Problem, count: int) -> None:
        fisher = pruner.fisher(case.layers)
        assert fisher is not None, "oViT has one"
        for gradient in case.gradients(0, count):
            fisher.add(gradient)
        fisher.flush()
        for layer in case.layers:
            kept.append(pruner.order(case.weights, [layer], case.masks, fisher))
            fisher.discard(layer.name)

    kept: list[object] = []
    work(small, 64)
    bound = 1.5 * problem.numel * B * 4 + 4 * problem.numel
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work(problem, 256)
        return torch.cuda.max_memory_allocated(device) - before, bound
    before = high_water()
    work(problem, 256)
    return high_water() - before, bound


def against(folder: str, threads: int, report: Report, rounds: int = 3, count: int = 256) -> None:
    """Time this checkout and another one in turns; the best round of each counts."""
    here = Path(__file__).parent
    sides = {"this": here.parents[1], "other": Path(folder).resolve()}
    with tempfile.TemporaryDirectory() as scratch:
        processes = {
            side: subprocess.Popen(
                [
                    sys.executable,
                    here / "pruner_rounds.py",
                    root,
                    str(threads),
                    str(count),
                    f"{scratch}/{side}",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=root,
                env={**os.environ, "PYTHONPATH": str(root)},
            )
            for side, root in sides.items()
        }

        def ask(side: str, what: str) -> dict[str, float]:
            process = processes[side]
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
            answer: dict[str, float] = json.loads(process.stdout.readline())
            return answer

        for name in layer_sets(torch.device("cpu")):
            answers: dict[str, list[dict[str, float]]] = {"this": [], "other": []}
            for number in range(rounds + 1):
                for side, times in answers.items():
                    answer = ask(side, f"time {name}")
                    if number:  # the first compiles, and fills memory
                        times.append(answer)
            best = {
                side: {key: (max if key == "share" else min)(one[key] for one in times) for key in times[0]}
                for side, times in answers.items()
            }
            for side, fastest in best.items():
                print(
                    f"  {name}, {side}: accumulation {fastest['accumulation']:.2f} s (m = {count}), "
                    f"inverse {fastest['inverse']:.2f} s, order {fastest['order']:.2f} s"
                )
            this, other = best["this"], best["other"]
            ratio = other["inverse"] / this["inverse"]
            report.need(f"{name}: inverse, times the other's speed", ratio, 2.0)
            ratio = (other["order"] - other["inverse"]) / max(this["order"] - this["inverse"], 1e-9)
            report.need(f"{name}: order beyond the inverse, times", ratio, 2.5)
            report.need(f"{name}: accumulation, % of sgemm", 100 * this["share"], 75.0)
            sizes = {side: ask(side, f"store {name}")["bytes"] for side in sides}
            print(f"  bytes a weight: {sizes['this']:.0f}, other {sizes['other']:.0f}")
            share = sizes["this"] / sizes["other"]
            report.need(f"{name}: stored order, share of the other's", share, 0.5, most=True)
            same, error = _differences(scratch, name)
            report.need(f"{name}: same weights pruned at 50 %, %", 100 * same, 100.0)
            report.need(f"{name}: error of stored updates, in 1/1000", 1000 * error, 1.0, most=True)
        for process in processes.values():
            process.communicate()


def _differences(scratch: str, name: str) -> tuple[float, float]:
    """The share of equal masks, and the largest relative difference of a layer's updates."""
    device = torch.device("cpu")
    before = Problem(name, layer_sets(device)[name], device).weights
    this, other = (torch.load(f"{scratch}/{side}", weights_only=True) for side in ("this", "other"))
    errors, equal = [], 0
    for layer, weight in other["weights"].items():
        masks = this["masks"][layer], other["masks"][layer]
        equal += int((masks[0] == masks[1]).sum())
        kept = masks[0] & masks[1]
        update = (weight - before[layer])[kept].double()
        errors.append(float((this["weights"][layer] - weight)[kept].double().norm() / update.norm()))
    return equal / sum(weight.numel() for weight in before.values()), max(errors)


def high_water() -> int:
    """The most memory that this process has had, in bytes (what it was forked from does not count)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def keep_memory() -> None:
    """Start again as a process that keeps the memory it frees, as a GPU's allocator does.

    Memory that comes back from the system must be cleared page by page (on a virtual machine the host has its
    part in that too), which takes longer than what is measured here. Both sides have it so.
    """
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def peak_apart(device: torch.device) -> tuple[float, float]:
    """:func:`peak` in a process of its own, whose memory is its alone."""
    command = [sys.executable, __file__, "--device", str(device), "--peak"]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=plain)
    last_line = done.stdout.splitlines()[-1]
    taken, bound = json.loads(last_line)
    return taken, bound


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--most", type=int, default=4096, help="largest m of the first layer set (others: 1024)"
    )
    parser.add_argument("--against", metavar="FOLDER", help="a checkout to compare with, on the CPU")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.peak:
        print(json.dumps(peak(device)))
        return
    keep_memory()
    report = Report()
    if args.against is not None:
        against(args.against, args.threads[-1], report)
        finish(report)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {device}")
    for threads in args.threads if device.type == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for number, (name, layers) in enumerate(layer_sets(device).items()):
            torch.backends.cuda.matmul.allow_tf32 = False
            rate = matrix_rate(device)
            print(
                f"{name}, {sum(one.numel for one in layers) / 1e6:.2f} M weights, B = {B}, {threads} threads"
            )
            print(f"  sgemm {rate / 1e9:,.0f} GFLOP/s, memory {bandwidth(device) / 1e9:,.0f} GB/s")
            if device.type == "cuda":
                torch.backends.cuda.matmul.allow_tf32 = True
                print(f"  with TF32 {matrix_rate(device) / 1e9:,.0f} GFLOP/s (not used by ours)")
                torch.backends.cuda.matmul.allow_tf32 = False
            compare(Problem(name, layers, device), report, rate, args.most if not number else 1024)
            gc.collect()
    print("once")
    report.need("same pivots as the obvious way, % (float64)", 100 * same_pivots(device), 100.0)
    sorts(report, device)
    taken, bound = peak_apart(device)
    report.need(
        f"peak memory, % of 1.5·d·B·4 + the model ({bound / 1e9:.2f} GB)",
        100 * taken / bound,
        100.0,
        most=True,
    )
    finish(report)


def finish(report: Report) -> None:
    """Print the summing line, and end with its exit status."""
    missed = report.missed
    summary = f"{len(report.lines) - len(missed)} of {len(report.lines)} ratios hold"
    print(summary + (f"; missed: {'; '.join(missed)}" if missed else ""))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
