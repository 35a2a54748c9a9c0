"""An engine on which zeros save time: machine code made for the host, activations in tiles of tokens.

``packing`` writes a pruned timm vision transformer as a folder (with torch); ``runtime`` runs it (without)::

    from trainers.sparse import load
    model = load("deit_s_90", threads=2)
    model.predict(["cat.jpg"])
"""

from trainers.sparse.runtime import SparseModel as SparseModel
from trainers.sparse.runtime import load as load

__all__ = [
    "break_even",
    "engine",
    "families",
    "images",
    "kernels",
    "layout",
    "modules",
    "packing",
    "plan",
    "program",
    "runtime",
    "single",
    "weights",
    "windows",
]
