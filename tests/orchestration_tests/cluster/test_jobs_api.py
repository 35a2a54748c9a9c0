"""What is submitted as a job: our source as it is, and a recipe that another machine can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.cluster.jobs_api import (
    JOB_RECIPE,
    _for_elsewhere,
    _metadata,
    _packed,
    storage_of,
    submit,
)
from orchestration.recipe.loading import load_recipe

ELSEWHERE = {"ESPALIER_STORAGE": "s3://cluster/espalier", "MLFLOW_TRACKING_URI": "http://10.0.0.1:5000"}


def test_jobs_api__the_package_runs_on_its_own(tmp_path: Path) -> None:
    """As a job runs it: in the package's folder, with nothing of ours on the path."""
    recipe = load_recipe("demo", ["pruning.sparsity=0.5", "recovery.lr.peak=1e-5"])
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = (
        "import orchestration, trainers, pruners, sys; from orchestration.recipe.loading import load_recipe; "
        "recipe = load_recipe('recipe.json'); print(orchestration.__file__); print(recipe.storage); "
        "print(recipe.tracking.uri); print(recipe.pruning.sparsity, recipe.recovery.lr.peak)"
    )
    with _packed(recipe) as folder:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=env | ELSEWHERE,
            capture_output=True,
            text=True,
            check=True,
        )
        listed = [sys.executable, "-m", "orchestration.cli", "recipes"]
        shown = subprocess.run(listed, cwd=folder, env=env, capture_output=True, text=True, check=True)
        size = sum(file.stat().st_size for file in folder.rglob("*"))
        assert not list(folder.rglob("__pycache__/*.pyc")) or size < 20e6
    assert not folder.exists()
    assert done.stdout.splitlines() == [
        f"{folder}/orchestration/__init__.py",
        ELSEWHERE["ESPALIER_STORAGE"],
        ELSEWHERE["MLFLOW_TRACKING_URI"],
        "0.5 1e-05",
    ]
    assert "demo" in shown.stdout
    assert size < 20e6, "Ray takes packages of some megabytes"


def test_jobs_api__a_storage_that_every_node_reaches_goes_along() -> None:
    for storage in ("s3://bucket/runs", "/mnt/espalier"):
        assert _for_elsewhere(load_recipe("demo", [f"storage={storage}"]))["storage"] == storage
    assert "storage" not in _for_elsewhere(load_recipe("demo", ["storage=runs"]))


def job(start: int, **metadata: str) -> SimpleNamespace:
    return SimpleNamespace(start_time=start, metadata=metadata)


def test_jobs_api__a_sweep_is_looked_for_where_its_last_job_put_it() -> None:
    put = "espalier.storage"
    jobs = [
        job(3, espalier="mine", **{put: "/new"}),
        job(1, espalier="mine", **{put: "/old"}),
        job(4, espalier="mine"),
        job(5, espalier="other", **{put: "s3://b"}),
        job(6),
    ]
    client: Any = SimpleNamespace(list_jobs=lambda: jobs)
    assert storage_of(client, "mine") == "/new"
    assert storage_of(client, "other") == storage_of(client, None) == "s3://b"
    assert storage_of(client, "absent") is None


def test_jobs_api__a_job_names_a_storage_that_others_reach_and_no_password() -> None:
    assert _metadata("mine", "/shared") == {"espalier": "mine", "espalier.storage": "/shared"}
    for storage in (None, "runs", "s3://me:hunter2@bucket/runs"):
        assert _metadata("mine", storage) == {"espalier": "mine"}
    assert _metadata(None, "/shared") == {}


@pytest.mark.parametrize(
    "storage", ["s3://bucket/imagenet@2024/runs", "/mnt/me@host/runs", "file:///mnt/me@host/runs"]
)
def test_jobs_api__a_storage_with_an_at_in_its_path_is_that_storage(storage: str) -> None:
    """Only what stands before the host can be a login: the job, and who asks for it, go to the same place."""
    uri = "sqlite:////mnt/me@host/mlflow.db"
    recipe = load_recipe("demo", [f"storage={storage}", f"tracking.uri={uri}"])
    taken: list[dict[str, Any]] = []

    def submit_job(**job: Any) -> str:
        written = Path(job["runtime_env"]["working_dir"], JOB_RECIPE).read_text(encoding="utf-8")
        taken.append({**job, "recipe": json.loads(written)})
        return str(job["submission_id"])

    client: Any = SimpleNamespace(list_jobs=list, submit_job=submit_job)
    submit(client, ["sweep", JOB_RECIPE], sweep="mine", storage=recipe.storage, recipe=recipe)
    (sent,) = taken
    assert (sent["recipe"]["storage"], sent["recipe"]["tracking"]["uri"]) == (storage, uri)
    listed: Any = SimpleNamespace(list_jobs=lambda: [job(1, **sent["metadata"])])
    assert storage_of(listed, "mine") == storage


def test_jobs_api__a_login_stays_here() -> None:
    uri = "https://me:hunter2@mlflow.example"
    tracking = _for_elsewhere(load_recipe("demo", [f"tracking.uri={uri}"]))["tracking"]
    assert tracking["uri"] == "https://mlflow.example"
