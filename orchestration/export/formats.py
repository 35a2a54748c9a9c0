"""The formats that engines read: their names, their files, and who writes and runs each.

Light, so that the command line can list them; what writes a file is imported when it is asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pruners.errors import InputError
from trainers.optional_imports import require

if TYPE_CHECKING:
    from torch import nn

    from trainers.data.preprocessing import Images


@dataclass(frozen=True)
class Source:
    """A model to be written, how its images are prepared, and images for calibration, if any."""

    model: nn.Module
    preprocessing: Mapping[str, Any]
    calibration: Images | None = None

    @property
    def input_size(self) -> tuple[int, int, int]:
        channels, height, width = self.preprocessing["input_size"]
        return channels, height, width

    @property
    def metadata(self) -> dict[str, str]:
        from trainers.data.preprocessing import metadata_of

        return metadata_of(self.preprocessing)


@dataclass(frozen=True)
class Format:
    """A file format that an engine reads, and who writes and runs it.

    Attributes:
        text: for ``--help``.
        file: what the engine is given.
        engine, kind: who runs it, and the data type that it computes in.
        packages: that write and run it.
        calibration: whether images that fix the ranges of activations are of use to it.
        write: makes the file in a folder.
        int8_values: of an INT8 one, how many weights of a file are int8.
    """

    text: str
    file: str
    engine: str
    kind: str
    packages: tuple[str, ...]
    calibration: Literal["none", "possible", "needed"]
    write: Callable[[Source, Path], None]
    int8_values: Callable[[Path], int] | None = None

    def check(self, name: str, calibration: str | None) -> None:
        """Check that the format can be written with these images.

        Raises:
            InputError: a library is missing, or images for calibration are where they are of no use.
        """
        require("--format", name, *self.packages)
        if self.calibration == "needed" and calibration is None:
            wanted = f"{name} fixes the ranges of activations: give training images (Parquet: image, label)"
            raise InputError("--calibration", None, wanted)
        if self.calibration == "none" and calibration is not None:
            raise InputError("--calibration", calibration, f"{name} is not quantised; drop it")


def _onnx(source: Source, folder: Path) -> None:
    from trainers.export import onnx

    onnx.export_onnx(source.model, folder / onnx.ONNX_FILE, source.input_size, source.metadata)


def _onnx_int8(source: Source, folder: Path) -> None:
    from trainers.export.onnx import ONNX_FILE, quantize_onnx
    from trainers.quantization.checks import check_mode, check_share

    if source.calibration is None:
        check_mode(source.model, "dynamic", (), "--calibration")
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


_ONNX = ("onnx", "onnxscript", "onnxruntime")
_OPENVINO = ("onnx", "onnxscript", "openvino")

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
        "torch-export": Format("torch.export's program", "model.pt2", "torch", "float32", (), "none", _torch),
    }
)
"""By the names that ``espalier export --format`` takes; ``compressed`` is no engine's."""
