"""The sparse engine against dense float32 in torch, ONNX Runtime and OpenVINO: single layers, whole models.

    python experiments/benchmarks/sparse_speed.py [--layers] [--whole] [--scaling] [--growth] [--memory]
        [--model deit_small_patch16_224 vit_cifar10 swin_cifar10] [--batch 1 16] [--threads 1 2]
        [--clock wall] [--rounds 9] [--profile] [--plot FILE]

Random weights, random masks of one sparsity in every linear layer of the blocks; where the processor has the
instructions, INT8 with zeros in blocks of 1 × 4 besides; of single layers 2:4 and half of the weights too.
Answers in float32 are compared with torch's before anything is timed (INT8: within 10 % of the largest). All
engines run in turns, round by round; a ratio is the median over the rounds of the quotient within a round.
OpenVINO is asked for float32: by itself it takes bfloat16 where the processor multiplies that faster, which
is timed too and stated for comparison only. ``--scaling`` is two threads against one (beside a dense product
of torch's: on two halves of one core neither gains), ``--growth`` the time from 75 to 95 % of zeros against
the share of weights that is left. ``--clock cpu`` counts the seconds that the process had a processor (one
thread only), which a busy machine disturbs less. The last line sums up; the exit status is 1 when a stated
figure is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import openvino
import timm
import torch
from sparse_memory import memory
from torch import nn

from trainers.sparse import engine, layout
from trainers.sparse.kernels import host
from trainers.sparse.kernels.int8 import EXTRA_ROWS
from trainers.sparse.packing import packed
from trainers.sparse.plan import Executor, Weights
from trainers.sparse.program import Level, Linear, Program, Quantize
from trainers.sparse.runtime import SparseModel
from trainers.sparse.weights import pack_blocks, to_int8

LAYERS = {
    "DeiT-S qkv": (1152, 384),
    "DeiT-S proj": (384, 384),
    "DeiT-S fc1": (1536, 384),
    "DeiT-S fc2": (384, 1536),
    "ViT-B qkv": (2304, 768),
    "ViT-B proj": (768, 768),
    "ViT-B fc1": (3072, 768),
    "ViT-B fc2": (768, 3072),
}
TOKENS = {1: 197, 16: 3152}
LEAST_LAYER = {(0.75, 1): 2.0, (0.75, 16): 2.0, (0.9, 1): 5.0, (0.9, 16): 6.0}
LEAST_THREADS, LEAST_FIT = 1.7, 0.99
DEIT = "deit_small_patch16_224"
BFLOAT16 = "openvino bf16"  # timed beside the dense engines, but not float32
GROWTH = (0.75, 0.8, 0.85, 0.9, 0.95)
RELATIVE, RELATIVE_INT8 = 1e-4, 0.1  # of the largest answer


@dataclass(frozen=True)
class Variant:
    """A pruned model.

    Args:
        sparsity: share of zeros.
        int8: whether weights are INT8, and zeros in blocks of 1 × 4.
        group: of so many inputs of an output the share is 0; 0 for zeros anywhere.
    """

    sparsity: float
    int8: bool = False
    group: int = 0

    def mask(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight with random zeros, of the same variance."""
        block = 4 if self.int8 else 1
        random = torch.rand_like(weight[:, ::block])
        if self.group:
            groups = random.reshape(len(random), -1, self.group)
            least = groups.sort(dim=2).values[:, :, int(self.sparsity * self.group)]
            kept = (groups >= least[:, :, None]).reshape(random.shape)
        else:
            kept = random >= self.sparsity
        return weight * kept.repeat_interleave(block, dim=1) / max(1 - self.sparsity, 1e-6) ** 0.5


VARIANTS = {"75%": Variant(0.75), "90%": Variant(0.9), "95%": Variant(0.95)}
if host.has_vnni():
    VARIANTS |= {"75% int8": Variant(0.75, int8=True), "90% int8": Variant(0.9, int8=True)}
OF_LAYERS = {"2:4": Variant(0.5, group=4), "50%": Variant(0.5), **VARIANTS}

Run = Callable[[], Any]
Row = tuple[str, float, float]  # what, measured, stated


@dataclass(frozen=True)
class Model:
    """A model of timm's.

    Args:
        least: the stated ratio of each sparsity.
    """

    architecture: str
    arguments: dict[str, Any]
    least: dict[float, float]

    def create(self) -> nn.Module:
        return timm.create_model(self.architecture, **self.arguments).eval()


_VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 10}
_SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 48, "depths": (2, 2, 4)}
MODELS = {
    DEIT: Model(DEIT, {}, {0.75: 1.5, 0.9: 2.4}),
    "vit_cifar10": Model("vit_tiny_patch16_224", _VIT, {0.9: 2.4}),
    "swin_cifar10": Model(
        "swin_tiny_patch4_window7_224", {**_SWIN, "num_heads": (2, 4, 8), "num_classes": 10}, {0.9: 1.8}
    ),
    "swin_tiny_patch4_window7_224": Model("swin_tiny_patch4_window7_224", {}, {}),
}


@dataclass
class Timer:
    """Runs in turns."""

    rounds: int
    clock: Callable[[], float]
    least: float = 0.01  # seconds that a round of one engine takes

    def times(self, runs: dict[str, Run]) -> dict[str, list[float]]:
        """Seconds a call, round by round."""
        counts = {}
        for name, run in runs.items():
            run()
            start = self.clock()
            run()
            counts[name] = max(1, int(self.least / max(self.clock() - start, 1e-6)))
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, run in runs.items():
                start = self.clock()
                for _ in range(counts[name]):
                    run()
                taken[name].append((self.clock() - start) / counts[name])
        return taken


def ratio(taken: dict[str, list[float]], dense: str, sparse: str) -> float:
    return median(a / b for a, b in zip(taken[dense], taken[sparse], strict=True))


def fastest_dense(taken: dict[str, list[float]], dense: list[str]) -> str:
    return min((name for name in dense if name != BFLOAT16), key=lambda name: median(taken[name]))


def dense_engines(model: nn.Module, example: torch.Tensor, threads: int) -> dict[str, Run]:
    """A model in torch, ONNX Runtime and OpenVINO."""
    torch.set_num_threads(threads)
    array = example.numpy()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "model.onnx"))
        torch.onnx.export(model, (example,), file, dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options)
        core = openvino.Core()
        precisions = {"openvino": "f32"}
        if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            precisions[BFLOAT16] = "bf16"
        requests = {}
        for label, precision in precisions.items():
            settings = {
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                "INFERENCE_PRECISION_HINT": precision,
                "PERFORMANCE_HINT": "LATENCY",
            }
            compiled = core.compile_model(file, "CPU", settings)
            used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
            if used != precision:
                raise SystemExit(f"OpenVINO takes {used}, not {precision}")
            requests[label] = compiled.create_infer_request()
    name = session.get_inputs()[0].name

    def in_torch() -> torch.Tensor:
        with torch.inference_mode():
            return model(example)

    return {
        "torch": in_torch,
        "onnxruntime": lambda: session.run(None, {name: array}),
        **{label: (lambda request=request: request.infer([array])) for label, request in requests.items()},
    }


class LayerRun:
    """One linear layer of the sparse engine on tiles of tokens, by the driver; with ``int8`` its inputs are
    quantized each time."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray, tokens: np.ndarray, *, int8: bool) -> None:
        outputs, inputs = weight.shape
        lanes = host.lanes()
        operations: tuple[Any, ...] = (Linear("layer", "x", "y"),)
        buffers = {"x": inputs, "y": outputs}
        layer = engine.LinearLayer.of(
            weight, bias, lanes=lanes, widest=layout.WIDEST, sparse_from=engine.SPARSE_FROM
        )
        if int8:
            blocks = pack_blocks(*to_int8(weight))
            layer = engine.LinearLayer(outputs, inputs, bias, None, None, blocks)
            operations = (Quantize("x", "quantized", inputs), Linear("layer", "quantized", "y", int8=True))
            buffers["quantized"] = inputs // 4 + EXTRA_ROWS
        level = Level((1, len(tokens)), operations)
        local = ("quantized",) if int8 else ()
        program = Program(1, 1, len(tokens), (1, 1), buffers, local, (level,), "y", "token", 1)
        self._executor = Executor(program, Weights({"layer": layer}))
        plan = self._executor.plan(1)
        (tiling,) = plan.tilings
        plan.buffers["x"][:] = layout.to_tiles(tokens, tiling.widths, lanes)
        self.answer = lambda: layout.from_tiles(plan.buffers["y"], tiling.widths, lanes, len(tokens))

    def __call__(self) -> None:
        self._executor.run(1)


def check(name: str, answer: np.ndarray, expected: np.ndarray, relative: float = RELATIVE) -> None:
    off = np.abs(answer - expected).max() / np.abs(expected).max()
    if not off <= relative:
        raise SystemExit(f"{name}: answers differ from torch's by {off:.2g} of the largest")


def layers(timer: Timer) -> list[Row]:
    """Ratios of single layers, on one thread."""
    rows = []
    for name, (outputs, inputs) in LAYERS.items():
        for batch, count in TOKENS.items():
            linear = nn.Linear(inputs, outputs).eval()
            example = torch.randn(count, inputs)
            runs = dense_engines(linear, example, 1)
            dense = list(runs)
            for label, variant in OF_LAYERS.items():
                weight = variant.mask(linear.weight.detach())
                run = LayerRun(
                    weight.numpy(), linear.bias.detach().numpy(), example.numpy(), int8=variant.int8
                )
                run()
                expected = nn.functional.linear(example, weight, linear.bias).detach().numpy()
                relative = RELATIVE_INT8 if variant.int8 else RELATIVE
                check(f"{name} {label}", run.answer(), expected, relative)
                runs[label] = run
            taken = timer.times(runs)
            best = fastest_dense(taken, dense)
            gains = {label: ratio(taken, best, label) for label in OF_LAYERS}
            for label, variant in VARIANTS.items():
                least = LEAST_LAYER.get((variant.sparsity, batch))
                if least and not variant.int8:
                    rows.append((f"{name} batch {batch} {label}", gains[label], least))
            dense_times = ", ".join(f"{1e3 * median(taken[each]):.3g}" for each in dense)
            print(
                f"{name} {outputs}×{inputs}, {count} tokens: {' / '.join(dense)} {dense_times} ms; "
                + "; ".join(
                    f"{variant} {1e3 * median(taken[variant]):.3g} ms {gain:.2f}×"
                    for variant, gain in gains.items()
                ),
                flush=True,
            )
    return rows


def pruned(model: Model, variant: Variant) -> nn.Module:
    """A model with random masks in the linear layers of its blocks."""
    torch.manual_seed(0)
    made = model.create()
    with torch.no_grad():
        for name, module in made.named_modules():
            if "blocks." in name and isinstance(module, nn.Linear):
                module.weight.copy_(variant.mask(module.weight))
    return made


def checked(name: str, model: nn.Module, ready: SparseModel, images: torch.Tensor, relative: float) -> Run:
    """A call of the engine, after its answer was compared with torch's."""
    with torch.inference_mode():
        expected = model(images).numpy()
    array = images.numpy()
    check(name, ready(array), expected, relative)
    return lambda: ready(array)


def whole(timer: Timer, name: str, batch: int, threads: int, *, profile: bool) -> list[Row]:
    """Ratios of a whole model."""
    model = MODELS[name]
    dense_model = model.create()
    images = torch.randn(batch, 3, *model_size(dense_model))
    runs = dense_engines(dense_model, images, threads)
    dense, ready = list(runs), {}
    for label, variant in VARIANTS.items():
        sparse_model = pruned(model, variant)
        ready[label] = SparseModel(*packed(sparse_model, int8=variant.int8), threads=threads)
        relative = RELATIVE_INT8 if variant.int8 else RELATIVE
        runs[label] = checked(f"{name} {label}", sparse_model, ready[label], images, relative)
    taken = timer.times(runs)
    best = fastest_dense(taken, dense)
    gains = {variant: ratio(taken, best, variant) for variant in ready}
    what = f"{name}, batch {batch}, {threads} threads"
    print(f"{what}: {milliseconds(taken)}; {gained(gains, best)}", flush=True)
    if BFLOAT16 in taken:
        others = {variant: ratio(taken, BFLOAT16, variant) for variant in ready}
        print(f"  for comparison: {gained(others, BFLOAT16)}", flush=True)
    for variant in ready if profile else []:
        print(f"  {variant}: {operation_times(ready[variant], images.numpy())}", flush=True)
    return [
        (f"{what}, {label}", gains[label], model.least[variant.sparsity])
        for label, variant in VARIANTS.items()
        if variant.sparsity in model.least and not variant.int8
    ]


def model_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images."""
    return model.patch_embed.img_size


def milliseconds(taken: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {1e3 * median(times):.3g}" for name, times in taken.items()) + " ms"


def gained(gains: dict[str, float], over: str) -> str:
    return ", ".join(f"{variant} {gain:.2f}×" for variant, gain in gains.items()) + f" over {over}"


def scaling(timer: Timer, name: str, batch: int) -> list[Row]:
    """Two threads against one, at 90 %."""
    model = pruned(MODELS[name], Variant(0.9))
    images = torch.randn(batch, 3, *model_size(model))
    runs = {
        f"{threads} threads": checked(
            name, model, SparseModel(*packed(model), threads=threads), images, RELATIVE
        )
        for threads in (1, 2)
    }
    square = torch.randn(768, 768)
    runs |= {f"product, {threads} threads": product(square, threads) for threads in (1, 2)}
    taken = timer.times(runs)
    gain, most = (ratio(taken, *pair) for pair in (list(runs)[:2], list(runs)[2:]))
    print(f"{name}, batch {batch}, 90%: {milliseconds(taken)}; {gain:.2f}×, product {most:.2f}×", flush=True)
    return [(f"{name} batch {batch} 90%, two threads over one", gain, LEAST_THREADS)]


def product(square: torch.Tensor, threads: int) -> Run:
    """A dense product of torch's."""

    def run() -> None:
        torch.set_num_threads(threads)
        square @ square

    return run


def growth(timer: Timer, name: str, batch: int, plot: Path | None) -> list[Row]:
    """Whether the time is a straight line over the share of weights that is left: the share of its variance
    that the line explains."""
    images = torch.randn(batch, 3, *model_size(MODELS[name].create()))
    runs = {}
    for sparsity in GROWTH:
        model = pruned(MODELS[name], Variant(sparsity))
        runs[f"{sparsity:.0%}"] = checked(name, model, SparseModel(*packed(model)), images, RELATIVE)
    taken = timer.times(runs)
    left = 1 - np.array(GROWTH)
    times = np.array([1e3 * median(each) for each in taken.values()])
    slope, start = np.polyfit(left, times, 1)
    explained = 1 - ((times - start - slope * left) ** 2).sum() / ((times - times.mean()) ** 2).sum()
    print(
        f"{name}, batch {batch}: {milliseconds(taken)}; {start:.3g} ms + {slope / 100:.3g} ms for each "
        f"percent that is left, which explains {explained:.4f} of the differences",
        flush=True,
    )
    if plot is not None:
        draw(plot, f"{name}, batch {batch}, one thread", left, times, (slope, start))
    return [(f"{name} batch {batch}, time over what is left, R²", float(explained), LEAST_FIT)]


def draw(plot: Path, title: str, left: np.ndarray, times: np.ndarray, line: tuple[float, float]) -> None:
    """Writes the plot of :func:`growth`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    ends = np.array([0, left.max()])
    axes.plot(100 * ends, line[1] + line[0] * ends, color="0.6", label="straight line")
    axes.plot(100 * left, times, "o", color="C0", label="measured")
    axes.set(xlabel="weights left (%)", ylabel="ms", ylim=(0, None), xlim=(0, None), title=title)
    axes.legend(frameon=False)
    figure.savefig(plot, metadata={"Date": None} if plot.suffix == ".svg" else None)


def operation_times(model: SparseModel, images: np.ndarray) -> str:
    """CPU milliseconds of each kind of operation over a call, each run over all tiles by itself."""
    model(images)
    plan = model.executor.plan(len(images))
    kinds: dict[str, float] = {}
    for operations, table, items in zip(plan.operations, plan.tables, plan.items, strict=True):
        for operation, row in zip(operations, table, strict=True):
            calls = [
                (host.function(int(row[2 * width - 2]), 3), int(row[2 * width - 1]), number)
                for number, width in items.tolist()
            ]
            taken = []
            for _ in range(5):
                start = time.thread_time()
                for function, arguments, number in calls:
                    function(arguments, number, plan.scratch[0].ctypes.data)
                taken.append(time.thread_time() - start)
            name = operation.layer.split(".")[-1] if isinstance(operation, Linear) else operation.kind
            kinds[name] = kinds.get(name, 0) + 1e3 * median(taken)
    return ", ".join(f"{name} {taken:.2f} ms" for name, taken in kinds.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("layers", "whole", "scaling", "growth", "memory")
    for part in parts:
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--profile", action="store_true", help="times of each kind of operation")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[DEIT, "vit_cifar10", "swin_cifar10"])
    parser.add_argument("--plot", type=Path, help="where --growth draws its last batch size")
    given = parser.parse_args()
    asked = [part for part in parts if getattr(given, part)] or list(parts)
    if given.clock == "cpu" and (given.threads != [1] or "scaling" in asked):
        raise SystemExit("--clock cpu: processor seconds say nothing about several threads")
    torch.set_num_threads(1)
    timer = Timer(given.rounds, time.process_time if given.clock == "cpu" else time.perf_counter)
    rows = layers(timer) if "layers" in asked else []
    for name in given.model if "whole" in asked else []:
        for threads in given.threads:
            for batch in given.batch:
                rows += whole(timer, name, batch, threads, profile=given.profile)
    for batch in given.batch:
        if "scaling" in asked:
            rows += scaling(timer, DEIT, batch)
        if "growth" in asked:
            rows += growth(timer, DEIT, batch, given.plot if batch == given.batch[-1] else None)
        if "memory" in asked:
            rows += memory(DEIT, batch)
    missed = [f"{what}: {gain:.2f} of {least}" for what, gain, least in rows if gain < least]
    print(f"{len(rows) - len(missed)} of {len(rows)} stated figures reached; missed: {missed or 'none'}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
