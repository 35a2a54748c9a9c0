"""Compiled loops for CPUs: one Fisher block at a time, which stays in a core's cache.

They compute what the batched formulation in :mod:`pruners.elimination.obs` and
:mod:`pruners.elimination.fisher` computes on GPUs; a test compares the two. There all blocks take each step
together, here each thread works on its own blocks. The loops take PANEL steps at a time, and then bring the
rest of the matrix up to date by one product (:mod:`pruners.elimination.kernels.tiles`).
"""

from pruners.elimination.kernels import eliminate, inverse, steps, sums, threads, tiles

__all__ = [
    "eliminate",
    "inverse",
    "steps",
    "sums",
    "threads",
    "tiles",
]
