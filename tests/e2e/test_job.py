"""A sweep from a laptop, as a job on a cluster that asks for a token: submitted, left, stopped, resumed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ESPALIER, SMALL, Family, espalier

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(3600)]

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-this-test-alone-0123456789"}
# Two processors on one node. Other clusters of this machine are kept apart: a job finds its own through the
# folder, and the port that Ray gives to every agent may be taken.
HEAD = """
import signal, sys, tempfile
from pathlib import Path
from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster
from orchestration.common.network import LOOPBACK, free_port
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
port = free_port(8365)
node = {"num_cpus": 2, "include_dashboard": True, "dashboard_host": LOOPBACK, "dashboard_port": port}
with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
    node |= {"dashboard_agent_listen_port": 0, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        write_ray_address(cluster.address, folder)
        Path(sys.argv[1]).write_text(f"{LOOPBACK}:{port}")
        signal.pause()
    finally:
        cluster.shutdown()
"""
SECONDS = 1200.0


@pytest.fixture
def jobs_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """``http://…`` of a cluster that a process of its own holds."""
    import os
    import subprocess
    import time

    for name, value in TOKEN.items():
        monkeypatch.setenv(name, value)
    path = f"{ESPALIER.parent}:{os.environ['PATH']}"  # a node finds python where espalier is installed
    address_file = tmp_path / "head"
    head = subprocess.Popen([sys.executable, "-c", HEAD, str(address_file)], env={**os.environ, "PATH": path})
    family = Family(head.pid, tmp_path / "no folder", "none")
    try:
        deadline = time.monotonic() + 300
        while not (address_file.exists() and address_file.read_text()):
            assert head.poll() is None, "the head did not start"
            assert time.monotonic() < deadline
            family.look()
            time.sleep(0.5)
        yield f"http://{address_file.read_text()}"
    finally:
        family.look()
        head.terminate()
        head.wait(60)
        family.end()


def state_of(shared: Path) -> dict[str, object]:
    file = shared / "sweeps/small/state.json"
    state: dict[str, object] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return state


def ask(cwd: Path, *arguments: str, status: int = 0) -> str:
    """What a command prints, which must end with the status."""
    with espalier(*arguments, cwd=cwd) as command:
        assert command.wait(SECONDS) == status, command.err + command.out
        assert "Traceback" not in command.err
        return command.out + command.err


def test_job__a_sweep_is_submitted_left_stopped_and_resumed(jobs_api: str, tmp_path: Path) -> None:
    laptop, another, shared = tmp_path / "laptop", tmp_path / "another laptop", tmp_path / "shared"
    laptop.mkdir()
    another.mkdir()  # a command that ends here takes with it whatever works in its folder
    address = ("--address", jobs_api)
    overrides = ("pruning.methods=[dimap]", "allocation.trials=2", "schedule.trials=1", "dense.epochs=1")
    sweep = ("sweep", str(SMALL), *overrides, f"storage={shared}", *address)

    with espalier("status", *address, cwd=laptop, RAY_AUTH_TOKEN="another-token-0123456789") as wrong:
        assert wrong.wait() == 2, wrong.err
        assert "token" in wrong.err
        assert len(wrong.err.splitlines()) == 1
    refusal = ask(laptop, "sweep", str(SMALL), *address, status=2)
    assert "storage = 'runs': for a job, must be a full path or URI" in refusal

    assert "submitted as job espalier-small-2" in ask(laptop, *sweep, "--detach")
    assert "job espalier-small-2 is at work on it" in ask(laptop, *sweep, status=2)

    with espalier("attach", "small", *address, cwd=laptop) as attached:
        attached.until(lambda: "dimap: gradual pruning" in attached.out, SECONDS, "the gradual run")
        assert "dimap: allocation search" in ask(another, "status", *address, "--storage", str(shared))
        stopped = ask(another, "stop", "small", *address)  # as its submission said
        assert "small: interrupted; to go on: espalier resume small" in stopped
        assert attached.wait(120) == 130, attached.out
        assert "interrupted; finished trials are kept" in attached.out
    assert state_of(shared)["state"] == "interrupted"
    assert not list(laptop.glob("runs*")), "nothing is written here"

    with espalier("resume", "small", *address, cwd=laptop) as resumed:
        assert resumed.wait(SECONDS) == 0, resumed.err + resumed.out
    assert "submitted as job espalier-small-3" in resumed.err
    assert "dimap: allocation search, 2 of 2 trials known" in resumed.out
    assert "champion: dimap" in resumed.out
    assert state_of(shared)["state"] == "finished"
    (recovered,) = shared.glob("sweeps/small/schedule-dimap-*/recovered")
    assert json.loads((recovered / "pruning.json").read_text(encoding="utf-8"))["method"] == "dimap"
