"""One MLflow server for all commands that log to a folder: who starts it, and when it ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Family
from mlflow import MlflowClient

from orchestration.common.network import reserve
from orchestration.tracking import server as server_module
from orchestration.tracking import tracker as tracker_module
from orchestration.tracking.server import Server, answers, start_server
from orchestration.tracking.tracker import server_for

USER = """
import sys, time
from pathlib import Path
from orchestration.tracking.server import start_server
server = start_server(Path(sys.argv[1]))
server.wait_ready()
print(server.uri, flush=True)
sys.stdin.read()
server.stop()
print("left", flush=True)
"""


def until(reached: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.cluster
def test_server__two_that_start_together_share_a_server_that_outlives_the_first(tmp_path: Path) -> None:
    """In a new folder, where two servers would both make the database; the first is then killed."""
    folder = tmp_path / "mlflow"
    command = [sys.executable, "-c", USER, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    users = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    family = Family(users[0].pid, tmp_path, "none")
    try:
        uris = {user.stdout.readline().strip() for user in users}
        assert len(uris) == 1
        (uri,) = uris
        assert answers(uri, 5.0)
        keepers = [pid for pid, line in everybody().items() if f"{folder}/users" in line]
        assert len(keepers) == 1
        family = Family(keepers[0], tmp_path, "none")
        starter = next(user for user in users if user.pid == parent_of(keepers[0]))
        (other,) = set(users) - {starter}
        starter.kill()
        starter.wait(10)
        time.sleep(1)
        assert answers(uri, 5.0)
        _, error = other.communicate("", timeout=30)
        assert other.returncode == 0, error
        assert not answers(uri, 1.0)
        until(lambda: family.look() == {}, 5.0)
    finally:
        for user in users:
            user.kill()
            user.wait(10)
        family.end()


def keeper_of(folder: Path) -> int:
    (keeper,) = [pid for pid, line in everybody().items() if f"{folder}/users" in line]
    return keeper


@pytest.mark.cluster
def test_server__a_server_whose_keeper_is_killed_is_started_again_at_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "mlflow"
    with server_for(None, folder) as (uri, ready):
        ready()
        old = keeper_of(folder)
        family = Family(old, tmp_path, "none")
        assert len(family.look()) > 1
        os.kill(old, signal.SIGKILL)
        until(lambda: not answers(uri, 1.0))  # what it left is not built upon
        until(lambda: answers(uri, 1.0), 90.0)
        assert keeper_of(folder) != old
        assert family.look() == {}
        family = Family(keeper_of(folder), tmp_path, "none")
        assert len(family.look()) > 1
    assert not answers(uri, 1.0)
    until(lambda: family.look() == {}, 5.0)


@pytest.mark.cluster
def test_server__a_server_whose_keeper_was_killed_ends_with_its_last_user(tmp_path: Path) -> None:
    server = start_server(tmp_path / "mlflow")
    server.wait_ready()
    family = Family(keeper_of(server.folder), tmp_path, "none")
    assert len(family.look()) > 1
    os.kill(keeper_of(server.folder), signal.SIGKILL)
    server.stop()
    assert not answers(server.uri, 1.0)
    until(lambda: family.look() == {}, 5.0)


def everybody() -> dict[int, str]:
    processes = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            processes[int(entry.name)] = line.replace(b"\0", b" ").decode(errors="replace")
    return processes


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def keeper(users: Path, code: str) -> subprocess.Popen[bytes]:
    """The keeper over a server that is a line of Python."""
    command = [sys.executable, "-I", str(server_module._KEEPER), str(users), sys.executable, "-c", code]
    return subprocess.Popen(command, start_new_session=True)


def test_server__a_keeper_ends_with_the_last_lock_on_its_file(tmp_path: Path) -> None:
    users, started = tmp_path / "users", tmp_path / "started"
    locks = [os.open(users, os.O_RDWR | os.O_CREAT) for _ in range(2)]
    for lock in locks:
        fcntl.flock(lock, fcntl.LOCK_SH)
    note = f"open({str(started)!r}, 'a').write(f'{{os.getpid()}}\\n')"
    process = keeper(users, f"import os, time; {note}; time.sleep(60)")
    try:
        until(lambda: started.exists() and started.read_text().count("\n") == 1)
        os.kill(int(started.read_text()), signal.SIGKILL)  # started again
        until(lambda: started.read_text().count("\n") == 2)
        os.close(locks[0])
        time.sleep(1)
        assert process.poll() is None
        server = int(started.read_text().split()[1])
        assert alive(server)
        os.close(locks[1])
        assert process.wait(10) == -signal.SIGKILL  # of its whole group, which is the last thing that it does
        until(lambda: not alive(server), 2.0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_server__what_a_killed_server_leaves_is_ended_before_it_is_started_again(tmp_path: Path) -> None:
    """MLflow's server has a worker of its own, which holds the port."""
    lock = os.open(tmp_path / "users", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)
    started = tmp_path / "started"
    worker = "subprocess.Popen(['sleep', '60'])"
    note = f"open({str(started)!r}, 'a').write(f'{{os.getpid()}} {{worker.pid}}\\n')"
    code = f"import os, subprocess, time; worker = {worker}; {note}; time.sleep(60)"
    process = keeper(tmp_path / "users", code)
    try:
        until(lambda: started.exists() and started.read_text().count("\n") == 1)
        server, its_worker = map(int, started.read_text().split())
        os.kill(server, signal.SIGKILL)
        until(lambda: started.read_text().count("\n") == 2)
        assert not alive(its_worker)
        assert process.poll() is None
        assert all(alive(int(pid)) for pid in started.read_text().split()[2:])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        os.close(lock)


def test_server__a_keeper_that_is_asked_to_end_does_so_at_once(tmp_path: Path) -> None:
    lock = os.open(tmp_path / "users", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as the last user, who keeps others away until it has ended
    started = tmp_path / "started"
    process = keeper(tmp_path / "users", f"import time; open({str(started)!r}, 'w'); time.sleep(60)")
    until(started.exists)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(10) == -signal.SIGKILL
    assert time.monotonic() - began < 4
    os.close(lock)


def test_server__a_server_that_cannot_start_ends_its_keeper_with_its_status(tmp_path: Path) -> None:
    lock = os.open(tmp_path / "users", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)
    assert keeper(tmp_path / "users", "raise SystemExit(7)").wait(10) == 7
    os.close(lock)


def test_server__a_port_that_is_reserved_is_nobody_elses() -> None:
    """Also while nobody listens there yet: two servers would both be told of it."""
    first, lock = reserve(23400)
    second, other = reserve(23400)
    try:
        assert second > first
        os.close(lock)
        third, lock = reserve(23400)
        assert third == first
    finally:
        os.close(lock)
        os.close(other)


@pytest.mark.cluster
def test_server__the_second_in_a_process_uses_the_first_ones(tmp_path: Path) -> None:
    first = start_server(tmp_path)
    second = start_server(tmp_path, 6000)
    assert second.uri == first.uri
    assert (first.shared, second.shared) == (False, True)
    first.wait_ready()
    first.stop()
    assert second.lives()
    second.wait_ready()
    second.stop()
    assert not second.lives()
    with pytest.raises(RuntimeError, match="ended"):
        second.wait_ready()


@pytest.mark.cluster
def test_server__a_server_of_ours_is_on_loopback_and_leaves_no_process(tmp_path: Path) -> None:
    before = set(Family(os.getpid(), tmp_path, "none").look())
    with server_for(None, tmp_path / "mlflow") as (uri, ready):
        ready()
        assert uri.startswith("http://127.0.0.1:")
        assert answers(uri, 1.0)
        assert MlflowClient(uri).search_experiments()
        grown = set(Family(os.getpid(), tmp_path, "none").look()) - before
        assert grown
    assert not answers(uri, 1.0)
    for _ in range(20):
        left = grown & set(Family(os.getpid(), tmp_path, "none").look())
        if not left:
            break
        time.sleep(0.25)
    assert not left
    assert (tmp_path / "mlflow/mlflow.db").is_file()


@pytest.mark.cluster
def test_server__a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Also when that is killed, and can end nothing itself."""
    code = (
        "import sys, time; from pathlib import Path; from orchestration.tracking.server import start_server;"
        f"server = start_server(Path({str(tmp_path)!r}));"
        "server.wait_ready(); print(server.uri, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as starter:
        family = Family(starter.pid, tmp_path, "none")
        try:
            assert starter.stdout is not None
            uri = starter.stdout.readline().strip()
            assert answers(uri, 1.0)
            assert len(family.look()) > 1
            os.kill(starter.pid, signal.SIGKILL)
            deadline = time.monotonic() + 10
            while family.look() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert family.look() == {}
            assert not answers(uri, 1.0)
        finally:
            family.end()


@pytest.mark.cluster
def test_server__a_given_server_is_left_alone(
    running: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object, **options: object) -> Server:
        raise AssertionError("a server was started")

    monkeypatch.setattr(tracker_module, "start_server", start)
    with server_for(running.uri, tmp_path / "mlflow") as (uri, ready):
        ready()
        assert uri == running.uri
    assert answers(uri, 1.0)
    assert not (tmp_path / "mlflow").exists()


@pytest.mark.cluster
def test_server__a_second_server_takes_the_next_port(running: Server, tmp_path: Path) -> None:
    port = int(running.uri.rpartition(":")[2])
    server = start_server(tmp_path, port)
    try:
        assert int(server.uri.rpartition(":")[2]) > port
    finally:
        server.stop()


def test_server__a_server_that_cannot_start_says_so(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    server = start_server(tmp_path)
    try:
        with pytest.raises(RuntimeError, match="ended with status"):
            server.wait_ready()
    finally:
        server.stop()
