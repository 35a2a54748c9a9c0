"""An engine on which zeros save time: machine code made for the host, activations in tiles of tokens.

``packing`` writes a pruned timm vision transformer as a folder (with torch); ``runtime`` runs it (without).
"""

__all__ = [
    "break_even",
    "engine",
    "families",
    "kernels",
    "layout",
    "modules",
    "packing",
    "plan",
    "program",
    "runtime",
    "weights",
    "windows",
]
