"""Whatever happens to a run, it ends with the weights of the undisturbed one, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from driven import SECONDS, Run, driver, ended, same
from training_runs import make_files, make_job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def job(root: Path) -> Path:
    """Four epochs of seven steps, pruning at the first and the third, a checkpoint every three steps."""
    training = {
        "checkpoint_steps": 3,
        "checkpoint_every": 1,
        "augment": {"shift": 1, "flip": 0.5},
        "ema": 0.9,
    }
    fisher = {"gradients": 6, "batch_size": 4, "block_size": 16, "damp": 1e-3}
    content = make_job(
        make_files(root / "files"), training, {"methods": ["ovit"], "fisher": fisher}, method="ovit"
    )
    path = root / "job.json"
    path.write_text(content.model_dump_json())
    return path


@pytest.fixture(scope="module")
def undisturbed(root: Path, job: Path) -> Run:
    with driver(root / "undisturbed", job) as process:
        ended(process)
    run = Run(root / "undisturbed")
    assert [row["epoch"] for row in run.reports] == [1, 2, 3, 4]
    return run


@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        pytest.param("mid-epoch", 1, marks=pytest.mark.long),
        pytest.param("gradients", 0, marks=pytest.mark.long),
        pytest.param("elimination", 1, marks=pytest.mark.long),
        pytest.param("writing", 0, marks=pytest.mark.long),
    ],
)
def test_faults__a_worker_killed(fault: str, rank: int, root: Path, job: Path, undisturbed: Run) -> None:
    folder = root / fault
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


def test_faults__the_driver_killed_and_started_again(root: Path, job: Path, undisturbed: Run) -> None:
    run = Run(root / "driver")
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
def test_faults__the_newest_checkpoint_damaged(harm: str, root: Path, job: Path, undisturbed: Run) -> None:
    """The one before is taken, and it is said which and why."""
    run = Run(root / harm)
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
    reports = [{k: v for k, v in row.items() if k != "notes"} for row in run.reports]
    assert reports == undisturbed.reports
    assert run.files() == undisturbed.files()


@pytest.mark.long
def test_faults__a_disk_that_is_full(root: Path, job: Path, undisturbed: Run) -> None:
    """One clear line; the last good checkpoint is whole, and when there is room the run goes on from it."""
    run = Run(root / "full")
    with driver(run.storage, job, fault="disk full", retries=0) as process:
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert "No space left on device" in output
    assert run.checkpoints
    assert not list(run.storage.rglob("*.partial"))
    with driver(run.storage, job) as process:
        ended(process)
    same(run, undisturbed)
