"""What a whole sweep leaves in MLflow: runs, series, pictures, checkpoints, versions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sweep_output import METHODS, MODEL, RECIPE, STEPS, all_runs, children, rows, trials_of
from swept import Swept

from orchestration.recipe.dotted_keys import flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

pytestmark = pytest.mark.cluster


def series(client: MlflowClient, entry: Run, key: str) -> list[tuple[int, float]]:
    history = client.get_metric_history(entry.info.run_id, key)
    return sorted((point.step, point.value) for point in history)


def artifacts(client: MlflowClient, entry: Run, folder: str) -> set[str]:
    return {file.path.rpartition("/")[2] for file in client.list_artifacts(entry.info.run_id, folder)}


def test_sweep__runs_are_nested_sweep_phase_trial(swept: Swept, client: MlflowClient) -> None:
    runs = all_runs(client)
    assert {level: len(found) for level, found in runs.items()} == {
        "sweep": 1,
        "phase": 1 + 2 * len(METHODS),
        "trial": 1 + len(METHODS) * (RECIPE.allocation.trials + RECIPE.schedule.trials),
    }
    (sweep,) = runs["sweep"]
    assert {entry.info.run_id for entry in children(client, sweep.info.run_id)} == {
        entry.info.run_id for entry in runs["phase"]
    }
    for phase in runs["phase"]:
        kind, method = phase.data.tags["espalier.phase"], phase.data.tags.get("espalier.method")
        log = swept.logs()[f"{kind}-{method}" if method else kind]
        assert log["run_id"] == phase.info.run_id
        below = children(client, phase.info.run_id)
        assert {entry.info.run_id for entry in below} == {trial["run_id"] for trial in log["trials"]}
        assert {entry.data.tags["espalier.phase"] for entry in below} == {kind}


def test_sweep__every_run_has_ended(client: MlflowClient) -> None:
    for level, entries in all_runs(client).items():
        for entry in entries:
            stopped = entry.data.tags.get("espalier.state") == "stopped"
            expected = "KILLED" if stopped else "FINISHED"
            assert entry.info.status == expected, (level, entry.info.run_name)


def test_sweep__params_are_the_flat_recipe(client: MlflowClient) -> None:
    (sweep,) = all_runs(client)["sweep"]
    content = flatten(RECIPE.model_dump(mode="json", exclude={"storage", "tracking"}))
    assert {key: sweep.data.params.get(key) for key in content} == {
        key: str(value) for key, value in content.items()
    }
    for method in METHODS:
        for entry in trials_of(client, "schedule", method):
            assert entry.data.params["recovery.epochs"] == str(RECIPE.recovery.epochs)
            assert entry.data.params["pruning.sparsity"] == "0.75"
        peaks = {entry.data.params["recovery.lr.peak"] for entry in trials_of(client, "schedule", method)}
        assert len(peaks) == RECIPE.schedule.trials, "every trial shows its own proposal"
        shares = {entry.data.params["stage.0"] for entry in trials_of(client, "allocation", method)}
        assert len(shares) == RECIPE.allocation.trials


def test_sweep__metrics_are_there_for_every_step(client: MlflowClient) -> None:
    assert RECIPE.dense is not None
    (dense,) = trials_of(client, "dense", None)
    assert [step for step, _ in series(client, dense, "train_loss")] == list(
        range(STEPS * RECIPE.dense.epochs)
    )
    for method in METHODS:
        for entry in trials_of(client, "schedule", method):
            epochs = len(series(client, entry, "val_top1"))
            ran = entry.data.tags["espalier.state"] == "finished"
            assert epochs == RECIPE.recovery.epochs if ran else 0 < epochs < RECIPE.recovery.epochs
            assert [step for step, _ in series(client, entry, "train_loss")] == list(range(STEPS * epochs))
            assert [step for step, _ in series(client, entry, "lr")] == list(range(STEPS * epochs))
            sparsity = series(client, entry, "sparsity")
            assert [step for step, _ in sparsity] == [STEPS * (epoch + 1) for epoch in range(epochs)]
            assert sparsity[-1][1] == pytest.approx(0.75, abs=1e-3)
            first = 0.5 if entry.data.params["pruning.schedule.steps"] == "2" else 0.75
            assert sparsity[0][1] == pytest.approx(first, abs=1e-3)
            peak = float(entry.data.params["recovery.lr.peak"])
            assert max(rate for _, rate in series(client, entry, "lr")) == pytest.approx(peak)


def test_sweep__costs_are_there_dense_and_sparse(client: MlflowClient) -> None:
    for method in METHODS:
        for phase in ("allocation", "schedule"):
            for entry in trials_of(client, phase, method):
                metrics = entry.data.metrics
                assert 0 < metrics["parameters_sparse"] < metrics["parameters"]
                assert 0 < metrics["macs_sparse"] < metrics["macs"]


def test_sweep__figures_are_pictures(client: MlflowClient, tmp_path: Path) -> None:
    (sweep,) = all_runs(client)["sweep"]
    expected = {"accuracy_over_sparsity.png": [sweep], "allocations.png": [], "schedule.png": []}
    for phase in all_runs(client)["phase"]:
        if phase.data.tags["espalier.phase"] == "allocation":
            expected["allocations.png"].append(phase)
    for method in METHODS:
        expected["schedule.png"] += trials_of(client, "schedule", method)
    for name, entries in expected.items():
        assert entries
        for entry in entries:
            file = client.download_artifacts(entry.info.run_id, f"figures/{name}", str(tmp_path))
            content = Path(file).read_bytes()
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
            assert len(content) > 5000


def test_sweep__gradual_runs_carry_their_checkpoint(client: MlflowClient) -> None:
    """Those that are registered are MLflow models too."""
    registered = {version.run_id for version in client.search_model_versions(f"name='{MODEL}'")}
    for method in METHODS:
        for entry in trials_of(client, "schedule", method):
            files = artifacts(client, entry, "checkpoint")
            whole = {"config.json", "model.safetensors", "masks.safetensors", "pruning.json"}
            assert files >= whole if entry.data.tags["espalier.state"] == "finished" else not files
            added = files - whole
            assert {"MLmodel", "served_model.py"} <= added if entry.info.run_id in registered else not added


def test_sweep__both_methods_are_registered_and_the_better_one_is_champion(
    swept: Swept, client: MlflowClient
) -> None:
    versions = {
        version.tags["method"]: version for version in client.search_model_versions(f"name='{MODEL}'")
    }
    assert set(versions) == set(METHODS)
    scores = {}
    for method in METHODS:
        trials = swept.logs()[f"schedule-{method}"]["trials"]
        best = max((trial for trial in trials if trial["state"] == "finished"), key=lambda t: t["score"])
        assert versions[method].run_id == best["run_id"]
        assert rows(swept.command.out)[method][9] == versions[method].version
        scores[method] = best["score"]
    champion = client.get_model_version_by_alias(MODEL, "champion")
    assert champion.tags["method"] == max(scores, key=lambda method: scores[method])
