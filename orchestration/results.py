"""The last table: test images are read here, once, for the models that validation chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from orchestration import remote
from orchestration.config import digest
from orchestration.context import Allocated, Dense, Recovered, Sweep, content_hash
from trainers import storage
from trainers.checkpoint import CONFIG, MASKS, RECORD, WEIGHTS


@dataclass(frozen=True)
class Row:
    """Figures of a method's model: the one at the end, or one ``kept`` on the way there.

    Accuracies are of ``part``, in 0…1.
    """

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
    kept: bool = False


def make_rows(
    sweep: Sweep,
    dense: Dense,
    allocated: Mapping[str, Allocated | None],
    recovered: Mapping[str, Recovered],
) -> list[Row]:
    """Measure all models on test (validation where the data has no test images), each one once."""
    part = "test" if sweep.data.test is not None else "validation"
    goal = sweep.recipe.pruning.sparsity
    models = {
        method: {**{float(level): one for level, one in found.kept.items()}, goal: found.end}
        for method, found in recovered.items()
    }
    studies = {method: {} if found is None else found.studies for method, found in allocated.items()}
    places = [dense.checkpoint]
    places += [one.checkpoint for some in studies.values() for one in some.values()]
    places += [one.checkpoint for some in models.values() for one in some.values()]
    top1 = _measure(sweep, places, part)
    rows = []
    for method, level in ((method, level) for method, some in models.items() for level in some):
        model, study = models[method][level], studies[method].get(level)
        record = storage.read_json(f"{model.checkpoint}/{RECORD}")
        of_goal = studies[method].get(goal)
        rows.append(
            Row(
                method=method,
                allocation="own" if of_goal is None else of_goal.name,
                part=part,
                dense=top1[dense.checkpoint],
                one_shot=None if study is None else top1[study.checkpoint],
                recovered=top1[model.checkpoint],
                validation=model.validation,
                sparsity=record["sparsity"],
                **record["costs"],
                bytes=sum(storage.size(f"{model.checkpoint}/{name}") for name in (WEIGHTS, MASKS, CONFIG)),
                checkpoint=model.checkpoint,
                run=sweep.tracker.link(recovered[method].record.run_id or sweep.run),
                version=model.version,
                kept=level != goal,
            )
        )
    return rows


def _measure(sweep: Sweep, checkpoints: Sequence[str], part: str) -> dict[str, float]:
    """Top-1 of each checkpoint; what was measured before is read back."""
    known = {
        checkpoint: f"{sweep.storage}/figures/{digest(content_hash(checkpoint), sweep.data_hash, part)}.json"
        for checkpoint in checkpoints
    }
    missing = [checkpoint for checkpoint, place in known.items() if not storage.exists(place)]
    if missing:
        task, device = sweep.task(remote.measure)
        figures = ray.get(task.remote(missing, sweep.data, part, sweep.recipe.seed, device))
        for checkpoint, figure in zip(missing, figures, strict=True):
            storage.write_json(known[checkpoint], figure)
    return {checkpoint: float(storage.read_json(place)["top1"]) for checkpoint, place in known.items()}


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
        if row.kept:  # the same run as its method's last model
            continue
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
