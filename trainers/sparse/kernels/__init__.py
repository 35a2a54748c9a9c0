"""Machine code made for the host: a writer of LLVM's text form, and the kernels that are written with it."""

__all__ = [
    "attention",
    "builder",
    "driver",
    "gather",
    "host",
    "int8",
    "linear",
    "norm",
    "tile",
    "vector_math",
    "window_attention",
]
