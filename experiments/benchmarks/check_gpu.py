"""Whether a GPU computes what the CPU does, and how fast: one command, at most nine minutes, one table.

    make check-gpu

    python experiments/benchmarks/check_gpu.py [--device cuda] [--architecture deit_small_patch16_224]

Needs torch, timm, numba, pydantic, pyarrow and safetensors; no Ray, no MLflow, no data, no weights.

- The batched elimination on the device against the compiled one of the CPU, from the same gradients: masks
  and weights at three sparsities.
- Training steps in bfloat16 and float16 with 75 % zeros: all of them exactly zero afterwards, weights and
  moving average; the loss finite.
- Times: sums of the Fisher against a bare batched product, the elimination against the obvious one, a
  training step against a bare one (loop_overhead.py), 2:4 in bfloat16 against dense, both compiled.

The exit status is 1 when a row is missed. On ``--device cpu`` the batched formulation runs on the CPU, which
checks the program itself; its times say nothing.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import timm
    import torch
    from loop_overhead import image_file, on_device, pruned_copy, seconds
    from obvious import DAMP, B, Clock, Obvious, Problem, layer_sets, matrix_rate
    from torch import Tensor, nn

    from pruners import PrunableLayer, create_pruner, find_layers, prune
    from pruners.elimination import kernels
    from pruners.elimination.fisher import BlockFisher, to_blocks
    from pruners.elimination.order import EliminationOrder
    from trainers.engines.registry import ENGINES
except ModuleNotFoundError as error:
    needs = "torch, timm, numba, pydantic, pyarrow, safetensors"
    print(f"check_gpu: {error.name} is not installed here; needs {needs}", file=sys.stderr)
    sys.exit(2)

GRADIENTS = 256
SPARSITIES = (0.5, 0.75, 0.9)


@dataclass
class Table:
    """Rows of what was measured, what it must be, and whether it is."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, what: str, value: float, bound: float | None = None, *, most: bool = True) -> None:
        """A row; without a bound it is told only."""
        if bound is None:
            self.rows.append((what, f"{value:.4g}", "", ""))
            return
        held = value <= bound if most else value >= bound  # NaN holds neither
        self.rows.append(
            (what, f"{value:.4g}", f"{'≤' if most else '≥'} {bound:g}", "ok" if held else "MISSED")
        )

    def failed(self, what: str, error: Exception) -> None:
        """A part that broke off."""
        text = (str(error).splitlines() or [type(error).__name__])[0]
        self.rows.append((what, text[:70], "", "MISSED"))

    @property
    def missed(self) -> list[str]:
        return [what for what, _, _, verdict in self.rows if verdict == "MISSED"]

    def show(self) -> None:
        widths = [max(len(row[column]) for row in self.rows) for column in range(4)]
        for row in self.rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def batched() -> Iterator[None]:
    """The formulation for GPUs, wherever the tensors are."""
    supports, kernels.threads.supports = kernels.threads.supports, lambda *tensors: False
    try:
        yield
    finally:
        kernels.threads.supports = supports


def ordered(problem: Problem, device: torch.device) -> tuple[EliminationOrder, dict[str, Tensor]]:
    """oViT's order of a problem's weights on a device, from gradients that were drawn on the CPU."""
    pruner = create_pruner("ovit", block_size=B, damp=DAMP, double=True)
    weights, masks = (
        {name: t.to(device) for name, t in all.items()} for all in (problem.weights, problem.masks)
    )
    fisher = pruner.fisher(problem.layers)
    assert fisher is not None, "oViT has one"
    for gradient in problem.gradients(0, GRADIENTS):
        fisher.add({name: part.to(device) for name, part in gradient.items()})
    return pruner.order(weights, problem.layers, masks, fisher), weights


def same_answers(table: Table, device: torch.device, layers: list[PrunableLayer]) -> None:
    """Masks and weights of the device against those of the compiled loops."""
    problem = Problem("check", layers, torch.device("cpu"))
    expected, dense = ordered(problem, torch.device("cpu"))
    with batched():
        order, weights = ordered(problem, device)
        for sparsity in SPARSITIES:
            allocation = {layer.name: round(sparsity * layer.numel) for layer in layers}
            theirs, kept = expected.weights_at(dense, allocation)
            ours, masks = order.weights_at(weights, allocation)
            differ = sum(int((masks[name].cpu() != kept[name]).sum()) for name in kept)
            table.add(
                f"{sparsity:.0%} zeros: masks, bits that differ in a million", 1e6 * differ / kept.numel, 20
            )
            both = {name: masks[name].cpu() & kept[name] for name in kept}
            worst = max(
                float(((ours[name].cpu() - theirs[name]) * both[name]).abs().max() / theirs[name].abs().max())
                for name in kept
            )
            table.add(f"{sparsity:.0%} zeros: weights, largest difference over largest weight", worst, 1e-3)


def zeros_stay(table: Table, device: torch.device, args: argparse.Namespace) -> None:
    """Steps of mixed precision hold zeros, in the weights and in their moving average."""
    from trainers.config.jobs import TrainJob
    from trainers.loop.session import Session
    from trainers.loop.train_step import train_step

    with tempfile.TemporaryDirectory() as folder:
        arguments = {"num_classes": 10}
        save_dense(f"{folder}/dense", args.architecture, arguments)
        checkpoint, classes = pruned_copy(f"{folder}/dense", f"{folder}/pruned")
        side = timm.create_model(args.architecture).default_cfg["input_size"][-1]
        train = image_file(folder, side, args.batch + 8)
        for precision in ("bfloat16", "float16") if device.type == "cuda" else ("bfloat16",):
            job = {
                "name": "check",
                "model": {"checkpoint": checkpoint, "classes": classes},
                "data": {"train": train, "holdout": 0.03},
                "training": {
                    "epochs": 1,
                    "batch_size": args.batch,
                    "precision": precision,
                    "ema": 0.9,
                    "lr": {"kind": "constant", "peak": 1e-4},
                },
                "pruning": {"methods": ["magnitude"], "sparsity": 0.75, "schedule": {"kind": "constant"}},
                "method": "magnitude",
            }
            session = Session.open(TrainJob.model_validate(job), device)
            assert session.masks is not None, "the checkpoint has some"
            batch = next(iter(session.train))
            for _ in range(args.steps):
                train_step(session, batch)
            session.metrics.reduce()
            loose = 0
            for model in (session.model, session.shown):
                weights = dict(model.named_parameters())
                loose += sum(int((weights[name][~mask] != 0).sum()) for name, mask in session.masks.items())
            table.add(f"{precision}: pruned weights that are not zero after {args.steps} steps", loose, 0)
            losses = session.metrics.losses
            table.add(f"{precision}: last loss over first", losses[-1] / losses[0], 1.0)


def save_dense(folder: str, architecture: str, arguments: dict[str, Any]) -> None:
    from trainers.checkpoint.folder import save_checkpoint

    model = timm.create_model(architecture, **arguments)
    save_checkpoint(Path(folder), model, model_args=arguments, masks=None, record={})


def fisher_time(table: Table, device: torch.device, layers: list[PrunableLayer]) -> None:
    """Our sums of g gᵀ, of half the rows and the rest of the others, against the whole product."""
    problem = Problem("Fisher", layers, device)
    chunk = [problem.blocks(gradient) for gradient in problem.gradients(0, 128)]
    rows = torch.stack(chunk, 1)  # (n, m, B)
    total = torch.zeros(rows.shape[0], B, B, device=device)
    fisher = BlockFisher(layers, block_size=B, damp=DAMP)

    def ours() -> None:
        for gradient in problem.gradients(0, 128):
            fisher.add(gradient)

    bare = seconds(lambda: total.baddbmm_(rows.mT, rows), device, 1)
    seconds(ours, device, 1)
    times = [
        (seconds(lambda: total.baddbmm_(rows.mT, rows), device, 2), seconds(ours, device, 2))
        for _ in range(3)
    ]
    bare, accumulation = (sorted(some)[1] for some in zip(*times, strict=True))
    flops = 2 * 128 * B * problem.numel
    table.add(f"Fisher, {problem.numel / 1e6:.1f} M weights: ms for 128 gradients", 1000 * accumulation)
    table.add(
        "  times of a bare product of gradients that lie ready",
        accumulation / bare,
        2.0 if on_gpu(device) else None,
    )
    table.add("  TFLOP/s of the whole product, in float32", flops / accumulation / 1e12)


def elimination_time(table: Table, device: torch.device, layers: list[PrunableLayer]) -> None:
    """All weights of some blocks, against full downdates in the same precision."""
    problem = Problem("elimination", layers, device)
    pruner = create_pruner("ovit", block_size=B, damp=DAMP)
    fisher = pruner.fisher(layers)
    assert fisher is not None, "oViT has one"
    for gradient in problem.gradients(0, 64):
        fisher.add(gradient)
    with batched():
        pruner.order(problem.weights, layers, problem.masks, fisher)
        with Clock(device) as clock:
            pruner.order(problem.weights, layers, problem.masks, fisher)
    weights = torch.cat([to_blocks(problem.weights[layer.name].reshape(-1), B) for layer in layers])
    obvious = Obvious(len(weights), device)
    obvious.eliminate(weights, 2)
    with Clock(device) as theirs:
        obvious.eliminate(weights, 16)
    bare = theirs.spent / 16 * B
    table.add(f"inverse and elimination, {problem.numel / 1e6:.1f} M weights: s", clock.spent)
    bound = 3.0 if on_gpu(device) else None
    table.add("  how often faster than the obvious elimination alone", bare / clock.spent, bound, most=False)


def two_of_four(table: Table, device: torch.device, args: argparse.Namespace) -> None:
    """A whole model in bfloat16, both compiled; 2:4 by magnitude, as times do not depend on which weights."""
    model = timm.create_model(args.architecture).eval().requires_grad_(False)
    prune(model, "magnitude", pattern="2:4", layers=find_layers(model))
    model = model.to(device, torch.bfloat16)
    side = model.default_cfg["input_size"][-1]
    images = torch.randn(args.batch, 3, side, side, device=device, dtype=torch.bfloat16)
    times: dict[str, float] = {}
    answers: dict[str, Tensor] = {}
    with torch.inference_mode():
        for engine in ("compile", "2:4"):
            change: Callable[[nn.Module], nn.Module] = ENGINES[engine].change  # type: ignore[attr-defined]
            network = change(model)
            answers[engine] = network(images).float()
            times[engine] = min(seconds(lambda: network(images), device, args.steps) for _ in range(3))  # noqa: B023
    apart = (answers["2:4"] - answers["compile"]).abs().max() / answers["compile"].abs().max()
    table.add("2:4 in bfloat16: answers' largest difference over the largest logit", float(apart), 0.05)
    table.add("  how often faster than dense, compiled", times["compile"] / times["2:4"])


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--architecture", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8, help="of a small ViT, that orders are compared on")
    args = parser.parse_args()
    device = torch.device(args.device)
    if on_gpu(device) and not torch.cuda.is_available():
        print(
            "check_gpu: --device = cuda: torch finds no GPU here; 'cpu' checks the program alone",
            file=sys.stderr,
        )
        sys.exit(2)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name() if on_gpu(device) else platform.machine()
    print(f"{name}, torch {torch.__version__}, timm {timm.__version__}; sgemm", end=" ")
    print(f"{matrix_rate(device) / 1e12:.3g} TFLOP/s")
    small = layer_sets(torch.device("cpu"))["vit 192×6"][: args.layers]
    large = layer_sets(device)["DeiT-B"] if on_gpu(device) else small
    table = Table()
    parts: dict[str, Callable[[], None]] = {
        "answers of the elimination": lambda: same_answers(table, device, small),
        "zeros in mixed precision": lambda: zeros_stay(table, device, args),
        "time of the Fisher": lambda: fisher_time(table, device, large),
        "time of the elimination": lambda: elimination_time(table, device, large),
    }
    if on_gpu(device):
        parts["time of a training step"] = lambda: table.add(
            "training step, compiled, bfloat16: times of a bare one", on_device(args), 1.05
        )
        parts["2:4"] = lambda: two_of_four(table, device, args)
    began = time.perf_counter()
    for what, part in parts.items():
        try:
            part()
        except Exception as error:  # the other parts are worth their rows all the same
            table.failed(what, error)
    table.show()
    missed = table.missed
    print(
        f"{time.perf_counter() - began:.0f} s; " + (f"missed: {'; '.join(missed)}" if missed else "all held")
    )
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
