"""A second-order elimination timed round by round, in any version of the code; `pruner_speed.py` runs two.

    python experiments/benchmarks/pruner_rounds.py FOLDER THREADS M FILE

FOLDER is a checkout. Layers, weights and gradients are those of its own `obvious.py`. For each line
`time LAYERS` on standard input one round is timed, and one line of JSON is answered: seconds of accumulation,
of all inverses, and of the order. `store LAYERS` stores the order, and answers its bytes a weight; FILE gets
weights and masks at half sparsity.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PIECE = 160  # blocks that are inverted at a time, as many as the pruner takes


class Rounds:
    """One layer set, with the pruner of a checkout."""

    def __init__(self, obvious: Any, pruners: Any, name: str, count: int) -> None:
        device = torch.device("cpu")
        self.obvious, self.count = obvious, count
        self.problem = obvious.Problem(name, obvious.layer_sets(device)[name], device)
        self.pruner = pruners.create_pruner("ovit", block_size=obvious.B, damp=obvious.DAMP)
        self.order: Any = None

    def once(self) -> dict[str, float]:
        """Time one round."""
        self.order = None
        gc.collect()
        problem, clock = self.problem, self.obvious.Clock(torch.device("cpu"))
        fisher = self.pruner.fisher(problem.layers)
        warm = self.obvious.Clock(torch.device("cpu"))
        for number, gradient in enumerate(problem.gradients(0, self.count + 128)):
            with warm if number < 128 else clock:  # the first fill memory
                fisher.add(gradient)
        fisher.flush()
        seconds = {"accumulation": clock.spent}
        with self.obvious.Clock(torch.device("cpu")) as inverse:
            for layer in problem.layers:
                blocks = -(-layer.numel // self.obvious.B)
                slots = torch.arange(self.obvious.B).repeat(blocks, 1)
                alive = slots + self.obvious.B * torch.arange(blocks).unsqueeze(1) < layer.numel
                for first in range(0, blocks, PIECE):
                    part = slice(first, min(first + PIECE, blocks))
                    fisher.inverse(layer.name, part, slots[part], alive[part])
        with self.obvious.Clock(torch.device("cpu")) as order:
            self.order = self.pruner.order(problem.weights, problem.layers, problem.masks, fisher)
        flops = 2 * self.obvious.B * problem.numel * self.count
        rate = self.obvious.matrix_rate(torch.device("cpu"))
        return seconds | {
            "inverse": inverse.spent,
            "order": order.spent,
            "share": flops / clock.spent / rate,
        }

    def stored(self) -> dict[str, Any]:
        """Bytes a weight of the stored order, and the pivots and updates for a comparison."""
        with tempfile.TemporaryDirectory() as folder:
            self.order.save(Path(folder), "x")
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
            loaded = type(self.order).load(Path(folder), "x")
            half = {layer.name: layer.numel // 2 for layer in self.problem.layers}
            weights, masks = loaded.weights_at(self.problem.weights, half)
        torch.save({"weights": weights, "masks": dict(masks)}, sys.argv[4])
        return {"bytes": size / self.problem.numel}


def main() -> None:
    folder, threads, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.path[:0] = [folder, f"{folder}/experiments/benchmarks"]
    torch.set_num_threads(threads)
    obvious, pruners = importlib.import_module("obvious"), importlib.import_module("pruners")
    rounds: dict[str, Rounds] = {}
    for line in sys.stdin:
        kind, name = line.strip().split(" ", 1)
        if name not in rounds:
            rounds.clear()
            rounds[name] = Rounds(obvious, pruners, name, count)
        answer = rounds[name].stored() if kind == "store" else rounds[name].once()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
