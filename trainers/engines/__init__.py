"""Inference engines and their latency: one registry, one process for each engine, interleaved timing."""

__all__ = [
    "agreement",
    "interleave",
    "latency",
    "latency_table",
    "machine",
    "process",
    "registry",
    "sparse_linear",
]
