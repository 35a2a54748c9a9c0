"""A driver for the tests of faults: one Ray Train run on a cluster of this machine, its reports in a file.

python drive.py JOB.json STORAGE WORKERS RETRIES

WORKERS is a number (of half a processor each), or MIN-MAX (a whole one each); RAY_ADDRESS is joined if set.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from orchestration.cluster.connect import connect
from orchestration.recipe.schema import Resources
from orchestration.search.standing_workers import WorkerPool
from orchestration.search.training_trial import train_run
from trainers.config.jobs import TrainJob


class Reports(UserCallback):
    """Appends what the first worker reports."""

    def __init__(self, path: str) -> None:
        self._path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with Path(self._path).open("a") as file:
            file.write(json.dumps(metrics[0]) + "\n")


def main() -> None:
    job, storage, workers, retries = sys.argv[1:]
    least, _, most = workers.partition("-")
    resources = Resources.model_validate(
        {
            "workers": {"min": int(least), "max": int(most)} if most else int(least),
            "cpus_per_worker": 1.0 if most else 0.5,
            "retries": int(retries),
        }
    )
    with connect(None):
        reports = Reports(f"{storage}/reports.jsonl")
        content = TrainJob.model_validate_json(Path(job).read_text())
        train_run(content, resources, storage, "run", reports, pool=WorkerPool()).fit()


if __name__ == "__main__":
    main()
