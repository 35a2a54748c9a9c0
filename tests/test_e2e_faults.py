"""Whatever happens to a run, it ends with the weights of the undisturbed one, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import ELSEWHERE, MARK, Family
from training_runs import make_files, make_job

FAULTS = Path(__file__).parent / "faults"
SECONDS = 240.0
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
DROPPED = {"seconds", "kept_at"}


@dataclass
class Run:
    """One run of the driver, and what it left."""

    storage: Path

    @property
    def reports(self) -> list[dict[str, Any]]:
        """Of epochs, the last time that each was said."""
        lines = (self.storage / "reports.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        by_epoch = {row["epoch"]: row for row in found if "epoch" in row}
        return [{k: v for k, v in by_epoch[epoch].items() if k not in DROPPED} for epoch in sorted(by_epoch)]

    @property
    def checkpoints(self) -> list[Path]:
        return sorted(path for path in (self.storage / "run").glob("checkpoint_*") if path.is_dir())

    @property
    def known(self) -> list[str]:
        """Names of the checkpoints that Ray has taken down, oldest first."""
        try:
            state = json.loads((self.storage / "run" / "checkpoint_manager_snapshot.json").read_text())
        except (FileNotFoundError, ValueError):  # not there yet, or not whole
            return []
        return sorted(one["checkpoint_dir_name"] for one in state["checkpoint_results"])

    def files(self) -> dict[str, bytes]:
        """The last checkpoint and the best model."""
        last = self.checkpoints[-1]
        kept = self.storage / "run" / "kept" / "0.7"
        return {
            f"{folder.name if folder is kept else 'last'}/{path.name}": path.read_bytes()
            for folder in (last, kept)
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        }


@contextmanager
def driver(
    folder: Path, job: Path, *, fault: str = "", rank: int = 0, retries: int = 1
) -> Iterator[subprocess.Popen[str]]:
    """Start a run; whatever of it is left is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    places = [str(FAULTS), os.environ.get("PYTHONPATH", "")] if fault else [os.environ.get("PYTHONPATH", "")]
    mark = uuid.uuid4().hex
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ELSEWHERE},
        MARK: mark,
        "PYTHONPATH": os.pathsep.join(place for place in places if place),
        "ESPALIER_FAULT": f"{fault}:{rank}:{folder / 'struck'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(FAULTS / "drive.py"), str(job), str(folder), "2", str(retries)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    family = Family(process.pid, folder, mark)
    try:
        yield process
    finally:
        family.look()
        family.end()
        process.wait(20)


def ended(process: subprocess.Popen[str]) -> str:
    """Its output, when it has ended well."""
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def job(place: Path) -> Path:
    """Four epochs of seven steps, pruning at the first and the third, a checkpoint every three steps."""
    training = {
        "checkpoint_steps": 3,
        "checkpoint_every": 1,
        "augment": {"shift": 1, "flip": 0.5},
        "ema": 0.9,
    }
    fisher = {"gradients": 6, "batch_size": 4, "block_size": 16, "damp": 1e-3}
    content = make_job(
        make_files(place / "files"), training, {"methods": ["ovit"], "fisher": fisher}, method="ovit"
    )
    path = place / "job.json"
    path.write_text(content.model_dump_json())
    return path


@pytest.fixture(scope="module")
def undisturbed(place: Path, job: Path) -> Run:
    with driver(place / "undisturbed", job) as process:
        ended(process)
    run = Run(place / "undisturbed")
    assert [row["epoch"] for row in run.reports] == [1, 2, 3, 4]
    return run


def same(run: Run, other: Run) -> None:
    assert run.reports == other.reports
    one, two = run.files(), other.files()
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        pytest.param("mid-epoch", 1, marks=pytest.mark.long),
        pytest.param("gradients", 0, marks=pytest.mark.long),
        pytest.param("elimination", 1, marks=pytest.mark.long),
        pytest.param("writing", 0, marks=pytest.mark.long),
    ],
)
def test_a_worker_killed(fault: str, rank: int, place: Path, job: Path, undisturbed: Run) -> None:
    folder = place / fault
    with driver(folder, job, fault=fault, rank=rank) as process:
        ended(process)
    assert (folder / "struck").is_dir(), "the fault did not happen"
    same(Run(folder), undisturbed)


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_driver_killed_and_started_again(place: Path, job: Path, undisturbed: Run) -> None:
    run = Run(place / "driver")
    with driver(run.storage, job) as process:
        until(lambda: len(run.known) > 1, process)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    before = {path.name for path in run.checkpoints}
    assert before
    with driver(run.storage, job) as process:
        ended(process)
    same(run, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("harm", ["a byte flipped", "truncated"])
def test_the_newest_checkpoint_damaged(harm: str, place: Path, job: Path, undisturbed: Run) -> None:
    """The one before is taken, and it is said which and why."""
    run = Run(place / harm)
    with driver(run.storage, job) as process:
        until(lambda: len(run.known) > 1, process)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    newest = run.storage / "run" / run.known[-1]
    file = newest / "trainer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if harm == "a byte flipped" else content[:-100])
    known = len((run.storage / "reports.jsonl").read_text().splitlines())
    with driver(run.storage, job) as process:
        ended(process)
    rows = [json.loads(line) for line in (run.storage / "reports.jsonl").read_text().splitlines()[known:]]
    notes = [note for row in rows for note in row.pop("notes", [])]
    assert notes == [f"checkpoint {newest.name} is left aside: trainer.safetensors is not as it was written"]
    found = [{k: v for k, v in row.items() if k != "notes"} for row in run.reports]
    assert found == undisturbed.reports
    assert run.files() == undisturbed.files()


@pytest.mark.long
def test_a_disk_that_is_full(place: Path, job: Path, undisturbed: Run) -> None:
    """One clear line; the last good checkpoint is whole, and when there is room the run goes on from it."""
    run = Run(place / "full")
    with driver(run.storage, job, fault="disk full", retries=0) as process:
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert "No space left on device" in output
    assert run.checkpoints
    assert not list(run.storage.rglob("*.partial"))
    with driver(run.storage, job) as process:
        ended(process)
    same(run, undisturbed)
