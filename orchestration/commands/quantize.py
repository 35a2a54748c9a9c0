"""``espalier quantize``: one checkpoint to INT8, on this machine, without Ray."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.status import Status
from torch import nn

from orchestration.commands.finetune import Finetuning
from orchestration.commands.model_source import as_checkpoint_folder, check_images, resolved
from orchestration.commands.output import free_folder, whole_folder
from orchestration.commands.training_options import AwareOptions, FinetuneOptions, QuantizeOptions
from orchestration.common import defaults
from orchestration.tracking.pyfunc_model import labels_of
from pruners.errors import InputError
from pruners.methods.registry import METHODS
from trainers.checkpoint.folder import load_checkpoint, size_on_disk, verify
from trainers.checkpoint.trainer_state import check_recorded
from trainers.config.jobs import TrainJob
from trainers.config.quantization import Calibration, Mode
from trainers.data import datasets
from trainers.export.onnx import ONNX_FILE
from trainers.loop.evaluation import evaluate
from trainers.models import factory
from trainers.optional_imports import require
from trainers.quantization import int8_folder
from trainers.quantization.checks import check_mode

_OPTIONS = {"quantize.images": "--images", "data": "--train", "checkpoint": "model"}
"""Keys of the layers below -> the option or argument of this command."""
_ALIKE = 0.9  # share of images with float32's class, below which the summary warns


class Training(Finetuning):
    """Fine-tuning with fake quantization; after Ctrl-C it can resume, as ``espalier finetune`` does."""

    level = "0"  # one best model is kept, at no sparsity of its own

    @classmethod
    def result_folder(cls, options: FinetuneOptions) -> Path:
        """A hidden folder; it may already hold the trained model, which is not yet written as INT8."""
        return Path(options.out).resolve()

    def done(self) -> bool:
        """Return whether the model is trained already.

        Raises:
            InputError: with other settings, from another checkpoint, or on other images.
        """
        if not self.target.exists():
            return False
        record = verify(self.target, self.options.out, key="--out")
        self._check_lineage(self.target, record)
        with self._renamed():
            check_recorded(self._job(self.target, self._work), record["recipe"])
        return True

    def _job(self, start: Path, work: Path) -> TrainJob:
        assert isinstance(self.options, AwareOptions)
        method = self.lineage["method"]
        changes = {
            "pruning": None,
            "method": method if method in tuple(METHODS) else None,
            "quantize": Calibration(images=self.options.images),
        }
        return super()._job(start, work).model_copy(update=changes)


@dataclass(frozen=True)
class Images:
    """Images for the ranges of activations, and labelled images to evaluate the model on.

    Attributes:
        before: the float model's top-1 on ``tests``.
    """

    calibration: list[torch.Tensor]
    tests: datasets.Batches | None = None
    before: float = 0.0

    def figures(self, model: nn.Module) -> dict[str, float]:
        if self.tests is None:
            return {}
        result = evaluate(model, self.tests)
        return {"test_top1": result.top1, "test_loss": result.loss, "float_test_top1": self.before}


def quantize_checkpoint(options: QuantizeOptions, status: Status) -> list[str]:
    """Write the INT8 folder; return lines about it.

    Args:
        options: the options of the command, checked.
        status: a status line; training shows its own bars instead.

    Raises:
        InputError: it cannot be written; says why.
        RuntimeError: a pruned weight that is not 0 in the file, by its layer.
    """
    require("--mode", options.mode, *int8_folder.NEEDS)
    target = free_folder(options.out, "--out")
    with (
        InputError.renamed(_OPTIONS),
        resolved(options.checkpoint, options.tracking_uri, options.storage) as location,
        as_checkpoint_folder(location) as (source, _),
    ):
        loaded = load_checkpoint(str(source), key="model")
        model = loaded.model.eval()
        check_mode(model, cast(Mode, options.mode), loaded.masks or (), "--mode")
        training = Training.of(options.aware) if options.mode == "qat" else None
        trained = training is not None and training.done()
        images = _images(options, model)
        if training is None:
            return _write(options, source, target, images)
        if not trained:
            status.stop()
            training.run()
            status.start()
        lines = _write(options, training.target, target, images)
        shutil.rmtree(training.target)
        return lines


def _write(options: QuantizeOptions, source: Path, target: Path, images: Images) -> list[str]:
    mode = cast(Mode, options.mode)
    record: dict[str, Any] = {
        "source": options.checkpoint if ":/" in options.checkpoint else Path(options.checkpoint).name,
        "options": {"mode": mode, "images": sum(map(len, images.calibration)), "seed": options.seed},
    }
    with whole_folder(target, options.out, "--out") as folder:
        made = int8_folder.quantize_folder(
            source,
            folder,
            mode,
            images.calibration,
            labels=labels_of(options.train, options.columns),
            record=record,
            figures=images.figures,
            key="model",
        )
    return [f"{key:<12}{value}" for key, value in _summary(options, source, target, made)]


def _summary(
    options: QuantizeOptions, source: Path, target: Path, made: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    figures, before = made["figures"], size_on_disk(source)
    ranges = {"dynamic": "ranges as they come", "static": "ranges from {} training images"}
    how = ranges.get(options.mode, "trained with fake quantisation").format(made["options"]["images"])
    yield "mode", f"{options.mode}: {how}"
    yield "int8", f"{100 * made['int8_share']:.1f} % of the weights"
    if "same_class" in made:
        same = made["same_class"]
        advice = (
            ""
            if same["share"] >= _ALIKE
            else "; too few to use it unseen: measure it (--test), or train it (qat)"
        )
        yield (
            "same class",
            f"as in float32 for {100 * same['share']:.1f} % of {same['images']} images{advice}",
        )
    if made["zeros"]:
        yield "zeros", f"{made['zeros']:,} pruned weights, each of them 0 in int8"
    if figures:
        yield (
            "test top-1",
            f"{100 * figures['float_test_top1']:.2f} % → {100 * figures['test_top1']:.2f} %, "
            f"by {made['engine']}",
        )
    yield (
        "size",
        f"{before / 1e6:.2f} MB → {made['bytes'] / 1e6:.2f} MB ({100 * made['bytes'] / before:.0f} %)",
    )
    yield "written to", options.out
    yield "run it by", f"onnxruntime.InferenceSession({str(target / ONNX_FILE)!r})"


def _images(options: QuantizeOptions, model: nn.Module) -> Images:
    """Read and check the images, even if only the training uses them."""
    transform, calibration = datasets.eval_transform(factory.data_config(model)), []
    if options.train is not None:
        check_images(options.train, model, "--train", options.columns)
        table = datasets.images(options.train, transform, key="--train", columns=options.columns)
        calibration = datasets.calibration_batches(table, options.images, options.seed)
    if options.test is None:
        return Images(calibration)
    check_images(options.test, model, "--test", options.columns)
    table = datasets.images(options.test, transform, key="--test", columns=options.columns)
    tests = datasets.eval_loader(table, defaults.BATCH_SIZE)
    return Images(calibration, tests, evaluate(model, tests).top1)
