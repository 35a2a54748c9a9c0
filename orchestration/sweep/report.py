"""The final table. Test images are used only here, once, for the models that were chosen on validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from rich.table import Table

from orchestration.common.hashing import content_hash, digest
from orchestration.common.terminal import Console
from orchestration.common.units import count, megabytes, percent
from orchestration.sweep import tasks
from orchestration.sweep.artifacts import Results
from orchestration.sweep.context import Sweep
from orchestration.tracking.promotion import Decision
from orchestration.tracking.registry import CHAMPION
from trainers import storage
from trainers.checkpoint.folder import CONFIG, MASKS, PRUNING_RECORD, WEIGHTS
from trainers.deploy.checked import EXPORT_RECORD


@dataclass(frozen=True)
class Row:
    """Figures of a method's model: the final model, or one ``kept`` at a lower sparsity.

    Accuracies are on ``part``, in 0…1. ``parameters`` and ``macs`` are those of the dense model before any
    structured step, ``structured_…`` those after it, if there was one. ``exported`` are the files for
    engines, by format: ``top1`` by that engine, ``bytes``, and the ``folder`` in the storage.
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
    structured: float | None = None
    structured_parameters: int | None = None
    structured_macs: int | None = None
    int8: float | None = None
    int8_bytes: int | None = None
    int8_version: str | None = None
    exported: dict[str, dict[str, Any]] = field(default_factory=dict)


def make_rows(sweep: Sweep, results: Results) -> list[Row]:
    """Measure all models on test (on validation if the data has no test images), each one once."""
    dense, allocated, recovered = results.dense, results.allocated, results.recovered
    part = "test" if sweep.data.test is not None else "validation"
    models = {
        method: {**{float(level): kept for level, kept in best.kept.items()}, best.sparsity: best.end}
        for method, best in recovered.items()
    }
    studies = {method: {} if own is None else own.studies for method, own in allocated.items()}
    structured = results.structured
    checkpoints = [dense.checkpoint] + ([] if structured is None else [structured.checkpoint])
    checkpoints += [study.checkpoint for by_level in studies.values() for study in by_level.values()]
    checkpoints += [model.checkpoint for by_level in models.values() for model in by_level.values()]
    checkpoints += [model.folder for model in results.quantized.values()]
    checkpoints += [entry.folder for kinds in results.exported.values() for entry in kinds.values()]
    top1 = _measure(sweep, checkpoints, part)
    rows = []
    for method, level in ((method, level) for method, by_level in models.items() for level in by_level):
        model, study = models[method][level], studies[method].get(level)
        record = storage.read_json(f"{model.checkpoint}/{PRUNING_RECORD}")
        goal = recovered[method].sparsity
        of_goal = studies[method].get(goal)
        quantized = results.quantized.get(method) if level == goal else None
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
                **_counts(record),
                bytes=sum(storage.size(f"{model.checkpoint}/{name}") for name in (WEIGHTS, MASKS, CONFIG)),
                checkpoint=model.checkpoint,
                run=sweep.tracker.link(recovered[method].record.run_id or sweep.run),
                version=model.version,
                kept=level != goal,
                structured=None if structured is None else top1[structured.checkpoint],
                int8=top1[quantized.folder] if quantized else None,
                int8_bytes=quantized.bytes if quantized else None,
                int8_version=quantized.version if quantized else None,
                exported={
                    kind: {
                        "top1": top1[entry.folder],
                        "bytes": entry.bytes,
                        "folder": entry.folder.removeprefix(f"{sweep.storage}/"),
                    }
                    for kind, entry in (results.exported.get(method, {}) if level == goal else {}).items()
                },
            )
        )
    return rows


def _counts(record: Mapping[str, Any]) -> dict[str, int]:
    """Parameters and MACs of a model, against those of the dense one before any structured step."""
    costs, before = record["costs"], record.get("structured")
    if not before:
        return dict(costs)
    return {
        **costs,
        "parameters": before["dense_parameters"],
        "macs": before["dense_macs"],
        "structured_parameters": costs["parameters"],
        "structured_macs": costs["macs"],
    }


def _measure(sweep: Sweep, checkpoints: Sequence[str], part: str) -> dict[str, float]:
    """Top-1 of each checkpoint; earlier measurements are read from the storage."""
    known = {
        checkpoint: f"{sweep.storage}/figures/{digest(_content(checkpoint), sweep.data_hash, part)}.json"
        for checkpoint in checkpoints
    }
    missing = [checkpoint for checkpoint, file in known.items() if not storage.exists(file)]
    if missing:
        task, device = sweep.task(tasks.measure)
        figures = ray.get(task.remote(missing, sweep.data, part, sweep.recipe.seed, device))
        for checkpoint, figure in zip(missing, figures, strict=True):
            storage.write_json(known[checkpoint], figure)
    return {checkpoint: float(storage.read_json(file)["top1"]) for checkpoint, file in known.items()}


def _content(folder: str) -> str:
    """Hash of the files that decide a folder's answers: a checkpoint, or the files for an engine."""
    if storage.exists(f"{folder}/{EXPORT_RECORD}"):
        return digest(storage.read_json(f"{folder}/{EXPORT_RECORD}")["files"])
    return content_hash(folder)


def table(rows: Sequence[Row]) -> Table:
    """Make the final table of a sweep."""
    part = rows[0].part if rows else "test"
    made = Table(title=f"Top-1 on {part} images (chosen on validation)", title_justify="left")
    made.add_column("method")
    made.add_column("allocation")
    cut = any(row.structured is not None for row in rows)
    accuracies = ("dense", *(("structured",) if cut else ()), "one shot", "recovered")
    for heading in (*accuracies, "sparsity", "parameters", "MACs", "on disk"):
        made.add_column(heading, justify="right")
    has_int8 = any(row.int8 is not None for row in rows)
    for heading in ("INT8", "on disk") if has_int8 else ():
        made.add_column(heading, justify="right")
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.exported))
    for kind in kinds:
        made.add_column(kind, justify="right")
        made.add_column("on disk", justify="right")
    made.add_column("registered")
    for row in rows:
        of_int8 = (percent(row.int8), "" if row.int8_bytes is None else megabytes(row.int8_bytes))
        made.add_row(
            row.method,
            row.allocation,
            percent(row.dense),
            *((percent(row.structured),) if cut else ()),
            percent(row.one_shot),
            percent(row.recovered),
            percent(row.sparsity),
            _steps(row.parameters, row.structured_parameters, row.parameters_sparse),
            _steps(row.macs, row.structured_macs, row.macs_sparse),
            megabytes(row.bytes),
            *(of_int8 if has_int8 else ()),
            *(cell for kind in kinds for cell in _of_engine(row.exported.get(kind))),
            row.version if row.int8_version is None else f"{row.version}, {row.int8_version}",
        )
    return made


def _of_engine(entry: Mapping[str, Any] | None) -> tuple[str, str]:
    return ("", "") if entry is None else (percent(entry["top1"]), megabytes(entry["bytes"]))


def _steps(*counts: int | None) -> str:
    """Format counts as ``2.69 M → 2.25 M → 505 k``."""
    return " → ".join(count(figure) for figure in counts if figure is not None)


def print_end(
    console: Console, sweep: Sweep, rows: Sequence[Row], decisions: Sequence[Decision], recipe_name: str
) -> None:
    """Print the final table, the links, the decisions about the registry's aliases, and the next commands.

    Args:
        console: to print on.
        sweep: the sweep.
        rows: of the table.
        decisions: about the aliases.
        recipe_name: the recipe as it was given, for the next commands.
    """
    console.print(table(rows))
    for row in rows:
        if row.kept:  # the same run as its method's last model
            continue
        console.print(f"{row.method}: {row.run}", highlight=False, soft_wrap=True)
        for kind, entry in row.exported.items():
            folder = f"{sweep.storage}/{entry['folder']}".removeprefix("file://")
            console.print(f"{kind}: {folder}", highlight=False, soft_wrap=True, markup=False)
    for line in (
        *alias_lines(sweep.recipe.registered_model, rows, decisions),
        f"open the UI:       espalier ui --storage {sweep.recipe.storage}"
        if sweep.recipe.tracking.uri is None
        else f"open the UI:       {sweep.tracker.link(sweep.run)}",
        f"run on a cluster:  ray up cluster.yaml, then espalier sweep {recipe_name} --address auto",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def alias_lines(model: str, rows: Sequence[Row], decisions: Sequence[Decision]) -> Iterator[str]:
    """Lines about the registry's aliases: how to load the champion, or why no model of this sweep is it."""
    row_of = {row.version: row for row in rows}
    for decision in decisions:
        row = row_of[decision.candidate.version]
        if decision.refused:
            yield f"{decision.alias}: {decision.why}"
            if decision.alias == CHAMPION:
                forced = f"espalier promote {model} --version {row.version} --force"
                yield f"make it champion:  {forced}"
        elif decision.alias == CHAMPION:
            folder = row.checkpoint.removeprefix("file://")
            yield f"champion: {row.method} (version {row.version}, models:/{model}@{CHAMPION})"
            yield f"load the champion: timm.create_model('local-dir:{folder}', pretrained=True)"
    if all(decision.alias != CHAMPION for decision in decisions):
        yield "champion: none of these, as none is sparse enough (tracking.promotion.sparsity)"
    carried = [
        f"@{decision.alias} version {decision.candidate.version}"
        for decision in decisions
        if not decision.refused
    ]
    if carried:
        yield f"aliases: {', '.join(carried)}"


def as_json(rows: Sequence[Row], root: str) -> list[dict[str, Any]]:
    """The table for MLflow; paths of checkpoints are relative to the storage."""
    return [asdict(row) | {"checkpoint": row.checkpoint.removeprefix(f"{root}/")} for row in rows]
