"""Small training runs that several test files share: a job on real Parquet files, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from image_tables import VIT, VIT_ARGS, dense_folder, table, write

from trainers.config.jobs import TrainJob
from trainers.loop.gradual import Progress, run

CPU = torch.device("cpu")


def make_files(folder: Path, images: int = 50) -> dict[str, str]:
    """Training and validation images of three classes, and a dense model."""
    return {
        "train": write(folder / "train.parquet", table([i % 3 for i in range(images)])),
        "validation": write(folder / "validation.parquet", table([i % 3 for i in range(15)], first=100)),
        "dense": str(dense_folder(folder / "dense")),
    }


def make_job(
    files: Mapping[str, str],
    training: Mapping[str, Any],
    pruning: Mapping[str, Any] | None = None,
    **changes: Any,
) -> TrainJob:
    """Gradual pruning of the dense model (to 70 % in steps at epochs 0 and 2 of 4), or dense training."""
    model = {"checkpoint": files["dense"], "classes": 3}
    if pruning is None:
        model = {"architecture": VIT, "args": VIT_ARGS, "classes": 3}  # type: ignore[dict-item]
    schedule = {"start": 0.5, "steps": 2, "last_at": 0.5}
    content = {
        "name": "tiny",
        "seed": 4,
        "model": model,
        "data": {key: files[key] for key in ("train", "validation")},
        "training": {"epochs": 4, "batch_size": 8, "lr": {"kind": "cyclic", "peak": 2e-3}, **training},
        "pruning": None
        if pruning is None
        else {"methods": ["dimap"], "sparsity": 0.7, "schedule": schedule, **pruning},
        "method": None if pruning is None else "dimap",
    }
    return TrainJob.model_validate(content | changes)


@dataclass
class Log:
    """A report that keeps metrics and checkpoint folders, those within epochs too, by their steps."""

    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    saved: dict[int, Path] = field(default_factory=dict)

    def __call__(self, progress: Progress) -> None:
        if "epoch" in progress.metrics:
            self.metrics.append(dict(progress.metrics))
        if progress.save is not None:
            step = int(progress.metrics["step"])
            self.saved[step] = self.folder / f"step-{step}"
            progress.save(self.saved[step])

    @property
    def last(self) -> Path:
        return self.saved[max(self.saved)]


def same_files(left: Path, right: Path) -> list[str]:
    """Names of the files that differ between two folders."""
    names = {path.name for folder in (left, right) for path in folder.iterdir()}
    return sorted(
        name
        for name in names
        if not (left / name).exists()
        or not (right / name).exists()
        or (left / name).read_bytes() != (right / name).read_bytes()
    )


def train_as_worker(
    rank: int, world: int, folder: str, job: dict[str, Any], resume: str | None = None
) -> None:
    """One of several processes that train together; each saves what it was told."""
    torch.set_num_threads(1)
    Path(folder).mkdir(exist_ok=True)
    meet = f"file://{folder}/meet-{world}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    log = Log(Path(folder) / f"workers-{world}-{rank}")
    try:
        run(TrainJob.model_validate(job), log, CPU, None if resume is None else Path(resume))
    finally:
        dist.destroy_process_group()
    (Path(folder) / f"metrics-{world}-{rank}.json").write_text(json.dumps(log.metrics))
