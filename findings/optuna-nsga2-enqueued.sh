#!/usr/bin/env bash
# Optuna 5.0.0, NSGAIISampler: a trial that is enqueued with ALL its parameters is given no generation, so it is never a
# parent and does not count towards the population; enqueued with SOME of them it is an individual like any other.
#
# Expected by who seeds a search with known good points (as add_trial or enqueue_trial are used with other samplers):
# the seeds are the first generation, and the next is bred from them. Seen, with a population of 4, four trials
# enqueued and eight run:
#
#     all parameters enqueued   [None, None, None, None, 0, 0, 0, 0]
#     one of two enqueued       [0, 0, 0, 0, 1, 1, 1, 1]
#
# With fixed parameters alone there is nothing to sample relatively, and it is relative sampling that assigns generations.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check optuna==5.0.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)


def generations(names):
    sampler = optuna.samplers.NSGAIISampler(population_size=4, seed=0)
    study = optuna.create_study(sampler=sampler, directions=["minimize", "minimize"])
    for number in range(4):
        study.enqueue_trial({name: number / 4 for name in names})
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)), n_trials=8)
    return [trial.system_attrs.get("NSGAIISampler:generation") for trial in study.trials]


everything, some = generations(["x", "y"]), generations(["x"])
print(f"optuna {optuna.__version__}")
print(f"all parameters enqueued   {everything}")
print(f"one of two enqueued       {some}")
assert everything == [None] * 4 + [0] * 4, "changed"
assert some == [0] * 4 + [1] * 4, "changed"
PYTHON
