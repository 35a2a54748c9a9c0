"""`espalier cluster check`, on two raylets of this machine; what differs between machines, on its pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, espalier

from orchestration.cluster import node_probe
from orchestration.cluster.check import Offer, _differences


@pytest.mark.cluster
def test_check__a_cluster_is_checked(cluster: Any, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    fits = ("check", str(SMALL), "--address", cluster.address, "--storage", str(shared))
    with espalier("cluster", *fits, cwd=tmp_path) as command:
        assert command.wait() == 0, command.err + command.out
        assert "2 nodes of the same versions" in command.out
        assert "small fits" in command.out
        assert command.out.count(" 3.11.") == 2, "a row for each node"
    assert list(shared.iterdir()) == [], "what it wrote is removed"

    (tmp_path / "file").touch()
    wrong = ("resources.cpus_per_worker=2", "resources.workers=1", "tracking.uri=http://127.0.0.1:9")
    option = ("--storage", str(tmp_path / "file" / "below"))
    with espalier("cluster", *fits[:4], *wrong, *option, cwd=tmp_path) as command:
        assert command.wait() == 1, command.err + command.out
        problems = command.out.splitlines()[6:]
        assert len([line for line in problems if "cannot write to the storage" in line]) == 2
        assert len([line for line in problems if "no MLflow server answers there" in line]) == 2
        assert "resources.workers = 1: the nodes hold 0 workers of 2 CPUs and 0 GPUs each" in problems
        assert len(problems) == 5


def test_check__a_node_that_sees_another_storage(tmp_path: Path) -> None:
    own, others = str(tmp_path / "mine"), str(tmp_path / "others")
    assert node_probe.look(own, None, "a")["problems"] == []
    assert node_probe.look(others, None, "b")["problems"] == []
    assert node_probe.see(own, ["a", "b"]) == ["b"]
    (tmp_path / "mine/b").write_text("of another check")
    assert node_probe.see(own, ["a", "b"]) == ["b"]
    assert node_probe.remove(own) is None
    assert not (tmp_path / "mine").exists()


def test_check__other_versions_are_named() -> None:
    head = Offer("1", "10.0.0.1", {}, versions={"ray": "2.60.0", "espalier": "aaaa"})
    same = Offer("2", "10.0.0.2", {}, versions=dict(head.versions))
    other = Offer("3", "10.0.0.3", {}, versions={"ray": "2.60.0", "espalier": "bbbb"})
    silent = Offer("4", "10.0.0.4", {}, problems=["runs no task"])
    assert _differences([head, same, other, silent]) == ["10.0.0.3: espalier bbbb, the head has aaaa"]
    assert _differences([]) == []
