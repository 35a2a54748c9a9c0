#!/usr/bin/env bash
# Ray Tune 2.60.0: `TuneConfig(trial_name_creator=...)` is not called as the object that was given. Each trial gets a deep
# copy of it, so an object that remembers the names it has given (to number trials of equal values, say) begins from
# nothing with every trial, and equal trials share a name.
#
# Seen with three trials whose creator counts its own calls:
#
#     without a search algorithm   ['trial-1', 'trial-1', 'trial-1']
#     with a search algorithm      ['trial-1', 'trial-1', 'trial-1']
#     copied as itself             ['trial-1', 'trial-2', 'trial-3']
#
# The last is a creator whose `__deepcopy__` returns itself. A plain function with a counter outside counts as well, as
# functions are not copied.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'ray[tune]==2.60.0'
cd "$folder"
HOME="$folder" venv/bin/python - <<'PYTHON'
import logging

import ray
from ray import tune
from ray.tune.search.searcher import Searcher


class Counting:
    def __init__(self):
        self.count = 0

    def __call__(self, trial):
        self.count += 1
        return f"trial-{self.count}"


class Shared(Counting):
    def __deepcopy__(self, memo):
        return self


class Always(Searcher):
    def suggest(self, trial_id):
        return {"x": 1}

    def on_trial_complete(self, trial_id, result=None, error=False):
        pass

    def save(self, checkpoint_path):
        pass

    def restore(self, checkpoint_path):
        pass


class Names(tune.Callback):
    def __init__(self):
        self.seen = {}

    def on_trial_start(self, iteration, trials, trial, **info):
        self.seen[trial.trial_id] = str(trial)


def work(config):
    tune.report({"score": 1.0})


def names(creator, searcher):
    watch = Names()
    tune.Tuner(
        work,
        param_space=None if searcher else {"x": 1},
        tune_config=tune.TuneConfig(
            search_alg=searcher, num_samples=3, trial_name_creator=creator, metric="score", mode="max"
        ),
        run_config=tune.RunConfig(callbacks=[watch], verbose=0),
    ).fit()
    return sorted(watch.seen.values())


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
plain, searched = names(Counting(), None), names(Counting(), Always(metric="score", mode="max"))
shared = names(Shared(), Always(metric="score", mode="max"))
counter = Counting()
function = names(lambda trial: counter(trial), Always(metric="score", mode="max"))
print(f"ray {ray.__version__}")
print(f"without a search algorithm   {plain}")
print(f"with a search algorithm      {searched}")
print(f"copied as itself             {shared}")
print(f"a function                   {function}")
assert plain == ["trial-1", "trial-1", "trial-1"], "changed"
assert searched == ["trial-1", "trial-1", "trial-1"], "changed"
assert shared == function == ["trial-1", "trial-2", "trial-3"], "changed"
PYTHON
