"""From a timm vision transformer to the folder that :mod:`trainers.sparse.runtime` reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file
from torch import nn

from trainers.checkpoint import checksums
from trainers.data.preprocessing import Preprocessing
from trainers.sparse.families.swin import check as check_swin
from trainers.sparse.families.swin import swin_transformer
from trainers.sparse.families.tensors import Tensors
from trainers.sparse.families.vision_transformer import check as check_vision_transformer
from trainers.sparse.families.vision_transformer import vision_transformer
from trainers.sparse.program import Program, to_json
from trainers.sparse.runtime import PROGRAM, TENSORS

_VIT = check_vision_transformer, vision_transformer
_FAMILIES = {
    "VisionTransformer": _VIT,
    "VisionTransformerDistilled": _VIT,
    "SwinTransformer": (check_swin, swin_transformer),
}


def check(model: Any) -> None:
    """Check that the engine can run a model, by its structure alone.

    Args:
        model: of timm, on any device, the meta device too.

    Raises:
        ValueError: another kind of model, or a part that the engine has no operation for, by its name.
    """
    kind = type(model).__name__
    if kind not in _FAMILIES:
        raise ValueError(f"{kind}: only timm's VisionTransformer and SwinTransformer are packed")
    _FAMILIES[kind][0](model)


def packed(model: Any, *, int8: bool = False) -> tuple[Program, Tensors]:
    """Convert a model to the program and the tensors that the engine runs.

    Args:
        model: a timm ``VisionTransformer`` or ``SwinTransformer``.
        int8: whether the linear layers of its blocks have INT8 weights.

    Returns:
        The program, and the tensors by name.

    Raises:
        ValueError: another model, or a part that the engine has no operation for, by its name.
    """
    check(model)
    return _FAMILIES[type(model).__name__][1](model, int8=int8)


def pack(
    model: nn.Module,
    folder: str | Path,
    *,
    int8: bool = False,
    preprocessing: Preprocessing | None = None,
) -> Program:
    """Write the folder of a model: ``program.json``, ``tensors.safetensors`` and their checksums.

    Args:
        model: a timm ``VisionTransformer`` or ``SwinTransformer``; its zeros are left out.
        folder: an empty folder, or one that is made.
        int8: INT8 weights, where zeros save time in blocks of 1 × 4.
        preprocessing: how images are prepared, and the names of the classes
            (:mod:`trainers.data.preprocessing`); default: timm's own configuration.

    Returns:
        The program that was written.

    Raises:
        ValueError: a model with a part that the engine cannot run.
    """
    program, tensors = packed(model, int8=int8)
    if preprocessing is not None:
        program = replace(program, preprocessing=dict(preprocessing))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(program), default=str, indent=1)
    (folder / PROGRAM).write_text(text, encoding="utf-8")
    save_file(tensors, folder / TENSORS)
    sums = checksums.sums(folder, (PROGRAM, TENSORS))
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
    return program
