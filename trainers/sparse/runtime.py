"""Run a pruned vision transformer from its folder: numpy in, logits out, without torch.

from trainers.sparse import load
model = load("deit_s_90", threads=2)
logits = model(images)            # float32 [images, channels, height, width] → [images, classes]
model.predict(["cat.jpg"])        # label, name and probabilities of each
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from trainers.checkpoint.checksums import sha256
from trainers.sparse import images, layout
from trainers.sparse.break_even import break_even
from trainers.sparse.engine import Array, LinearLayer
from trainers.sparse.kernels import host
from trainers.sparse.plan import Executor, Plan, Weights
from trainers.sparse.program import LayerNorm, Linear, Program, from_json
from trainers.sparse.weights import pack_blocks

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainers.data.preprocessing import Preprocessing

PROGRAM, TENSORS = "program.json", "tensors.safetensors"
TABLES = ("/relative_position", "/padding")  # tensors of attention within windows
_TOGETHER = 16  # images of a pass of :meth:`SparseModel.predict`


@dataclass(frozen=True)
class Prediction:
    """The predicted class of one image.

    Attributes:
        label: the number of the class with the largest probability.
        name: its name; ``None`` if the folder holds no names of classes.
        probabilities: (classes,), float32: of each class, summing to 1.
    """

    label: int
    name: str | None
    probabilities: Array


class SparseModel:
    """A model on the sparse engine, for inference on the processor; :func:`load` makes it from a folder.

    Calls from several threads are run one after the other; ``threads`` share the work of one call.

    Args:
        program: its operations.
        tensors: its weights, as :func:`load` reads them.
        threads: how many share the work of a call.
        sparse_from: share of zeros (0 to 1) from which a layer runs sparse; default: where it is faster on
            this machine (:mod:`trainers.sparse.break_even`).
        widest: vectors of tokens in a tile.

    Raises:
        ValueError: a tensor that is missing, or INT8 on a processor without AVX-512 VNNI.
    """

    def __init__(
        self,
        program: Program,
        tensors: dict[str, NDArray[np.generic]],
        *,
        threads: int = 1,
        sparse_from: float | None = None,
        widest: int = layout.WIDEST,
    ) -> None:
        self.program, self.threads = program, threads
        self._lanes, self._widest = host.lanes(), widest
        sparse_from = break_even() if sparse_from is None else sparse_from
        norms = {
            operation.layer: (
                _real(tensors, f"{operation.layer}/scale"),
                _real(tensors, f"{operation.layer}/shift"),
            )
            for operation in program.operations
            if isinstance(operation, LayerNorm)
        }
        self.layers = {
            operation.layer: self._linear(operation, tensors, sparse_from)
            for operation in program.operations
            if isinstance(operation, Linear)
        }
        others = {
            name: _real(tensors, name)
            for name in tensors
            if name == "start" or name.endswith(TABLES) or name.startswith("head/")
        }
        self._head = {name: array for name, array in others.items() if name.startswith("head/")}
        self.executor = Executor(program, Weights(self.layers, norms, others), threads=threads, widest=widest)
        self._lock = threading.Lock()

    def _linear(
        self, operation: Linear, tensors: dict[str, NDArray[np.generic]], sparse_from: float
    ) -> LinearLayer:
        layer = operation.layer
        bias = _real(tensors, f"{layer}/bias")
        if operation.int8:
            if not host.has_vnni():
                raise ValueError(f"{layer}: INT8 needs a processor with AVX-512 VNNI")
            blocks = pack_blocks(int8_weight(tensors, layer), _real(tensors, f"{layer}/steps"))
            return LinearLayer(blocks.outputs, blocks.inputs, bias, None, None, blocks)
        weight = dense_weight(tensors, layer)
        return LinearLayer.of(weight, bias, lanes=self._lanes, widest=self._widest, sparse_from=sparse_from)

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of images and the names of the classes (:mod:`trainers.data.preprocessing`)."""
        return cast("Preprocessing", self.program.preprocessing)

    @property
    def kinds(self) -> dict[str, str]:
        """How each linear layer runs, by its name: ``sparse``, ``int8`` (without its blocks of zeros) or
        ``dense``."""
        return {name: layer.kind for name, layer in self.layers.items()}

    def predict(self, files: Iterable[str | Path | IO[bytes] | Image]) -> list[Prediction]:
        """Prepare images and predict their classes; needs Pillow.

        Args:
            files: paths or open files of images, or Pillow images, of any size.

        Returns:
            A prediction for each image, in the same order.

        Raises:
            OSError: a file that is missing, or no image.
        """
        pixels = [images.prepared(file, self.preprocessing) for file in files]
        names: list[str] = list(self.preprocessing.get("labels", ()))
        predictions = []
        for begin in range(0, len(pixels), _TOGETHER):
            logits = self(np.stack(pixels[begin : begin + _TOGETHER])).astype(np.float64)
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
            for row in shares:
                best = int(row.argmax())
                name = names[best] if best < len(names) else None
                predictions.append(Prediction(best, name, row.astype(np.float32)))
        return predictions

    def __call__(self, images: Array) -> Array:
        """Compute the logits of images that are prepared already.

        Args:
            images: (N, channels, height, width), float32, normalised as :attr:`preprocessing` says; N may be
                any number, 0 too.

        Returns:
            (N, classes), float32.

        Raises:
            ValueError: images of another shape or type.
        """
        expected = (self.program.channels, self.program.height, self.program.width)
        if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.float32:
            raise ValueError(f"images: float32 [n, {expected}] is needed, not {images.dtype} {images.shape}")
        if not len(images):
            return np.zeros((0, self.program.classes), dtype=np.float32)
        with self._lock:
            return self._logits(self.executor.run(len(images), images))

    def _logits(self, plan: Plan) -> Array:
        program = self.program
        tokens, prefix = self._tokens(plan), program.levels[-1].prefix
        if program.pool == "prefix":
            each = [
                tokens[:, i] @ self._head[f"head/weight{i}"].T + self._head[f"head/bias{i}"]
                for i in range(prefix)
            ]
            return np.asarray(sum(each) / np.float32(prefix), dtype=np.float32)
        pooled = tokens[:, 0] if program.pool == "token" else tokens[:, prefix:].mean(axis=1)
        if program.pool_norm is not None:
            centred = pooled - pooled.mean(axis=1, keepdims=True)
            deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + np.float32(program.pool_norm))
            pooled = centred / deviation * self._head["head/scale"] + self._head["head/shift"]
        if "head/weight0" not in self._head:
            return np.ascontiguousarray(pooled)
        logits: Array = pooled @ self._head["head/weight0"].T + self._head["head/bias0"]
        return logits

    def _tokens(self, plan: Plan) -> Array:
        """The features of the tokens that are pooled, ``[images, tokens, features]``."""
        program, tiling, level = self.program, plan.tilings[-1], self.program.levels[-1]
        buffer = plan.buffers[program.output]
        if not tiling.apart:
            tokens = layout.from_tiles(buffer, tiling.widths, tiling.lanes, tiling.images * tiling.tokens)
            return tokens.reshape(tiling.images, tiling.tokens, -1)
        tiles, features = buffer.reshape(tiling.images, -1), program.buffers[program.output]
        wanted = level.tokens if program.pool == "avg" else max(1, level.prefix)
        tokens, start = np.empty((tiling.images, wanted, features), dtype=np.float32), 0
        for width in tiling.widths[: len(tiling.widths) // tiling.images]:
            size = width * tiling.lanes
            tile = tiles[:, start * features : (start + size) * features].reshape(-1, features, size)
            part = tokens[:, start : start + size]
            part[:] = tile[:, :, : part.shape[1]].transpose(0, 2, 1)
            start += size
        return tokens


def _real(tensors: dict[str, NDArray[np.generic]], name: str) -> Array:
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing")
    return np.ascontiguousarray(tensors[name], dtype=np.float32)


def dense_weight(tensors: dict[str, NDArray[np.generic]], layer: str) -> Array:
    """A layer's matrix ``[outputs, inputs]``, from all its numbers or from its nonzeros (row by row: how
    many in each row, their columns, their values)."""
    if f"{layer}/weight" in tensors:
        return _real(tensors, f"{layer}/weight")
    counts, columns = (np.asarray(tensors[f"{layer}/{name}"], np.int64) for name in ("counts", "columns"))
    inputs = int(np.asarray(tensors[f"{layer}/inputs"]).item())
    weight = np.zeros((len(counts), inputs), dtype=np.float32)
    weight[np.repeat(np.arange(len(counts)), counts), columns] = tensors[f"{layer}/values"]
    return weight


def int8_weight(tensors: dict[str, NDArray[np.generic]], layer: str) -> NDArray[np.int8]:
    """A layer's int8 matrix ``[outputs, inputs]``, from its blocks of 1 × 4 (how many in each row, which,
    their bytes)."""
    counts, columns = (np.asarray(tensors[f"{layer}/{name}"], np.int64) for name in ("counts", "columns"))
    inputs = int(np.asarray(tensors[f"{layer}/inputs"]).item())
    weight = np.zeros((len(counts), inputs // 4, 4), dtype=np.int8)
    weight[np.repeat(np.arange(len(counts)), counts), columns] = tensors[f"{layer}/blocks"]
    return weight.reshape(len(counts), inputs)


def load(folder: str | Path, *, threads: int = 1, sparse_from: float | None = None) -> SparseModel:
    """Load a model from the folder that ``espalier export --format sparse`` wrote.

    Kernels are compiled for this processor as the model is loaded. Neither torch nor timm is needed. From
    Python :func:`trainers.sparse.packing.pack` writes such a folder.

    Args:
        folder: holds ``program.json``, ``tensors.safetensors`` and ``checksums.json``.
        threads: how many share the work of a call.
        sparse_from: share of zeros (0 to 1) from which a layer runs sparse; default: where it is faster on
            this machine, which is measured once.

    Returns:
        The model.

    Raises:
        ValueError: a folder of another format or version, one whose files are not as they were written, or
            an INT8 model on a processor without AVX-512 VNNI.
    """
    folder = Path(folder)
    try:
        text = (folder / PROGRAM).read_text(encoding="utf-8")
        sums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: no folder of a sparse model ({error})") from error
    for name, expected in sums.items():
        if sha256(folder / name) != expected:
            raise ValueError(f"{folder}: {name} is not as it was written (its checksum differs)")
    program = from_json(text, str(folder))
    model = SparseModel(program, load_file(folder / TENSORS), threads=threads, sparse_from=sparse_from)
    _return_freed_memory()
    return model


def _return_freed_memory() -> None:
    """Give the system back what the compiler and the packing of weights have freed: about 10 MB that glibc
    would keep for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
