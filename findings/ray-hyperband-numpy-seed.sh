#!/usr/bin/env bash
# Ray Tune 2.60.0, AsyncHyperBandScheduler with several brackets: which bracket a trial comes into, and so how early it
# may be stopped, is drawn from NumPy's global generator in the driver.
#
# Expected: with proposals and scores fixed the same trials are stopped at the same iterations, as with one bracket; a
# scheduler has no seed that one could forget to set. Seen, iterations of eight trials whose scores are constant, from
# the best to the worst, one at a time:
#
#     1 bracket,  np.random.seed(0)   [9, 1, 1, 1, 1, 1, 1, 1]
#     1 bracket,  np.random.seed(1)   [9, 1, 1, 1, 1, 1, 1, 1]
#     3 brackets, np.random.seed(0)   [9, 9, 1, 1, 1, 1, 1, 3]
#     3 brackets, np.random.seed(1)   [9, 9, 1, 1, 1, 1, 1, 1]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'ray[tune]==2.60.0' numpy==2.4.6
cd "$folder"
RAY_CHDIR_TO_TRIAL_DIR=0 venv/bin/python - 2>/dev/null <<'PYTHON' | grep -E '^(ray |[13] bracket)'
import os
import tempfile

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler


def train(config):
    for _ in range(9):
        tune.report({"score": config["quality"]})


def iterations(seed, brackets):
    np.random.seed(seed)
    scheduler = AsyncHyperBandScheduler(max_t=9, grace_period=1, reduction_factor=3, brackets=brackets)
    results = tune.Tuner(
        train,
        param_space={"quality": tune.grid_search(list(range(9, 1, -1)))},
        tune_config=tune.TuneConfig(
            metric="score", mode="max", max_concurrent_trials=1, reuse_actors=True, scheduler=scheduler
        ),
        run_config=tune.RunConfig(storage_path=tempfile.mkdtemp(dir=os.getcwd()), verbose=0),
    ).fit()
    ranked = sorted(results, key=lambda result: -result.config["quality"])
    return [result.metrics["training_iteration"] for result in ranked]


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(f"ray {ray.__version__}")
seen = {}
for brackets in (1, 3):
    for seed in (0, 1):
        seen[brackets, seed] = iterations(seed, brackets)
        print(f"{brackets} bracket{'s' if brackets > 1 else ''}, np.random.seed({seed}): {seen[brackets, seed]}")
assert seen[1, 0] == seen[1, 1] == [9, 1, 1, 1, 1, 1, 1, 1], "changed"
assert seen[3, 0] == [9, 9, 1, 1, 1, 1, 1, 3], "changed"
assert seen[3, 1] == [9, 9, 1, 1, 1, 1, 1, 1], "changed"
PYTHON
