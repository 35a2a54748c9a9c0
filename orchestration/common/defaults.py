"""Defaults that options, their dataclasses and recipes have in common; without imports, for ``--help``."""

from __future__ import annotations

STORAGE = "runs"  # a folder below the working directory
SEED = 0
BATCH_SIZE = 128  # images of a gradient, and of an evaluation

METHOD = "ovit"  # from here on defaults of ``espalier prune``
PATTERN = "unstructured"
UNFIT = "refuse"
FLOOR, CEILING = 0.0, 1.0

BATCHES = "1,64"  # from here on defaults of ``espalier benchmark``
REPETITIONS = 15
LOSS = "1%"
BENCHMARK_DEVICE = "cpu"
