"""What a sweep registers, used by others: MLflow alone loads and serves it, and says where it comes from."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from commands import ELSEWHERE, SMALL, run
from PIL import Image
from swept import Swept

from orchestration.common.hashing import content_hash, digest
from orchestration.common.network import free_port
from orchestration.recipe.loading import load_recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

pytestmark = pytest.mark.cluster

MODEL = "espalier-small"
CHAMPION = f"models:/{MODEL}@champion"
RECIPE = load_recipe(str(SMALL))
BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "orchestration", "trainers", "pruners", "experiments"}:
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
"""
PREDICT = """
import json, sys
from pathlib import Path
for name in ("ray", "orchestration"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported")
import mlflow, pandas
pictures = [Path(name).read_bytes() for name in sys.argv[2:]]
found = mlflow.pyfunc.load_model(sys.argv[1]).predict(pandas.DataFrame({"image": pictures}))
print(json.dumps(found.to_dict("records")))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, mlflow_uri: str) -> dict[str, Any]:
    """Options of a process that has MLflow and timm, and neither Ray nor espalier."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(BLOCK)
    kept = {key: value for key, value in os.environ.items() if key not in (*ELSEWHERE, "PYTHONPATH")}
    ours = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # MLflow starts uvicorn by its name
        "PYTHONPATH": str(folder / "site"),
        "MLFLOW_TRACKING_URI": mlflow_uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return {"cwd": folder, "env": kept | ours}


@pytest.fixture(scope="module")
def pictures(swept: Swept) -> list[bytes]:
    rows = pq.read_table(swept.storage / "data/digits/test.parquet").slice(0, 3).to_pylist()
    return [row["image"]["bytes"] for row in rows]


@pytest.fixture(scope="module")
def expected(
    client: MlflowClient, pictures: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> list[list[float]]:
    """Shares of the classes by plain timm, from the artifact as MLflow hands it out."""
    version = client.get_model_version_by_alias(MODEL, "champion")
    folder = client.download_artifacts(version.run_id, "checkpoint", str(tmp_path_factory.mktemp("timm")))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images = [transform(Image.open(io.BytesIO(content)).convert("RGB")) for content in pictures]
    with torch.no_grad():
        shares: list[list[float]] = model(torch.stack(images)).softmax(1).tolist()
    return shares


def check(answers: list[dict[str, Any]], expected: list[list[float]]) -> None:
    assert len(answers) == len(expected)
    for answer, shares in zip(answers, expected, strict=True):
        assert answer["probabilities"] == pytest.approx(shares, abs=1e-5)
        assert answer["class"] == max(range(len(shares)), key=shares.__getitem__)
        assert answer["label"] is None


def test_registry__mlflow_alone_predicts(
    elsewhere: dict[str, Any], pictures: list[bytes], expected: list[list[float]], tmp_path: Path
) -> None:
    names = [str(tmp_path / f"{number}.png") for number in range(len(pictures))]
    for name, content in zip(names, pictures, strict=True):
        Path(name).write_bytes(content)
    command = [sys.executable, "-c", PREDICT, CHAMPION, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **elsewhere)
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout.splitlines()[-1]), expected)


@pytest.mark.long
def test_registry__mlflow_alone_serves(
    elsewhere: dict[str, Any], pictures: list[bytes], expected: list[list[float]], tmp_path: Path
) -> None:
    port = free_port(5100)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", CHAMPION]
    command += ["--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    log = tmp_path / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True, **elsewhere
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 300
        while not _pings(url):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        encoded = [base64.b64encode(content).decode() for content in pictures]
        for body in (
            {"dataframe_records": [{"image": one} for one in encoded]},
            {"dataframe_split": {"columns": ["image"], "data": [[one] for one in encoded]}},
        ):
            check(_post(f"{url}/invocations", body)["predictions"], expected)
    finally:
        server.terminate()  # what it started ends with it
        server.wait(30)
        deadline = time.monotonic() + 30
        while _pings(url) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not _pings(url)


def _pings(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ping", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _post(url: str, body: object) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


# lineage


def versions(client: MlflowClient) -> list[ModelVersion]:
    return list(client.search_model_versions(f"name='{MODEL}'"))


def test_registry__every_version_leads_back(swept: Swept, client: MlflowClient, tmp_path: Path) -> None:
    (dense,) = swept.storage.glob("dense/*/model")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=swept.folder, capture_output=True, text=True, check=False
    )
    registered = versions(client)
    assert {version.tags["method"] for version in registered} == {"dimap", "ovit"}
    for version in registered:
        tags = version.tags
        assert tags["dense"] == content_hash(str(dense))
        assert tags["sparsity"] == "0.7500"
        assert tags["sweep"] == "small"
        assert tags.get("git_commit") == (commit.stdout.strip() or None)
        assert "parent" not in tags
        phase = client.get_run(version.run_id).data.tags["mlflow.parentRunId"]
        sweep = client.get_run(client.get_run(phase).data.tags["mlflow.parentRunId"])
        assert sweep.data.tags["espalier.data"] == tags["data"]
        file = client.download_artifacts(sweep.info.run_id, "recipe.yaml", str(tmp_path))
        recipe = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        assert digest(recipe) == tags["recipe"]
        assert recipe == RECIPE.model_dump(mode="json", exclude={"storage", "tracking"})


def test_registry__aliases_are_set(client: MlflowClient) -> None:
    tops = {version.version: float(version.tags["validation_top1"]) for version in versions(client)}
    aliases = {alias: str(number) for alias, number in client.get_registered_model(MODEL).aliases.items()}
    assert set(aliases) == {"champion", "sparsity-75"}
    assert {tops[number] for number in aliases.values()} == {max(tops.values())}
    assert client.get_registered_model(MODEL).tags["promotion.sparsity"] == "0.75"


def test_registry__no_weight_is_stored_twice(client: MlflowClient) -> None:
    for version in versions(client):
        files = [file.path for file in client.list_artifacts(version.run_id, "checkpoint")]
        assert [file for file in files if file.endswith(".safetensors")] == [
            "checkpoint/masks.safetensors",
            "checkpoint/model.safetensors",
        ]
        assert not [file for file in files if re.search(r"\.(pkl|pickle|pt|pth|bin)$", file)]


def test_registry__no_place_of_this_machine_is_in_mlflow(swept: Swept, client: MlflowClient) -> None:
    """Tags, params and artifacts hold no path of the storage, nor of this repository."""
    paths = (str(swept.folder), str(Path(__file__).parents[2]))
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    for entry in client.search_runs(ids, max_results=1000):
        for values in (entry.data.tags, entry.data.params):
            kept = {key: value for key, value in values.items() if not key.startswith("mlflow.source")}
            assert not [key for key, value in kept.items() if any(place in value for place in paths)]
    artifacts = swept.storage / "mlflow/artifacts"
    files = [path for path in artifacts.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert len(files) > 10
    for file in files:
        assert not any(place.encode() in file.read_bytes() for place in paths), file


@pytest.mark.long
def test_registry__a_version_becomes_the_dense_model_of_the_next_sweep(
    client: MlflowClient, mlflow_uri: str, tmp_path: Path
) -> None:
    """By its alias; the new version names it as its parent, and the chain is told."""
    before = client.get_model_version_by_alias(MODEL, "champion")
    recipe = {
        "model": {"checkpoint": CHAMPION, "classes": 10},
        "data": {"source": "digits"},
        "pruning": {"methods": ["dimap"], "sparsity": 0.8, "schedule": {"kind": "one_shot"}},
        "recovery": {"epochs": 1},
        "allocation": {"trials": 0},
        "tracking": {"uri": mlflow_uri},
    }
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe))
    again = run("sweep", "again.yaml", cwd=tmp_path)
    assert re.search(r"^champion: dimap \(version 1, models:/espalier-again@champion\)$", again.out, re.M)
    (version,) = client.search_model_versions("name='espalier-again'")
    assert version.tags["parent"] == f"models:/{MODEL}/{before.version}"
    lineage = run("lineage", "models:/espalier-again@sparsity-80", "--tracking-uri", mlflow_uri, cwd=tmp_path)
    heads = [line for line in lineage.out.splitlines() if not line.startswith(" ")]
    assert heads == [
        "models:/espalier-again/1  @champion, @sparsity-80",
        f"models:/{MODEL}/{before.version}  @champion, @sparsity-75",
    ]
    assert (
        f"dense       {version.tags['dense']}\n  parent      models:/{MODEL}/{before.version}" in lineage.out
    )
