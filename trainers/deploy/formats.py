"""The formats that engines read: names, files, and the code that writes and runs each.

The module imports nothing heavy, so that the command line can list the formats. The code that writes a file
is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from pruners.errors import InputError
from trainers.optional_imports import require

if TYPE_CHECKING:
    from torch import nn

    from trainers.data.preprocessing import Images, Preprocessing


@dataclass(frozen=True)
class Source:
    """A model to be written, how its images are prepared, and images for calibration, if any.

    Attributes:
        model: in float32 and eval mode, on the CPU.
        preprocessing: how an image becomes an input (:mod:`trainers.data.preprocessing`).
        calibration: (N, channels, height, width), float32, normalised.
    """

    model: nn.Module
    preprocessing: Preprocessing
    calibration: Images | None = None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.preprocessing["input_size"]
        return channels, height, width

    @property
    def metadata(self) -> dict[str, str]:
        """What the file itself says of its preprocessing and classes, as JSON by name."""
        from trainers.data.preprocessing import metadata_of

        return metadata_of(self.preprocessing)


@dataclass(frozen=True)
class Format:
    """A file format that an engine reads.

    Attributes:
        text: description for ``--help``.
        file: name of the file that the engine loads.
        engine, kind: the engine that runs it, and the data type in which it computes.
        packages: packages that write and run it.
        calibration: whether the format uses images to fix the ranges of activations.
        write: writes the file into a folder.
        int8_values: of an INT8 format: returns the number of int8 weights of a file.
        remarks: returns remarks on a folder that was written, as headings and texts.
    """

    text: str
    file: str
    engine: str
    kind: str
    packages: tuple[str, ...]
    calibration: Literal["none", "possible", "needed"]
    write: Callable[[Source, Path], None]
    int8_values: Callable[[Path], int] | None = None
    remarks: Callable[[Path], Iterator[tuple[str, str]]] = lambda folder: iter(())

    def check(self, name: str, calibration: str | None) -> None:
        """Check that the format can be written with these images.

        Args:
            name: of the format.
            calibration: address of the images for calibration, if any.

        Raises:
            InputError: a library is missing, or images for calibration are given to a format without any.
        """
        require("format", name, *self.packages)
        lacking = self._lacking()
        if lacking is not None:
            raise InputError("format", name, lacking)
        if self.calibration == "needed" and calibration is None:
            wanted = f"{name} fixes the ranges of activations: give training images (Parquet: image, label)"
            raise InputError("calibration", None, wanted)
        if self.calibration == "none" and calibration is not None:
            why = (
                "measures the ranges of activations as it runs" if self.kind == "int8" else "is not quantised"
            )
            raise InputError("calibration", calibration, f"{name} {why}; drop it")

    def calibrates(self, model: nn.Module) -> bool:
        """Return whether a file of this model must be made with images, which fix ranges of activations."""
        from trainers.quantization.checks import needs_calibration

        return self.calibration == "needed" or (self.calibration == "possible" and needs_calibration(model))

    def _lacking(self) -> str | None:
        """The reason why the engine cannot run the file (to check it) on this machine; ``None`` if it can."""
        if self.engine != "sparse":  # the others lack packages only
            return None
        from trainers.engines.registry import ENGINES

        return ENGINES[self.engine].lacking(self.kind, "cpu")


def _onnx(source: Source, folder: Path) -> None:
    from trainers.export import onnx

    onnx.export_onnx(source.model, folder / onnx.ONNX_FILE, source.input_size, source.metadata)


def _onnx_int8(source: Source, folder: Path) -> None:
    from trainers.export.onnx import ONNX_FILE, quantize_onnx
    from trainers.quantization.checks import check_mode, check_share

    if source.calibration is None:
        check_mode(source.model, "dynamic", (), "calibration")
    _onnx(source, folder)
    plain = (folder / ONNX_FILE).rename(folder / f"float-{ONNX_FILE}")
    quantize_onnx(plain, folder / ONNX_FILE, source.calibration)
    plain.unlink()
    check_share(_onnx_values(folder), source.model)


def _onnx_values(folder: Path) -> int:
    from trainers.export.onnx import ONNX_FILE, int8_values

    return int8_values(folder / ONNX_FILE)


def _openvino(source: Source, folder: Path, images: Images | None = None) -> None:
    from pruners.model.layers import has_attention
    from trainers.export import onnx, openvino

    _onnx(source, folder)
    plain = folder / onnx.ONNX_FILE
    attention = has_attention(source.model)
    path = folder / openvino.OPENVINO_FILE
    openvino.export_openvino(plain, path, source.metadata, images, attention=attention)
    plain.unlink()


def _openvino_int8(source: Source, folder: Path) -> None:
    from trainers.quantization.checks import check_share

    _openvino(source, folder, source.calibration)
    check_share(_openvino_values(folder), source.model)


def _openvino_values(folder: Path) -> int:
    from trainers.export.openvino import OPENVINO_FILE, int8_values

    return int8_values(folder / OPENVINO_FILE)


def _torch(source: Source, folder: Path) -> None:
    from trainers.export import torch_export

    torch_export.export_torch(
        source.model, folder / torch_export.TORCH_FILE, source.input_size, source.metadata
    )


def _sparse(source: Source, folder: Path, *, int8: bool = False) -> None:
    from trainers.sparse.packing import pack

    if int8:
        _check_blocks(source.model)
    try:
        pack(source.model, folder, int8=int8, preprocessing=source.preprocessing)
    except InputError:
        raise
    except ValueError as error:
        raise InputError("model", type(source.model).__name__, f"the sparse engine: {error}") from None


def check_packable(model: nn.Module, key: str) -> None:
    """Check that the sparse engine can run a model, by its structure alone.

    Args:
        model: on any device, the meta device too.
        key: the option or recipe key that asks for the engine, for the error message.

    Raises:
        InputError: it has a part that the engine lacks.
    """
    from trainers.sparse.packing import check

    try:
        check(model)
    except ValueError as error:
        raise InputError(key, "sparse", f"{type(model).__name__} cannot be packed ({error})") from None


def _check_blocks(model: nn.Module) -> None:
    """Check that the zeros form blocks of 1 × 4, which the INT8 kernel leaves out.

    Raises:
        InputError: most of them do not.
    """
    from torch import nn

    zeros = in_blocks = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.in_features % _BLOCK == 0:
            blocks = module.weight.detach().reshape(-1, _BLOCK) == 0
            zeros += int(blocks.sum())
            in_blocks += _BLOCK * int(blocks.all(1).sum())
    if in_blocks < _LEAST_IN_BLOCKS * zeros:
        share = f"{100 * in_blocks / zeros:.0f} % of its zeros stand in blocks of 1 × 4"
        expected = f"{share}, and INT8 leaves out only those: prune with the pattern 1x4, or take sparse"
        raise InputError("model", type(model).__name__, expected)


def _sparse_int8(source: Source, folder: Path) -> None:
    from trainers.quantization.checks import check_share

    _sparse(source, folder, int8=True)
    check_share(_sparse_values(folder), source.model)


def _sparse_values(folder: Path) -> int:
    from trainers.sparse import load

    return sum(layer.outputs * layer.inputs for layer in load(folder).layers.values() if layer.kind == "int8")


def _sparse_remarks(folder: Path) -> Iterator[tuple[str, str]]:
    """Remarks: how many layers run without their zeros, how many do not, and whether the engine is faster."""
    from trainers.sparse import load

    layers = load(folder).layers
    dense = [name for name, layer in layers.items() if layer.kind == "dense"]
    named = f": {', '.join(dense)}" if len(dense) <= _NAMED else ""
    yield "layers", f"{len(layers) - len(dense)} without their zeros, {len(dense)} dense{named}"
    multiplied = sum(layer.outputs * layer.inputs for layer in layers.values())
    left_out = sum(layer.left_out for layer in layers.values())
    if left_out < _LEAST_LEFT_OUT * multiplied:
        share = f"{100 * left_out / multiplied:.0f} % of the weights are zeros that it leaves out"
        yield "gain", f"none to expect: {share}; other engines run such a model as fast"


_BLOCK = 4  # inputs of a block in which INT8 leaves zeros out
_LEAST_IN_BLOCKS = 0.85
_LEAST_LEFT_OUT = 0.4
_NAMED = 4  # most layers that a line names

_ONNX = ("onnx", "onnxscript", "onnxruntime")
_OPENVINO = ("onnx", "onnxscript", "openvino")
_SPARSE = ("llvmlite",)

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "onnx": Format("for ONNX Runtime", "model.onnx", "onnxruntime", "float32", _ONNX, "none", _onnx),
        "onnx-int8": Format(
            "the same in INT8",
            "model.onnx",
            "onnxruntime",
            "int8",
            packages=_ONNX,
            calibration="possible",
            write=_onnx_int8,
            int8_values=_onnx_values,
        ),
        "openvino": Format("for OpenVINO", "model.xml", "openvino", "float32", _OPENVINO, "none", _openvino),
        "openvino-int8": Format(
            "the same in INT8",
            "model.xml",
            "openvino",
            "int8",
            packages=(*_OPENVINO, "nncf"),
            calibration="needed",
            write=_openvino_int8,
            int8_values=_openvino_values,
        ),
        "sparse": Format(
            "for Espalier's own engine, on which zeros are faster",
            ".",
            "sparse",
            "float32",
            packages=_SPARSE,
            calibration="none",
            write=_sparse,
            remarks=_sparse_remarks,
        ),
        "sparse-int8": Format(
            "the same in INT8, zeros in blocks of 1×4",
            ".",
            "sparse",
            "int8",
            packages=_SPARSE,
            calibration="none",
            write=_sparse_int8,
            int8_values=_sparse_values,
            remarks=_sparse_remarks,
        ),
        "torch-export": Format("torch.export's program", "model.pt2", "torch", "float32", (), "none", _torch),
    }
)
"""By the names that ``espalier export --format`` takes; ``compressed`` is no engine's.

:meta hide-value:
"""
