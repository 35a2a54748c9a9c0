"""What the parts of a recipe are made of: typed, checked, free of torch so that the CLI answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


Name = Annotated[str, AfterValidator(_not_blank)]


_WEIGHTS = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors")


def is_weights_file(uri: str) -> bool:
    """Whether a checkpoint is a file of weights, as training scripts write it, and no folder."""
    try:
        return uri.lower().endswith(_WEIGHTS) and not Path(uri).expanduser().is_dir()
    except RuntimeError:  # ~nobody
        return True


class Settings(BaseModel):
    """Base of every part of a recipe: unknown keys are refused, values never change after they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
