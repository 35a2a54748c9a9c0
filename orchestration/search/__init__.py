"""Searches with Ray Tune and Optuna: space, samplers, schedulers, trials."""

__all__ = [
    "limits",
    "one_shot_trial",
    "pareto",
    "pbt",
    "pbt_trial",
    "runner",
    "samplers",
    "schedulers",
    "space",
    "spec",
    "standing_workers",
    "training_trial",
]
