"""What is kept is solved again: each pruned layer answers on real images as nearly as it can as before."""

from __future__ import annotations

from pruners.reconstruction.reconstruct import Reconstruction, reconstruct

__all__ = ["Reconstruction", "reconstruct"]
