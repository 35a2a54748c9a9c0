"""The cluster file: accepted by Ray's own check, and its commands do on a node what they say."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text()
AWS_ONLY = ("provider", "auth", "max_workers", "head_node_type", "available_node_types")
Config = dict[str, Any]

STUB = """#!/bin/sh
if [ "$(basename "$0")" = hostname ]; then echo '10.0.0.5 172.17.0.1'; exit; fi
if [ "$(basename "$0")" = curl ]; then exit 7; fi
{ echo "$(basename "$0") $*"; env; } >> "$HOME/calls-$(basename "$0")"
"""


def aws() -> Config:
    config: Config = yaml.safe_load(TEXT)
    return config


def on_premise() -> Config:
    block = TEXT.split("# --- on-premise ---\n")[1]
    lines = [re.sub(r"^# ?", "", line) for line in block.splitlines()]
    variant: Config = yaml.safe_load("\n".join(lines))
    return {key: value for key, value in aws().items() if key not in AWS_ONLY} | variant


def check(config: Config) -> Config:
    prepared: Config = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def commands(config: Config) -> list[str]:
    return [line for key in config if key.endswith("_commands") for line in config[key]]


def test_cluster_yaml__ray_accepts_both_variants() -> None:
    assert check(aws())["head_node_type"] == "head"
    local = check(on_premise())
    assert local["available_node_types"]["local.cluster.node"]["max_workers"] == 2
    assert local["worker_setup_commands"] == check(aws())["worker_setup_commands"] == aws()["setup_commands"]


def unknown_key(config: Config) -> None:
    config["idle_timeout_minuts"] = 5


def no_resources(config: Config) -> None:
    del config["available_node_types"]["gpu"]["resources"]


def unknown_head(config: Config) -> None:
    config["head_node_type"] = "haed"


def half_a_gpu(config: Config) -> None:
    config["available_node_types"]["gpu"]["resources"]["GPU"] = 0.5


@pytest.mark.parametrize(
    ("mutate", "error", "says"),
    [
        (unknown_key, ValidationError, "idle_timeout_minuts"),
        (no_resources, ValidationError, "'resources' is a required property"),
        (unknown_head, ValueError, "head_node_type"),
        (half_a_gpu, ValidationError, "0.5"),
    ],
)
def test_cluster_yaml__ray_refuses(
    mutate: Callable[[Config], None], error: type[Exception], says: str
) -> None:
    config = aws()
    mutate(config)
    with pytest.raises(error, match=says):
        check(config)


def test_cluster_yaml__gpu_workers_scale_from_none() -> None:
    config = aws()
    assert config["idle_timeout_minutes"] > 0
    workers = [node for name, node in config["available_node_types"].items() if name != "head"]
    assert any(node["resources"].get("GPU", 0) >= 1 for node in workers)
    for node in workers:
        assert 0 == node["min_workers"] < node["max_workers"] <= config["max_workers"]


def test_cluster_yaml__no_secret_and_nothing_open_to_the_world() -> None:
    assert "0.0.0.0" not in TEXT
    assert "--dashboard-host=127.0.0.1" in " ".join(aws()["head_start_ray_commands"])
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|PRIVATE KEY|RAY_AUTH_TOKEN=|(?i:password|secret_access_key)", TEXT
    )
    assert not re.search(r"://[^/\s]+:[^/\s]+@", TEXT), "an address with a password in it"


def test_cluster_yaml__every_node_gets_the_token_and_the_sources() -> None:
    for config in (aws(), on_premise()):
        mounts = config["file_mounts"]
        assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
        metadata = (ROOT / "pyproject.toml").read_text()
        packages = re.search(r"packages = \[([^\]]*)\]", metadata)
        assert packages is not None
        for name in (*re.findall(r'"(\w+)"', packages[1]), "pyproject.toml", "constraints.txt"):
            assert mounts[f"~/espalier/{name}"] == name
        for local in mounts.values():
            assert local.startswith("~") or (ROOT / local).exists(), local


def test_cluster_yaml__commands_are_shell() -> None:
    for line in commands(aws()):
        subprocess.run(["bash", "-n", "-c", line], check=True)


@pytest.fixture
def node(tmp_path: Path) -> Callable[[list[str]], None]:
    """Runs commands as on a fresh node: an empty home, and stubs that write down how they were called."""
    stubs = tmp_path / "espalier-venv" / "bin"
    stubs.mkdir(parents=True)
    for name in ("ray", "mlflow", "hostname", "curl"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    (tmp_path / ".bashrc").touch()
    env = {"HOME": str(tmp_path), "PATH": f"{stubs}:{os.environ['PATH']}"}

    def run(lines: list[str]) -> None:
        for line in lines:
            subprocess.run(["bash", "-c", f"({line})"], env=env, check=True, timeout=30)

    return run


def environment_lines(lines: list[str]) -> list[str]:
    matching = [line for line in lines if "espalier.env" in line]
    assert matching
    return matching


def test_cluster_yaml__worker_starts_with_storage_tracking_and_token_mode(
    node: Callable[[list[str]], None], tmp_path: Path
) -> None:
    config = check(aws())
    node(environment_lines(config["worker_setup_commands"]) * 2)  # a second `ray up` must not pile up
    node([f"export RAY_HEAD_IP=10.0.0.5; {line}" for line in config["worker_start_ray_commands"]])
    calls = (tmp_path / "calls-ray").read_text().splitlines()
    assert "ray start --address=10.0.0.5:6379 --object-manager-port=8076" in calls
    started = calls[calls.index("ray start --address=10.0.0.5:6379 --object-manager-port=8076") :]
    assert "MLFLOW_TRACKING_URI=http://10.0.0.5:5000" in started
    assert "RAY_AUTH_MODE=token" in started
    assert any(line.startswith("ESPALIER_STORAGE=s3://") for line in started)
    assert len((tmp_path / "espalier.env").read_text().splitlines()) == 3
    assert (tmp_path / ".bashrc").read_text() == ". ~/espalier.env\n"


def test_cluster_yaml__head_starts_mlflow_on_its_private_address(
    node: Callable[[list[str]], None], tmp_path: Path
) -> None:
    config = check(aws())
    node(environment_lines(config["head_setup_commands"]))
    node(config["head_start_ray_commands"])
    assert "MLFLOW_TRACKING_URI=http://10.0.0.5:5000" in (tmp_path / "calls-ray").read_text().splitlines()
    log = tmp_path / "calls-mlflow"
    deadline = time.monotonic() + 10
    while not (log.exists() and "\nHOME=" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    call = log.read_text().splitlines()[0]
    assert call.startswith("mlflow server --workers 1 --host 10.0.0.5 --port 5000")
    assert f"sqlite:///{tmp_path}/mlflow.db" in call
    assert re.search(r"--artifacts-destination s3://\S+/mlflow$", call)
