"""After the last gradual run of a method: its INT8 form, and its files for engines.

The INT8 model is trained if the recipe asks for it, then written, evaluated and registered. A file for an
engine is written, checked by that engine and logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from orchestration.common.hashing import content_hash, digest
from orchestration.common.units import megabytes
from orchestration.recipe.dotted_keys import flatten
from orchestration.recipe.jobs import aware_job
from orchestration.recipe.schema import Quantization
from orchestration.state.trial_log import TrialLog
from orchestration.sweep import tasks
from orchestration.sweep.artifacts import Exported, Quantized, Recovered
from orchestration.sweep.context import Sweep
from orchestration.sweep.training import run_training
from orchestration.sweep.trial_runs import TrialRuns
from orchestration.tracking import registry
from orchestration.tracking.pyfunc_model import MARK, classes_of, labels_of, model_files
from trainers import storage
from trainers.checkpoint.folder import QUANTIZATION_RECORD
from trainers.deploy.checked import EXPORT_RECORD
from trainers.quantization.int8_folder import ENGINE

ARTIFACT = "int8"


def quantize_phase(sweep: Sweep, method: str, recovered: Recovered) -> Quantized:
    """Make the INT8 form of a method's best model, and register it beside its float parent.

    It is evaluated by ONNX Runtime, which will run it.

    Args:
        sweep: the sweep.
        method: of pruning.
        recovered: the best gradual run of the method.

    Returns:
        The INT8 model.
    """
    sweep = sweep.phase("quantize")
    recipe, settings = sweep.recipe, sweep.recipe.quantize
    assert settings is not None, "only a recipe that asks for INT8 has this phase"
    training = settings.training
    key = digest(
        content_hash(recovered.end.checkpoint),
        settings.model_dump(mode="json", exclude={"recovery"}),
        training and training.model_dump(mode="json"),
        recipe.resources.most if training else None,
        recipe.seed,
        sweep.data_hash,
    )
    name = f"quantize-{method}-{key}"
    log = TrialLog(f"{sweep.root}/{name}/trials.json")
    title, epochs = f"{method}: INT8, {settings.mode}", training.epochs if training else 1
    label = f"{method}-quantize"
    sweep.display.phase(title, done=len(log.ended), epochs=epochs, label=label, log=log.uri)
    known = storage.exists(f"{sweep.root}/{name}/{ARTIFACT}/{QUANTIZATION_RECORD}")
    if not known:
        sweep.begin("quantize", title)
    params = flatten({"quantize": settings.model_dump(mode="json"), "seed": recipe.seed})
    runs = sweep.runs(log, "quantize", params, method, done=known)
    work = _Work(sweep, method, recovered, name, log, runs)
    if not known:
        work.write(settings, work.trained() if training else recovered.end.checkpoint)
    record = storage.read_json(f"{work.target}/{QUANTIZATION_RECORD}")
    version, reached = work.register(record), record["figures"]["val_top1"]
    sweep.display.finished(
        f"{'known, ' if known else ''}{100 * recovered.end.validation:.1f} % → {100 * reached:.1f} % "
        f"on validation, {megabytes(record['bytes'])}, version {version}"
    )
    return Quantized(work.target, reached, record["bytes"], version)


@dataclass(frozen=True)
class _Work:
    """The INT8 phase of a method; ``name`` is the name of its folder."""

    sweep: Sweep
    method: str
    recovered: Recovered
    name: str
    log: TrialLog
    runs: TrialRuns

    @property
    def folder(self) -> str:
        return f"{self.sweep.root}/{self.name}"

    @property
    def target(self) -> str:
        return f"{self.folder}/{ARTIFACT}"

    @property
    def lineage(self) -> dict[str, Any]:
        model = self.sweep.recipe.registered_model
        return {**self.sweep.lineage, "parent_version": f"models:/{model}/{self.recovered.end.version}"}

    def trained(self) -> str:
        """The checkpoint of the training for INT8; an interrupted training resumes."""
        sweep, checkpoint = self.sweep, self.recovered.end.checkpoint
        job = aware_job(sweep.recipe, self.method, sweep.data, checkpoint, self.lineage)
        folder = f"{self.folder}/train"
        best, trained = run_training(sweep, job, self.log, self.runs, folder=folder)
        self.runs.close(best)
        return trained

    def write(self, settings: Quantization, source: str) -> None:
        """Write the INT8 folder of a float checkpoint, by a task of the cluster."""
        sweep = self.sweep
        task, _ = sweep.task(tasks.quantize)
        job = tasks.Int8Job(
            source=source,
            target=self.target,
            mode=settings.mode,
            images=settings.images,
            data=sweep.data,
            seed=sweep.recipe.seed,
            labels=labels_of(sweep.data.train, sweep.data.columns),
            record=self.lineage,
        )
        ray.get(task.remote(job))

    def register(self, record: Mapping[str, Any]) -> str:
        """Log the folder to the phase's run, once, and register it as a version with its own tags."""
        tracker, run = self.sweep.tracker, self.runs.run
        tracker.flush()
        if not tracker.has(run, f"{ARTIFACT}/{QUANTIZATION_RECORD}"):
            with storage.local_copy(self.target) as local:
                tracker.folder(run, local, ARTIFACT)
            figures = {**record["figures"], "bytes": record["bytes"], "zeros": record["zeros"]}
            tracker.metrics(run, {f"int8.{key}": [(0, value)] for key, value in figures.items()})
        if not tracker.has(run, f"{ARTIFACT}/{MARK}"):
            with model_files(classes_of(self.sweep.data.train, self.sweep.data.columns), ENGINE) as files:
                tracker.folder(run, files, ARTIFACT, marks=[MARK])
        tracker.finish(run)
        tracker.flush()
        tags = registry.describe(record) | {
            "espalier.precision": "int8",
            "espalier.quantize": str(record["mode"]),
            "espalier.engine": str(record["engine"]),
        }
        return registry.register(tracker, self.sweep.recipe.registered_model, run, tags, ARTIFACT)


def export_phase(sweep: Sweep, method: str, recovered: Recovered) -> dict[str, Exported]:
    """Write the final model of a method in the formats that the recipe asks for, each as a folder.

    Args:
        sweep: the sweep.
        method: of pruning.
        recovered: the best gradual run of the method.

    Returns:
        The folders, by format.

    Raises:
        CheckError: the answers of an engine differ from the model's; the sweep then fails.
    """
    sweep = sweep.phase("export")
    formats = sweep.recipe.export
    name = f"export-{method}-{digest(content_hash(recovered.end.checkpoint), sweep.data_hash)}"
    folder = f"{sweep.root}/{name}"
    log = TrialLog(f"{folder}/trials.json")
    title = f"{method}: {', '.join(formats)}"
    targets = {kind: f"{folder}/{kind}" for kind in formats}
    records = {kind: f"{target}/{EXPORT_RECORD}" for kind, target in targets.items()}
    missing = [kind for kind in formats if not storage.exists(records[kind])]
    sweep.display.phase(title, done=int(not missing), label=f"{method}-export", log=log.uri)
    if missing:
        sweep.begin("export", title)
    runs = sweep.runs(log, "export", {"export": ",".join(formats)}, method, done=not missing)
    for kind in missing:
        task, _ = sweep.task(tasks.write_engine_file)
        job = tasks.EngineFileJob(
            source=recovered.end.checkpoint,
            target=targets[kind],
            kind=kind,
            data=sweep.data,
            seed=sweep.recipe.seed,
            labels=labels_of(sweep.data.train, sweep.data.columns),
        )
        ray.get(task.remote(job))
    tracker = sweep.tracker
    tracker.flush()
    exported: dict[str, Exported] = {}
    for kind, target in targets.items():
        if not tracker.has(runs.run, f"{kind}/{EXPORT_RECORD}"):
            with storage.local_copy(target) as local:
                tracker.folder(runs.run, local, kind, marks=[EXPORT_RECORD])
        size = sum(storage.size(f"{target}/{file}") for file in storage.read_json(records[kind])["files"])
        exported[kind] = Exported(target, size)
    tracker.finish(runs.run)
    sizes = ", ".join(f"{kind} {megabytes(entry.bytes)}" for kind, entry in exported.items())
    sweep.display.finished(f"{'' if missing else 'known, '}{sizes}, answers as torch's")
    return exported
