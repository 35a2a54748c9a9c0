"""Dense, unstructured, structured and INT8: accuracy, time and size of each ingredient, on all engines.

    python experiments/benchmarks/deploy_speed.py --dense D --combined C --int8 Q --data test.parquet
        --calibration train.parquet [--unstructured U75 U90 U95] [--structured S] [--least 2.4]

D is the dense checkpoint, U those with zeros alone, S the one with fewer channels, C that with fewer channels
and zeros, Q the INT8 folder made of C, as the recipe ``experiments/deploy/vit_cifar10.yaml`` leaves them in
its storage (of a Swin, with ``--least 1.8``). Each checkpoint is quantised on the spot by ONNX Runtime and
OpenVINO besides. All in one run, in turns, on one thread.

    python experiments/benchmarks/deploy_speed.py --device cuda

2:4 against dense, both compiled, in bfloat16: DeiT-B's shapes at 224², batch 256; random weights, pruned 2:4.

The last line has all ratios; the exit status is 1 when a stated one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from orchestration.benchmark.measure import Row
from orchestration.benchmark.options import BenchmarkOptions
from orchestration.benchmark.report import Report
from orchestration.benchmark.run import run
from trainers.config.engines import Choice
from trainers.engines.registry import ENGINES
from trainers.quantization.int8_folder import PACKED_MODEL, pack, read_record

WANTED = ["torch", "compile", "csr", "onnxruntime", "onnxruntime:int8", "openvino", "openvino:int8"]
MIXED = Choice("openvino", "int8-bfloat16")  # where the processor has bfloat16
INT8 = ("int8", "int8-bfloat16")
LOSS, SIZE = 0.01, 0.10
BATCHES = "1,64"


def fastest(report: Report, models: Iterable[str], batch: int, kinds: tuple[str, ...]) -> Row | None:
    """The fastest right answer of some models at a batch size, in some data types."""
    wanted = set(models)
    rows = [
        row
        for row in report.rows
        if row.timed and row.model in wanted and row.batch == batch and row.choice.kind in kinds
    ]
    return min(rows, key=lambda row: row.latency, default=None)


def shares(
    report: Report, groups: dict[str, tuple[list[str], tuple[str, ...]]]
) -> dict[str, dict[int, float]]:
    """Gain of each ingredient over the dense model in float32, the best engine of each, by batch size."""
    gains: dict[str, dict[int, float]] = {}
    for name, (models, kinds) in groups.items():
        for batch in report.batches:
            dense, best = report.best_dense(batch), fastest(report, models, batch, kinds)
            if dense is None or best is None:
                continue
            gains.setdefault(name, {})[batch] = dense.latency / best.latency
            top1 = "" if best.top1 is None else f", top-1 {100 * best.top1:.2f} %"
            print(
                f"{name}, batch {batch}: {best.model} on {best.choice} {1e3 * best.latency:.3g} ms, dense on "
                f"{dense.choice} {1e3 * dense.latency:.3g} ms: {dense.latency / best.latency:.2f}×{top1}"
            )
    return gains


def packed_size(int8: Path) -> int:
    """Bytes of the file of an INT8 folder as ``espalier export --format compressed`` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        pack(int8, Path(folder), read_record(int8, str(int8), key="--int8"))
        return Path(folder, PACKED_MODEL).stat().st_size


def on_cpu(args: argparse.Namespace) -> tuple[str, list[str]]:
    structured = [args.structured] if args.structured else []
    models = (args.dense, *args.unstructured, *structured, args.combined, args.int8)
    mixed = [] if ENGINES["openvino"].lacking(MIXED.kind, "cpu") else [str(MIXED)]
    options = BenchmarkOptions(
        models,
        engines=",".join([*WANTED, *mixed]),
        batch=BATCHES,
        data=args.data,
        calibration=args.calibration,
        threads=1,
        repetitions=args.rounds,
        json=args.json,
    )
    options.check()
    report = run(options)
    Console(width=160).print(report.table())
    print(*report.words(), *report.recommendations(), sep="\n")
    names = dict(zip(options.models, dict.fromkeys(row.model for row in report.rows), strict=True))
    dense, combined, int8 = names[args.dense], names[args.combined], names[args.int8]
    groups = {
        "INT8 alone": ([dense], INT8),
        **{f"zeros alone ({names[u]})": ([names[u]], ("float32",)) for u in args.unstructured},
        **({"structure alone": ([names[args.structured]], ("float32",))} if args.structured else {}),
        "structure and zeros": ([combined], ("float32",)),
        "all": ([combined, int8], ("float32", *INT8)),
    }
    gains = shares(report, groups)
    missed = [
        f"all at batch {batch}: {ratio:.2f} < {args.least:g}"
        for batch, ratio in gains.get("all", {0: 0.0}).items()
        if ratio < args.least
    ]
    size = packed_size(Path(args.int8)) / Path(args.dense, "model.safetensors").stat().st_size
    if size > SIZE:
        missed.append(f"size {size:.3f} > {SIZE:g}")
    accuracies = [
        best.top1
        for batch in report.batches
        if (best := fastest(report, groups["all"][0], batch, groups["all"][1])) and best.top1 is not None
    ]
    reference = next(row.top1 for row in report.rows if row.model == dense and row.top1 is not None)
    kept = min(accuracies, default=0.0) / (reference or 1.0)
    if kept < 1 - LOSS:
        missed.append(f"accuracy {kept:.4f} of the dense model's < {1 - LOSS:g}")
    if not report.right:
        missed.append("an engine failed or answered wrongly")
    summary = "; ".join(
        f"{name} {' and '.join(f'{ratio:.2f}×' for ratio in ratios.values())}"
        for name, ratios in gains.items()
    )
    return f"at batches {BATCHES}: {summary}; size {size:.3f}; accuracy {kept:.4f}", missed


def on_cuda(args: argparse.Namespace) -> tuple[str, list[str]]:
    import timm
    import torch

    from pruners import prune
    from trainers.checkpoint.folder import save_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        model = timm.create_model("deit_base_patch16_224", num_classes=1000).eval()
        record = {"method": "dense", "sparsity": 0.0, "allocation": {}}
        save_checkpoint(Path(scratch, "dense"), model, model_args={}, masks=None, record=record)
        done = prune(model, "magnitude", pattern="2:4")
        record = {"method": "magnitude", "sparsity": done.sparsity, "allocation": done.allocation}
        save_checkpoint(Path(scratch, "sparse"), model, model_args={}, masks=done.masks, record=record)
        options = BenchmarkOptions(
            (f"{scratch}/dense", f"{scratch}/sparse"),
            engines="compile:bfloat16,2:4:bfloat16",
            batch="256",
            device="cuda",
            repetitions=args.rounds,
            json=args.json,
        )
        options.check()
        report = run(options)
    Console(width=160).print(report.table())
    print(*report.words(), sep="\n")
    dense, sparse = (fastest(report, [name], 256, ("bfloat16",)) for name in ("dense", "sparse"))
    if dense is None or sparse is None:
        return "2:4: no time", ["2:4"]
    ratio = dense.latency / sparse.latency
    return f"2:4 in bfloat16, batch 256: {ratio:.2f}× on {report.machine['gpu']}", []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dense")
    parser.add_argument("--combined")
    parser.add_argument("--structured")
    parser.add_argument("--unstructured", nargs="*", default=[])
    parser.add_argument("--int8")
    parser.add_argument("--data")
    parser.add_argument("--calibration")
    parser.add_argument("--least", type=float, default=2.4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    args = parser.parse_args()
    needed = (args.dense, args.combined, args.int8, args.data, args.calibration)
    if args.device == "cpu" and None in needed:
        parser.error("--dense, --combined, --int8, --data and --calibration are needed")
    line, missed = on_cuda(args) if args.device == "cuda" else on_cpu(args)
    print(line + (f"; missed: {json.dumps(missed)}" if missed else ""))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
