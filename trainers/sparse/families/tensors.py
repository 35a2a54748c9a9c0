"""The tensors of a model as they are stored in its folder, and the blocks that all families share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers.sparse.engine import SPARSE_FROM
from trainers.sparse.kernels.int8 import EXTRA_ROWS
from trainers.sparse.program import LayerNorm, Level, Linear, Operation, Program, Quantize
from trainers.sparse.weights import to_int8

Tensors = dict[str, NDArray[np.generic]]


def numbers(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def add_linear(
    tensors: Tensors,
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    *,
    factor: Tensor | None = None,
    int8: bool = False,
) -> None:
    """Add the tensors of a linear layer.

    Args:
        tensors: gets them, under names that begin with ``name``.
        name: of the layer.
        weight: [outputs, inputs].
        bias: [outputs]; ``None``: zeros.
        factor: [outputs], factors of the outputs (LayerScale), which weights and bias take up.
        int8: store the weights as bytes, without the blocks of four zeros.
    """
    weight = weight.detach().float()
    bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()
    if factor is not None:
        weight, bias = weight * factor.detach()[:, None], bias * factor.detach()
    tensors[f"{name}/bias"] = numbers(bias)
    matrix = numbers(weight)
    if int8:
        whole, tensors[f"{name}/steps"] = to_int8(matrix)
        blocks = whole.reshape(len(whole), -1, 4)
        kept = np.nonzero(blocks.any(axis=2))
        tensors[f"{name}/blocks"] = np.ascontiguousarray(blocks[kept])
        _add_places(tensors, name, *kept, shape=matrix.shape)
        return
    if np.count_nonzero(matrix) > (1 - SPARSE_FROM) * matrix.size or matrix.shape[1] > 65535:
        tensors[f"{name}/weight"] = matrix
        return
    kept = np.nonzero(matrix)
    tensors[f"{name}/values"] = matrix[kept]
    _add_places(tensors, name, *kept, shape=matrix.shape)


def _add_places(
    tensors: Tensors,
    name: str,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    *,
    shape: tuple[int, ...],
) -> None:
    """Add the positions of the stored numbers or blocks of a matrix: their number in each row, their columns.

    Args:
        tensors: gets them, under names that begin with ``name``.
        name: of the layer.
        rows: of the stored numbers, ascending.
        columns: of the stored numbers (or of their blocks).
        shape: of the matrix.
    """
    tensors[f"{name}/counts"] = np.bincount(rows, minlength=shape[0]).astype(np.int32)
    tensors[f"{name}/columns"] = columns.astype(np.uint16)
    tensors[f"{name}/inputs"] = np.array([shape[1]], dtype=np.int64)


def add_norm(tensors: Tensors, name: str, norm: nn.LayerNorm) -> float:
    """Add the tensors of a LayerNorm; return its epsilon."""
    size = int(np.prod(norm.normalized_shape))
    tensors[f"{name}/scale"] = numbers(torch.ones(size) if norm.weight is None else norm.weight)
    tensors[f"{name}/shift"] = numbers(torch.zeros(size) if norm.bias is None else norm.bias)
    return float(norm.eps)


@dataclass
class Writer:
    """Collects the tensors and buffers of a program while its operations are listed.

    Args:
        int8: whether linear layers have INT8 weights, and inputs that are quantized token by token.
    """

    int8: bool = False
    tensors: Tensors = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)

    def buffer(self, name: str, features: int) -> str:
        """Make a buffer of at least ``features`` features; return its name."""
        self.buffers[name] = max(self.buffers.get(name, 0), features)
        return name

    def norm(self, name: str, norm: nn.LayerNorm, source: str, target: str) -> Operation:
        """Add a LayerNorm from the buffer ``source`` to the buffer ``target``."""
        features = int(np.prod(norm.normalized_shape))
        return LayerNorm(name, source, self.buffer(target, features), add_norm(self.tensors, name, norm))

    def linear(
        self,
        name: str,
        module: nn.Linear,
        source: str,
        target: str,
        *,
        factor: Tensor | None = None,
        residual: bool = False,
        gelu: bool = False,
    ) -> list[Operation]:
        """Add a linear layer; with ``int8``, if its inputs are a multiple of four, also their quantization.

        Args:
            name: of the layer.
            module: the layer.
            source: buffer of the inputs.
            target: buffer of the outputs.
            factor: [outputs], factors of the outputs (LayerScale).
            residual: add the outputs to the buffer.
            gelu: apply GELU to the outputs.

        Returns:
            The operations.
        """
        as_bytes = self.int8 and module.in_features % 4 == 0
        add_linear(self.tensors, name, module.weight, module.bias, factor=factor, int8=as_bytes)
        self.buffer(target, module.out_features)
        if not as_bytes:
            return [Linear(name, source, target, residual, gelu)]
        quantized = self.buffer("quantized", module.in_features // 4 + EXTRA_ROWS)
        return [
            Quantize(source, quantized, module.in_features),
            Linear(name, quantized, target, residual, gelu, int8=True),
        ]

    def mlp(self, name: str, block: Any, stream: str, scale: Tensor | None = None) -> list[Operation]:
        """Add the second half of a block: ``stream += MLP(norm2(stream))``."""
        return [
            self.norm(f"{name}.norm2", block.norm2, stream, "norm"),
            *self.linear(f"{name}.mlp.fc1", block.mlp.fc1, "norm", "hidden", gelu=True),
            *self.linear(f"{name}.mlp.fc2", block.mlp.fc2, "hidden", stream, factor=scale, residual=True),
        ]

    def head(self, *heads: nn.Module) -> None:
        """Add the classifiers."""
        for number, head in enumerate(heads):
            if isinstance(head, nn.Linear):
                bias = torch.zeros(head.out_features) if head.bias is None else head.bias
                self.tensors[f"head/weight{number}"] = numbers(head.weight)
                self.tensors[f"head/bias{number}"] = numbers(bias)

    def program(self, model: Any, levels: Sequence[Level], output: str, **about: Any) -> Program:
        """Make the program of a timm model that cuts its images into patches by ``patch_embed``.

        Args:
            model: the model.
            levels: its levels.
            output: the buffer with the tokens after the last level.
            about: the other fields of :class:`trainers.sparse.program.Program`: pool, classes and so on.

        Returns:
            The program.
        """
        embedding = model.patch_embed.proj
        height, width = model.patch_embed.img_size
        return Program(
            channels=embedding.in_channels,
            height=height,
            width=width,
            patch=tuple(embedding.kernel_size),
            buffers=self.buffers,
            local=tuple(name for name in LOCAL if name in self.buffers),
            levels=tuple(levels),
            output=output,
            preprocessing=dict(getattr(model, "pretrained_cfg", None) or {}),
            **about,
        )


LOCAL = ("patches", "merged", "norm", "hidden", "quantized")
"""Buffers of which each thread has its own."""


def check_mlp(name: str, mlp: nn.Module) -> None:
    """Check that an MLP has GELU in its exact form, and no norm inside.

    Raises:
        ValueError: it is another MLP; names it.
    """
    act = getattr(mlp, "act", None)
    exact = type(act).__name__ == "GELU" and getattr(act, "approximate", "none") == "none"
    if type(mlp).__name__ != "Mlp" or not exact:
        raise ValueError(f"{name}.mlp: only an MLP with GELU in its exact form is packed")
    check_identity(f"{name}.mlp.norm", getattr(mlp, "norm", None))


def check_identity(name: str, part: nn.Module | None) -> None:
    """Check that an optional part is missing or an identity.

    Raises:
        ValueError: it is another module; names it.
    """
    if part is not None and not isinstance(part, nn.Identity):
        raise ValueError(f"{name}: a {type(part).__name__} here is not packed")


def check_norm(name: str, part: nn.Module) -> None:
    """Check that a norm is a LayerNorm.

    Raises:
        ValueError: it is another norm; names it.
    """
    if not isinstance(part, nn.LayerNorm):
        raise ValueError(f"{name}: a {type(part).__name__} here is not packed, only a LayerNorm")
