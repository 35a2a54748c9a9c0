"""Memory of a model that runs: the sparse engine at 90 % zeros against dense float32 in ONNX Runtime.

    python experiments/benchmarks/sparse_memory.py [--model deit_small_patch16_224] [--batch 1]

Each in a process of its own, which imports its engine, loads the model, runs three batches, and reads its
resident set from ``/proc``. What it has that is no file (``RssAnon``), less what it had with the libraries
alone, is the model's: weights, activations, machine code, and what the engine keeps besides. The ratio of
that is the stated figure (0.35 at most). The whole resident sets, with interpreter and libraries (pages of
LLVM's and ONNX Runtime's files), are told beside it: of a small model they are the larger part.
``sparse_speed.py --memory`` prints the same row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LEAST_MEMORY = 1 / 0.35  # dense over sparse
SPARSITY = 0.9


def resident(kind: str = "RssAnon") -> int:
    """Bytes of this process that are in memory: ``RssAnon``, without files, or ``VmRSS``, all."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split(f"{kind}:")[1].split()[0])


def child(engine: str, path: str, shape: tuple[int, ...]) -> None:
    """What a process of its own does: prints its memory as JSON."""
    import numpy as np

    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    run: Any
    if engine == "sparse":
        from trainers.sparse import load

        libraries = resident()
        run = load(path)
    else:
        import onnxruntime

        libraries = resident()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(images: Any) -> Any:
            return session.run(None, {name: images})

    for _ in range(3):
        run(images)
    print(json.dumps({"model": resident() - libraries, "whole": resident("VmRSS")}))


def measured(engine: str, path: Path, shape: tuple[int, ...]) -> dict[str, int]:
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, "--child", engine, str(path), *map(str, shape)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths}
    )
    sizes: dict[str, int] = json.loads(done.stdout)
    return sizes


def memory(name: str, batch: int, arguments: dict[str, Any] | None = None) -> list[tuple[str, float, float]]:
    """``(what, dense over sparse, stated)`` of a timm model, after its two sizes were printed."""
    import timm
    import torch
    from torch import nn

    from trainers.export.onnx import export_onnx
    from trainers.sparse.packing import pack

    torch.manual_seed(0)
    model = timm.create_model(name, **(arguments or {})).eval()
    shape = (batch, 3, *model.patch_embed.img_size)
    with tempfile.TemporaryDirectory() as made:
        dense, sparse = Path(made, "model.onnx"), Path(made, "sparse")
        export_onnx(model, dense, shape[1:], {})
        with torch.no_grad():
            for layer, module in model.named_modules():
                if "blocks." in layer and isinstance(module, nn.Linear):
                    module.weight.mul_(torch.rand_like(module.weight) >= SPARSITY)
        pack(model, sparse)
        sizes = {
            engine: measured(engine, path, shape)
            for engine, path in (("onnxruntime", dense), ("sparse", sparse))
        }
    own = {engine: size["model"] for engine, size in sizes.items()}
    whole = sizes["sparse"]["whole"] / sizes["onnxruntime"]["whole"]
    summary = ", ".join(
        f"{engine} {own[engine] / 1e6:.0f} ({sizes[engine]['whole'] / 1e6:.0f}) MB" for engine in own
    )
    print(
        f"{name}, batch {batch}, memory of the model (of the process): {summary}; "
        f"{own['sparse'] / own['onnxruntime']:.2f} of dense (whole processes {whole:.2f})",
        flush=True,
    )
    return [(f"{name}, batch {batch}, memory", own["onnxruntime"] / own["sparse"], LEAST_MEMORY)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        engine, path, *shape = given.child
        child(engine, path, tuple(map(int, shape)))
        return
    ((what, gain, least),) = memory(given.model, given.batch)
    print(f"{what}: {1 / gain:.2f} of dense, {1 / least:.2f} stated")
    sys.exit(gain < least)


if __name__ == "__main__":
    main()
