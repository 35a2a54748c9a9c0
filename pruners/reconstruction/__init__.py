"""What is kept is solved again: each pruned layer answers on real images as nearly as it can as before."""

__all__ = ["least_squares", "lockstep", "reconstruct"]
