"""A training run under Ray in a process of its own, which tests disturb; and what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import ELSEWHERE, MARK, Family

FAULTS = Path(__file__).parents[1] / "faults"


SECONDS = 240.0


DROPPED = {"seconds", "kept_at"}


@dataclass
class Run:
    """One run of the driver, and what it left."""

    storage: Path

    @property
    def reports(self) -> list[dict[str, Any]]:
        """Of epochs, the last time that each was said."""
        lines = (self.storage / "reports.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        by_epoch = {row["epoch"]: row for row in rows if "epoch" in row}
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
    paths = [str(FAULTS), os.environ.get("PYTHONPATH", "")] if fault else [os.environ.get("PYTHONPATH", "")]
    mark = uuid.uuid4().hex
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ELSEWHERE},
        MARK: mark,
        "PYTHONPATH": os.pathsep.join(place for place in paths if place),
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


def same(run: Run, other: Run) -> None:
    assert run.reports == other.reports
    files, other_files = run.files(), other.files()
    assert sorted(files) == sorted(other_files)
    assert [name for name in files if files[name] != other_files[name]] == []
