"""The memory that a Fisher of DeiT-B takes under a budget: its real shapes, random weights, a few gradients.

    python experiments/benchmarks/fisher_memory.py [--gib 8] [--gradients 2] [--image 224] [--depth 1.0]

The whole Fisher in blocks of 192 would be 98 GB with what is added to it. Under a budget groups of layers
take turns, and their orders lie on disk (in TMPDIR; 36 GB). What is measured is the memory of the process
that no file stands behind (RssAnon, sampled), beyond what it has with the model after one forward pass; so
gradients and activations count. Up to 128 gradients wait in buffers, of which two touch little: ``--gradients
130 --image 32`` fills them, with all weights in their real shapes and images small enough for that. The exit
status is 1 when it exceeds the budget.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

import timm
import torch
from torch.nn import functional

from pruners import MaskSet, create_pruner, find_layers
from pruners.order_builder import OrderBuilder


def resident() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Samples the memory of this process until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.02):
            self.most = max(self.most, resident())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--gradients", type=int, default=2)
    parser.add_argument("--image", type=int, default=224, help="height and width")
    parser.add_argument("--depth", type=float, default=1.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, img_size=args.image)
    layers = find_layers(model)
    batches = [
        (torch.randn(1, 3, args.image, args.image), torch.tensor([number]))
        for number in range(args.gradients)
    ]
    functional.cross_entropy(model.eval()(batches[0][0]), batches[0][1])
    before, peak, began = resident(), Peak(), time.time()

    def report(kind: str, done: int, total: int) -> None:
        taken = (peak.most - before) / 2**30
        print(f"  {time.time() - began:6.0f} s: {kind} {done} of {total}, {taken:.2f} GiB so far", flush=True)

    builder = OrderBuilder(
        model,
        layers,
        MaskSet.from_zeros(model, layers),
        create_pruner("ovit"),
        lambda: batches,
        functional.cross_entropy,
        memory=int(args.gib * 2**30),
        depth=args.depth,
        progress=report,
    )
    numel = sum(layer.numel for layer in layers)
    print(
        f"{args.model}: {numel / 1e6:.1f} M weights in {len(layers)} layers, {builder.passes} passes",
        flush=True,
    )
    peak.start()
    order = builder.order()
    peak.stop.set()
    peak.join()
    assert sum(len(one.indices) for one in order.values()) >= args.depth * numel
    taken = peak.most - before
    print(
        f"{taken / 2**30:.2f} GiB beyond {before / 2**30:.2f} GiB with the model, budget {args.gib:g} GiB: "
        + ("ok" if taken <= args.gib * 2**30 else "MISSED")
    )
    sys.exit(taken > args.gib * 2**30)


if __name__ == "__main__":
    main()
