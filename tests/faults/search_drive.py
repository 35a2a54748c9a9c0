"""A search on real Ray Tune in a process of its own: ``search_drive.py FOLDER SAMPLER RULE``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import optuna
from ray import tune

from orchestration.cluster.connect import connect
from orchestration.search.runner import run_search
from orchestration.search.schedulers import stopping
from orchestration.search.spec import Search
from orchestration.state.trial_log import TrialLog, TrialRecord

SPACE = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in ("x", "y", "z")}
TRIALS, LONGEST = 30, 4


class Curve(tune.Trainable):  # type: ignore[misc]
    """Four steps towards what the proposal is worth; curves cross."""

    def setup(self, config: dict[str, float]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, float]) -> bool:
        self._values, self._done = new_config, 0
        return True

    def step(self) -> dict[str, Any]:
        time.sleep(0.05)
        self._done += 1
        values = self._values
        worth = 1 - (values["x"] - 0.2) ** 2 - (values["y"] - 0.7) ** 2
        score = worth - values["z"] ** 2 / self._done
        done = self._done == LONGEST
        return {"score": score, "images": self._done, "complete": done, "done": done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


class Silent:
    """An observer that does not listen."""

    def trial_started(self, *_: Any) -> None: ...
    def trial_reported(self, *_: Any) -> None: ...
    def trial_ended(self, trial_id: str, record: TrialRecord) -> None: ...


if __name__ == "__main__":
    folder, sampler, rule = sys.argv[1:]
    with connect(None):
        search = Search(
            name="curves",
            trainable=tune.with_resources(Curve, {"CPU": 1}),
            space=dict(SPACE),
            trials=TRIALS,
            concurrent=1,
            storage=f"{folder}/tune",
            seed=3,
            sampler=sampler,
            first=[{"x": 0.5, "y": 0.5, "z": 0.5}],
            scheduler=lambda: stopping(rule, "images", 1, 2, LONGEST),
            reuse_actors=True,
            complete=lambda metrics: bool(metrics["complete"]),
        )
        run_search(search, TrialLog(f"{Path(folder)}/trials.json", one_shot=True), Silent())
