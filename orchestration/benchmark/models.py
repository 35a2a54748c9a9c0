"""The models of a benchmark, and the files by which each engine runs them.

A checkpoint is run by every engine that is asked for: its file for an engine is written to a temporary
folder. A folder that ``espalier export`` or ``espalier quantize`` wrote is run by its own engine, as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from torch import nn

from orchestration.commands.model_source import as_checkpoint_folder, resolved
from orchestration.export.engine import source_of
from pruners.errors import InputError
from trainers.checkpoint.folder import load_checkpoint, size_on_disk, weights_hash
from trainers.checkpoint.records import ExportRecord
from trainers.config.engines import Choice
from trainers.data.preprocessing import Images, Preprocessing, pattern_images
from trainers.deploy.checked import is_exported, read_record, torch_answers
from trainers.deploy.formats import FORMATS, Source
from trainers.engines.registry import SPARSE_ENOUGH, keeps_2_of_4, zeros
from trainers.export.onnx import ONNX_FILE, read_preprocessing
from trainers.quantization import int8_folder
from trainers.sources.columns import Columns
from trainers.sparse.break_even import break_even
from trainers.storage import absolute


@dataclass(frozen=True)
class File:
    """The file or folder that an engine loads, and its size on disk in bytes."""

    path: Path
    size: int


@dataclass
class Variant:
    """A model of a benchmark.

    Attributes:
        name: its short name in tables, without a path.
        sparsity: share of zeros among the prunable weights, as recorded.
        parameters: of a checkpoint; of an exported folder unknown.
        weights: hash of the checkpoint's weights; for an exported folder, of the checkpoint it was made from.
        source: of a checkpoint: the model in float32, and what its files must record.
        record: of an exported folder: its record.
    """

    name: str
    folder: Path
    preprocessing: Preprocessing
    sparsity: float
    weights: str | None
    source: Source | None = None
    record: ExportRecord = field(default_factory=ExportRecord)
    _files: dict[str, File] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module | None:
        return None if self.source is None else self.source.model

    @property
    def parameters(self) -> int | None:
        return None if self.model is None else sum(weight.numel() for weight in self.model.parameters())

    @property
    def shape(self) -> tuple[int, ...]:
        """Classes, channels, height and width, which must be equal for all models of a benchmark."""
        return (self.preprocessing["classes"], *self.preprocessing["input_size"])

    def refuses(self, choice: Choice) -> str | None:
        """The reason why an engine cannot run the model, as text; ``None`` if it can."""
        if self.model is None:
            own = Choice(self.record["engine"], self.record["type"])
            fits = (choice.engine, choice.stored) == (own.engine, own.stored)
            return None if fits else f"is a file for {own}"
        linear = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        if choice.engine == "csr" and not any(zeros(module) >= SPARSE_ENOUGH for module in linear):
            return f"no linear layer has {100 * SPARSE_ENOUGH:.0f} % zeros"
        if choice == Choice("sparse", "float32"):
            least = break_even()
            if max(map(zeros, linear), default=0.0) < least:
                return f"no linear layer has {100 * least:.0f} % zeros"
        if choice.engine == "2:4" and not any(keeps_2_of_4(module) for module in linear):
            return "no linear layer keeps 2:4"
        return None

    def file(self, choice: Choice, scratch: Path) -> File:
        """The file that the engine runs; written below ``scratch`` if there is none.

        Raises:
            InputError: a model that cannot be exported.
        """
        if self.source is None:
            size = sum((self.folder / name).stat().st_size for name in self.record["files"])
            return File(self.folder / self.record["file"], size)
        kind = form_of(choice)
        if kind is None:
            return File(self.folder, size_on_disk(self.folder))
        if kind not in self._files:
            folder = scratch / f"{self.name.replace('/', '-')}-{kind}"
            folder.mkdir()
            FORMATS[kind].write(self.source, folder)
            size = sum(path.stat().st_size for path in folder.iterdir())
            self._files[kind] = File(folder / FORMATS[kind].file, size)
        return self._files[kind]

    def questions(
        self, images: Images, others: Sequence[Variant]
    ) -> tuple[Images, NDArray[np.float32]] | None:
        """Images on which an engine's answers are compared, and the answers expected: torch's, in float32.

        Args:
            images: real images. For an exported folder without its checkpoint, the synthetic images and
                answers in its record are used instead.
            others: the other models; the checkpoint that a file was made from may be among them.

        Returns:
            Images and expected logits; ``None`` if the right answers of this model are not known.
        """
        if self.model is not None:
            return images, torch_answers(self.model, images)
        if "probe" in self.record:
            logits = np.array(self.record["probe"]["logits"], np.float32)
            return pattern_images(self.preprocessing, len(logits)), logits
        for other in others:
            if other.model is not None and other.weights == self.weights:
                return images, torch_answers(other.model, images)
        return None


def form_of(choice: Choice) -> str | None:
    """The export format that an engine runs in a data type; ``None``: the checkpoint itself."""
    if choice.engine not in ("onnxruntime", "openvino", "sparse"):
        return None
    wanted = (choice.engine, choice.stored)
    return next(name for name, form in FORMATS.items() if (form.engine, form.kind) == wanted)


@contextmanager
def load_variants(
    names: Sequence[str],
    calibration: str | None,
    tracking_uri: str | None,
    storage: str,
    *,
    columns: Columns | None = None,
) -> Iterator[list[Variant]]:
    """Load the models of a benchmark, in a ``with`` block.

    Args:
        names: as the command's user wrote them.
        calibration: training images, for engines that need some.
        tracking_uri: MLflow's; ``None``: that of the storage.
        storage: of the sweeps whose registry is meant.
        columns: of the tables, where their metadata does not say which are meant.

    Returns:
        A context manager that gives them.

    Raises:
        InputError: one that cannot be loaded, or that has other classes or inputs than the first.
    """
    with ExitStack() as stack:
        variants: list[Variant] = []
        for name, label in zip(names, short_names(names), strict=True):
            location = stack.enter_context(resolved(name, tracking_uri, storage))
            variants.append(_open(stack, location, name, label, calibration=calibration, columns=columns))
            _check_alike(variants[0], variants[-1], name)
        yield variants


def short_names(names: Sequence[str]) -> list[str]:
    """Make short names that differ: the last parts of the models' paths, as few as possible.

    Raises:
        InputError: the same model is named twice.
    """
    parts = [PurePath(name.partition("://")[2] or name).parts for name in names]
    for count in range(1, max(map(len, parts), default=1) + 1):
        shortened = ["/".join(path[-count:]) for path in parts]
        if len(set(shortened)) == len(shortened):
            return shortened
    raise InputError("model", " ".join(names), "names the same model twice")


def _open(
    stack: ExitStack,
    location: str,
    name: str,
    label: str,
    *,
    calibration: str | None,
    columns: Columns | None,
) -> Variant:
    local = Path(absolute(location))
    if "://" not in location and is_exported(local):
        exported = read_record(local, name)
        about = exported.get("source", {})
        sparsity = float(about.get("sparsity", 0.0))
        return Variant(
            label, local, exported["preprocessing"], sparsity, about.get("weights"), record=exported
        )
    if "://" not in location and int8_folder.is_int8(local):
        return _quantized(stack, local, name, label)
    folder, _ = stack.enter_context(as_checkpoint_folder(location))
    loaded = load_checkpoint(str(folder), key="model")
    sparsity = 0.0 if loaded.masks is None else float(loaded.masks.sparsity)
    source = source_of(loaded.model.float().eval(), folder, calibration, columns)
    return Variant(label, folder, source.preprocessing, sparsity, weights_hash(str(folder)), source)


def _quantized(stack: ExitStack, folder: Path, name: str, label: str) -> Variant:
    """A folder of ``espalier quantize``: INT8 for ONNX Runtime."""
    about = int8_folder.read_record(folder, name, key="model")
    path = stack.enter_context(int8_folder.engine_file(folder, about))
    file = ONNX_FILE if ONNX_FILE in about["files"] else int8_folder.PACKED_MODEL
    record: ExportRecord = {
        "engine": int8_folder.ENGINE,
        "type": "int8",
        "file": str(path.absolute()),
        "files": {file: about["files"][file]},
        "probe": about["probe"],
    }
    preprocessing = read_preprocessing(path)
    return Variant(label, folder, preprocessing, about["sparsity"], about["float"], record=record)


def _check_alike(first: Variant, other: Variant, name: str) -> None:
    if first.shape != other.shape:
        given, expected = (_format_shape(*variant.shape) for variant in (other, first))
        raise InputError(
            "model", name, f"is for {given}, and {first.name} for {expected}; compare like with like"
        )


def _format_shape(classes: int, *size: int) -> str:
    return f"{classes} classes and images of {'×'.join(map(str, size))}"
