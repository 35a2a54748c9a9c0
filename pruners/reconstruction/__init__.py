"""Reconstruction: solve the kept weights of each pruned layer by least squares on real images."""

__all__ = ["least_squares", "lockstep", "reconstruct"]
