"""The last table: test images are read here, once, for the models that validation chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from orchestration import remote
from orchestration.config import digest
from orchestration.context import Allocated, Dense, Recovered, Sweep
from orchestration.jobs import threads
from trainers import storage
from trainers.checkpoint import CONFIG, MASKS, RECORD, WEIGHTS


@dataclass(frozen=True)
class Row:
    """A method's figures; accuracies are of ``part``, in 0…1."""

    method: str
    allocation: str
    part: str
    dense: float
    one_shot: float | None
    recovered: float
    validation: float
    sparsity: float
    parameters: int
    parameters_sparse: int
    macs: int
    macs_sparse: int
    bytes: int
    checkpoint: str
    run: str
    version: str


def make_row(
    sweep: Sweep, method: str, dense: Dense, allocated: Allocated | None, recovered: Recovered
) -> Row:
    """Measure the models of a method on test (validation where the data has no test images), once."""
    part = "test" if sweep.data.test is not None else "validation"
    models = [dense.checkpoint, recovered.checkpoint]
    if allocated is not None:
        models.append(allocated.checkpoint)
    measured = [_measure(sweep, model, part) for model in models]
    record = storage.read_json(f"{recovered.checkpoint}/{RECORD}")
    return Row(
        method=method,
        allocation=allocated.name if allocated is not None else "own",
        part=part,
        dense=measured[0],
        recovered=measured[1],
        one_shot=measured[2] if allocated is not None else None,
        validation=recovered.record.metrics["val_top1"],
        sparsity=record["sparsity"],
        **record["costs"],
        bytes=sum(storage.size(f"{recovered.checkpoint}/{name}") for name in (WEIGHTS, MASKS, CONFIG)),
        checkpoint=recovered.checkpoint,
        run=sweep.tracker.link(recovered.record.run_id or sweep.run),
        version=recovered.version,
    )


def _measure(sweep: Sweep, checkpoint: str, part: str) -> float:
    weights = storage.sha256(f"{checkpoint}/{WEIGHTS}")
    known = f"{sweep.storage}/figures/{digest(weights, sweep.data_hash, part)}.json"
    if not storage.exists(known):
        task = ray.remote(remote.measure)
        result = task.remote(checkpoint, sweep.data, part, sweep.recipe.seed, threads(sweep.recipe))
        storage.write_json(known, ray.get(result))
    return float(storage.read_json(known)["top1"])


def table(rows: Sequence[Row]) -> Table:
    """The table that a sweep ends with."""
    part = rows[0].part if rows else "test"
    made = Table(title=f"Top-1 on {part} images (chosen on validation)", title_justify="left")
    made.add_column("method")
    made.add_column("allocation")
    for heading in ("dense", "one shot", "recovered", "sparsity", "parameters", "MACs", "on disk"):
        made.add_column(heading, justify="right")
    made.add_column("registered")
    for row in rows:
        made.add_row(
            row.method,
            row.allocation,
            _percent(row.dense),
            _percent(row.one_shot),
            _percent(row.recovered),
            _percent(row.sparsity),
            f"{_count(row.parameters)} → {_count(row.parameters_sparse)}",
            f"{_count(row.macs)} → {_count(row.macs_sparse)}",
            f"{row.bytes / 1e6:.2f} MB",
            row.version,
        )
    return made


def print_end(console: Console, sweep: Sweep, rows: Sequence[Row], champion: Row, recipe_name: str) -> None:
    """The table, the links, and what to do next."""
    console.print(table(rows))
    for row in rows:
        console.print(f"{row.method}: {row.run}", highlight=False, soft_wrap=True)
    model = sweep.recipe.registered_model
    place = champion.checkpoint.removeprefix("file://")
    lines = (
        f"champion: {champion.method} (version {champion.version}, models:/{model}@champion)",
        f"open the UI:       espalier ui --storage {sweep.recipe.storage}"
        if sweep.recipe.tracking.uri is None
        else f"open the UI:       {sweep.tracker.link(sweep.run)}",
        f"load the champion: timm.create_model('local-dir:{place}', pretrained=True)",
        f"run on a cluster:  ray up cluster.yaml, then espalier sweep {recipe_name} --address auto",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _count(value: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {letter}"
    return str(value)
