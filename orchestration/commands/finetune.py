"""``espalier finetune``: trains by :mod:`trainers.loop.gradual` with a schedule that prunes nothing more.

Until the result is complete, a hidden folder lies beside it: ``start`` is the checkpoint with its new
classifier, ``last`` the state from which an interrupted run resumes, ``kept`` the best model so far.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from filelock import FileLock, Timeout
from torch import nn

from orchestration.commands.model_source import (
    Patterns,
    check_images,
    device_for,
    is_file,
    layers_of,
    load,
    recorded_patterns,
    resolved,
)
from orchestration.commands.output import enough_memory, free_folder, whole_folder, written
from orchestration.commands.progress import Bars, interruptible
from orchestration.commands.prune_options import layer_patterns
from orchestration.commands.training_options import FinetuneOptions
from orchestration.preflight.training import check_training
from pruners.errors import InputError
from pruners.methods.registry import METHODS
from pruners.model.masks import MaskSet
from trainers import storage
from trainers.checkpoint.folder import save_checkpoint, size_on_disk, verify, weights_hash
from trainers.checkpoint.trainer_state import damage
from trainers.config.data import DataSettings, ModelSettings
from trainers.config.jobs import TrainJob
from trainers.config.pruning import PruningSettings
from trainers.loop.gradual import Progress, run
from trainers.loop.session import seed_everything
from trainers.models import factory

_OPTIONS = {"data.train": "--train", "data.validation": "--validation"}
"""Keys of the layers below -> what this command's user wrote; settings keep the recipe's names."""


@dataclass(frozen=True)
class Finetuning:
    """A fine-tuning, loaded and checked; nothing is written yet.

    Attributes:
        model: with the classifier that the images need; ``classes`` are those before and now.
        lineage: what ``pruning.json`` records of where the model comes from.
    """

    options: FinetuneOptions
    target: Path
    device: torch.device
    model: nn.Module
    classes: tuple[int, int]
    masks: MaskSet | None
    patterns: Patterns | None
    lineage: Mapping[str, Any]

    @classmethod
    def of(cls, options: FinetuneOptions) -> Self:
        """Load and check all that the options name.

        Raises:
            InputError: any error that can be found before the training begins.
        """
        target = cls.result_folder(options)
        device = torch.device(device_for(options.device))
        check_training(options.training, "")
        patterns: Patterns | None = layer_patterns(options.layers)
        with resolved(options.checkpoint, options.tracking_uri, options.storage) as location:
            loaded = load(location, patterns)
            layers_of(loaded, patterns)
            parent = _parent(options.checkpoint, location)
        model, before = loaded.model, factory.classes(loaded.model)
        now = options.classes or before
        if now != before:
            _check_teacher(options)
            seed_everything(options.seed)
            factory.replace_head(model, now)
        images = {"train": check_images(options.train, model, "--train", options.columns)}
        if options.validation is not None:
            images["validation"] = check_images(options.validation, model, "--validation", options.columns)
        lineage = {"method": loaded.record.get("method", "unknown"), "parent": parent, "images": images}
        patterns = patterns or recorded_patterns(loaded)
        masks = _fitting(loaded.masks, model)
        return cls(options, target, device, model, (before, now), masks, patterns, lineage)

    @classmethod
    def result_folder(cls, options: FinetuneOptions) -> Path:
        """The folder that the result goes to.

        Raises:
            InputError: it exists already, or cannot be written.
        """
        return free_folder(options.out, "--out")

    @property
    def level(self) -> str:
        """The name under which a run keeps its best model."""
        return f"{self.sparsity:g}"

    @property
    def sparsity(self) -> float:
        return 0.0 if self.masks is None else self.masks.sparsity

    def run(self) -> list[str]:
        """Train, write the folder, and return lines about it."""
        with self._workplace() as work, self._renamed():
            job = self._job(self._start(work), work)
            with Bars(heading=self._plan(job)) as bars:
                resume = next(
                    (folder for folder in (work / "next", work / "last") if damage(folder) is None), None
                )
                if resume is not None:
                    bars.say("going on where it was interrupted")
                report = _Report(work, bars, job.training.epochs)
                interruptible(lambda: run(job, report, self.device, resume, stepped=report.stepped))
            (work / "kept" / self.level).replace(self.target)
            shutil.rmtree(work)
        return [f"{key:<12}{value}" for key, value in self._summary()]

    @property
    def _work(self) -> Path:
        """The hidden folder of a run."""
        return self.target.with_name(f".{self.target.name}.finetune")

    def _held(self) -> Path:
        """The result of an earlier run, if it exists."""
        return self.target if self.target.exists() else self._work

    @contextmanager
    def _workplace(self) -> Iterator[Path]:
        """Hold the hidden folder for this process alone; it is kept if a run can resume from it."""
        work = self._work
        made = [folder for folder in (work, *work.parents) if not folder.exists()]
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock = FileLock(work / "lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError("--out", self.options.out, "another finetune to it is at work") from None
        try:
            yield work
        except BaseException as error:
            if not any((work / name).exists() for name in ("last", "next")):
                shutil.rmtree(made[-1] if made else work, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                sys.stderr.write("what was trained is kept; the same command goes on from it\n")
            raise
        finally:
            lock.release()

    def _start(self, work: Path) -> Path:
        start = work / "start"
        if not start.exists():
            with whole_folder(start, self.options.out, "--out") as folder:
                # timm knows the arguments that built the model
                save_checkpoint(folder, self.model, model_args={}, masks=self.masks, record=self.lineage)
        self._check_lineage(work, verify(start, str(start)))
        return start

    def _check_lineage(self, work: Path, record: Mapping[str, Any]) -> None:
        """Check that the content of a folder comes from this checkpoint and these images."""
        if any(record.get(key) != value for key, value in self.lineage.items()):
            raise _of_another(self.options.out, work, "its checkpoint or its images differ")

    def _job(self, start: Path, work: Path) -> TrainJob:
        options, method = self.options, self.lineage["method"]
        schedule = {"kind": "constant"}
        pruning: dict[str, Any] = {"sparsity": self.sparsity, "layers": self.patterns, "schedule": schedule}
        if method in tuple(METHODS):
            pruning["methods"] = (method,)
        validation = options.validation
        return TrainJob(
            name=self.target.name,
            seed=options.seed,
            model=ModelSettings(checkpoint=str(start), classes=self.classes[1]),
            data=DataSettings(
                train=storage.absolute(options.train),
                validation=None if validation is None else storage.absolute(validation),
                image_column=options.image_column,
                label_column=options.label_column,
            ),
            training=options.training,
            pruning=PruningSettings.model_validate(pruning),
            threads=torch.get_num_threads(),
            keep_folder=str(work / "kept"),
            lineage=self.lineage,
        )

    def _plan(self, job: TrainJob) -> str:
        zeros = f"{100 * self.sparsity:.2f} % of the prunable weights stay zero" if self.masks else "dense"
        return f"{zeros}; {self._classes()}; {job.training.epochs} epochs"

    def _classes(self) -> str:
        before, now = self.classes
        return f"{now} classes" if before == now else f"{before} → {now} classes, with a new classifier"

    def _summary(self) -> Iterator[tuple[str, str]]:
        record = verify(self.target, self.options.out)
        figures = record["figures"]
        yield "from", self.options.checkpoint
        yield "classes", self._classes()
        yield "sparsity", f"{100 * record['sparsity']:.2f} %, the zeros of the checkpoint"
        yield "top-1", f"{100 * figures['val_top1']:.2f} % on validation, after epoch {figures['epoch']}"
        yield "written to", f"{self.options.out} ({size_on_disk(self.target) / 1e6:.2f} MB)"
        yield "load it by", f"timm.create_model({f'local-dir:{self.target}'!r}, pretrained=True)"

    @contextmanager
    def _renamed(self) -> Iterator[None]:
        """Errors of the layers below become errors of this command's options.

        Raises:
            InputError: also where memory, the disk or the numbers give out.
        """
        options = self.options

        def as_typed(error: InputError) -> InputError:
            if error.key == "resume":
                return _of_another(options.out, self._held(), error.expected.partition(": ")[2])
            if error.key == "data":
                part = "train" if error.value == storage.absolute(options.train) else "validation"
                return error.replaced(key=f"data.{part}")
            return error.replaced(key=error.key.removeprefix("training."))

        disk = written("--out", options.out)
        memory = enough_memory("batch_size", options.training.batch_size, "accumulate")
        try:
            with InputError.renamed(_OPTIONS), InputError.renamed(as_typed), disk, memory:
                yield
        except FloatingPointError as error:
            raise InputError("training", None, str(error)) from None


@dataclass
class _Report:
    """Shows the progress of the training, and keeps the state from which it can resume."""

    work: Path
    bars: Bars
    epochs: int
    first: int | None = field(default=None)

    def __call__(self, progress: Progress) -> None:
        metrics = progress.metrics
        if "epoch" in metrics:
            self.bars.say(
                f"epoch {metrics['epoch']} of {self.epochs}: loss {metrics['train_loss']:.4f}, "
                f"validation top-1 {100 * metrics['val_top1']:.2f} %"
            )
        if progress.save is None:
            return
        new, last = self.work / "next", self.work / "last"
        shutil.rmtree(new, ignore_errors=True)
        progress.save(new)
        shutil.rmtree(last, ignore_errors=True)
        new.replace(last)

    def stepped(self, done: int, total: int) -> None:
        """Show the steps of this process only: the time left is estimated from them."""
        if self.first is None:
            self.first = done - 1
        self.bars("training", done - self.first, total - self.first)


def _parent(name: str, location: str) -> dict[str, str]:
    """The model's name without a path of this machine, and the hash of its weights."""
    if not is_file(location):
        return {"source": name}
    known = name if ":/" in name else Path(name).name
    return {"source": known, "weights": weights_hash(location)}


def _fitting(masks: MaskSet | None, model: nn.Module) -> MaskSet | None:
    """The masks that fit the model; the mask of a replaced classifier does not."""
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    fitting = {name: mask for name, mask in (masks or {}).items() if shapes[name] == mask.shape}
    return MaskSet(fitting) if fitting else None


def _check_teacher(options: FinetuneOptions) -> None:
    distill = options.training.distill
    if distill is not None and distill.teacher == "dense":
        expected = "has other classes; name a teacher that knows those of the images"
        raise InputError("distill.teacher", distill.teacher, expected)


def _of_another(out: str, work: Path, differs: str) -> InputError:
    return InputError(
        "--out",
        out,
        f"{work} holds an earlier run, which is not this one: {differs}; delete it to start anew",
    )
