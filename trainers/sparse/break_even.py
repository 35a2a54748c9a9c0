"""The break-even: the least sparsity at which the sparse kernel is faster, measured once on a machine."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np

from trainers.cache_folder import cache_folder
from trainers.sparse.engine import LinearLayer
from trainers.sparse.kernels import host
from trainers.sparse.layout import WIDEST
from trainers.sparse.plan import Executor, Weights
from trainers.sparse.program import Level, Linear, Program

VERSION = 2
"""Version of the kernels; raised when their speed changes, so that all machines measure again."""

_OUTPUTS, _INPUTS, _TOKENS = 384, 384, 64
_ROUNDS = 200  # short ones, of which some are not interrupted
_SPARSITIES = (0.25, 0.6)  # the time between the two, and beyond, is nearly a straight line


def measure_break_even() -> float:
    """The share of random zeros at which the dense and the sparse kernel take equally long.

    Both are timed on one thread on a matrix of 384 × 384, in turns; of each the fastest round counts. Takes
    less than a second.

    Returns:
        0 to 1; 1 if no sparsity is faster.
    """
    random = np.random.default_rng(0)
    weight = random.standard_normal((_OUTPUTS, _INPUTS)).astype(np.float32)
    bias, executors = np.zeros(_OUTPUTS, np.float32), []
    for sparsity in (0.0, *_SPARSITIES):
        kept = np.where(random.random(weight.shape) >= sparsity, weight, np.float32(0))
        layer = LinearLayer.of(
            kept, bias, lanes=host.lanes(), widest=WIDEST, sparse_from=0.0 if sparsity else 2.0
        )
        level = Level((1, _TOKENS), (Linear("layer", "x", "y"),))
        buffers = {"x": _INPUTS, "y": _OUTPUTS}
        program = Program(1, 1, _TOKENS, (1, 1), buffers, (), (level,), "y", "token", 1)
        executors.append(Executor(program, Weights({"layer": layer})))
    for executor in executors:
        executor.run(1)
    times = np.full((_ROUNDS, len(executors)), np.inf)
    for row in times:
        for number, executor in enumerate(executors):
            start = time.perf_counter()
            executor.run(1)
            row[number] = time.perf_counter() - start
    dense, first, second = times.min(axis=0)
    return crossing(dense, _SPARSITIES, (first, second))


def crossing(dense: float, sparsities: tuple[float, float], times: tuple[float, float]) -> float:
    """The sparsity at which the line through two points (sparsity, time) meets the dense time.

    Args:
        dense: the dense time.
        sparsities: of the two points.
        times: of the two points, in the same unit.

    Returns:
        0 to 1. If the times do not fall: the second sparsity, or 1 if even that is slower than dense.
    """
    gained = (times[0] - times[1]) / (sparsities[1] - sparsities[0])
    if gained <= 0:
        return 1.0 if times[1] > dense else sparsities[1]
    return float(np.clip(sparsities[0] + (times[0] - dense) / gained, 0, 1))


def break_even(folder: Path | None = None) -> float:
    """The break-even of this machine: from the cache, or measured now and cached.

    Args:
        folder: of the cache (default: ``$ESPALIER_CACHE``, or ``~/.cache/espalier``); where nothing can be
            written, every process measures.
    """
    file = (folder or cache_folder()) / f"sparse-break-even-{VERSION}.json"
    processor = host.processor()
    known: dict[str, float] = {}
    try:
        known = dict(json.loads(file.read_text(encoding="utf-8")))
        return float(known[processor])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or a file that somebody spoilt
    measured = round(measure_break_even(), 3)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps({**known, processor: measured}), encoding="utf-8")
        written.replace(file)
    except OSError:
        pass
    return measured
