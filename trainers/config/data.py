"""Settings of the model and of its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainers.config.base import (
    Arguments,
    Name,
    Settings,
    is_weights_file,
)
from trainers.sources.columns import Columns

Mean = Annotated[float, Field(ge=-1e3, le=1e3)]


Deviation = Annotated[float, Field(ge=1e-4, le=1e4)]


class ModelSettings(Settings):
    """The model: a timm architecture (trained here, or ``pretrained``), or a checkpoint to start from.

    Where the checkpoint is a file of weights, ``architecture`` is the model that they belong to.
    """

    architecture: Name | None = Field(None, description="timm model name")
    args: Arguments = Field({}, description="keyword arguments of timm.create_model")
    pretrained: bool = Field(False, description="take timm's own weights as the dense model")
    checkpoint: Name | None = Field(
        None,
        description="folder (any pyarrow URI), hf-hub:NAME, models:/NAME; or a .pth file of architecture",
    )
    classes: Annotated[int, Field(ge=2, le=10**6)] = Field(1000, description="number of classes, 2 at least")

    @model_validator(mode="before")
    @classmethod
    def _checkpoint_path(cls, value: Any) -> Any:
        """Treat timm's argument ``checkpoint_path`` as the key ``checkpoint``."""
        args = value.get("args") if isinstance(value, Mapping) else None
        if not isinstance(args, Mapping) or "checkpoint_path" not in args:
            return value
        if value.get("checkpoint") is not None:
            raise ValueError("checkpoint: args.checkpoint_path names another one; drop one of the two")
        rest = {key: argument for key, argument in args.items() if key != "checkpoint_path"}
        return {**value, "args": rest, "checkpoint": args["checkpoint_path"]}

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        channels = self.args.get("in_chans", 3)
        if channels != 3:
            raise ValueError(f"args: in_chans must be 3, as images are read as RGB ({channels!r} given)")
        if self.is_file:
            if self.pretrained:
                raise ValueError("checkpoint: its weights take the place of timm's; drop pretrained")
            return self
        if (self.architecture is None) == (self.checkpoint is None):
            expected = (
                "; both only where checkpoint is a file of weights (.pth, .pth.tar, .ckpt, .safetensors)"
            )
            both = expected if self.checkpoint is not None else ""
            raise ValueError(f"architecture: give either architecture or checkpoint{both}")
        if self.checkpoint is not None and (self.pretrained or self.args):
            raise ValueError("checkpoint: holds its own weights and args; drop pretrained and args")
        return self

    @property
    def is_file(self) -> bool:
        """Return whether the checkpoint is a single file of weights, and not a checkpoint folder."""
        return self.checkpoint is not None and is_weights_file(self.checkpoint)

    @property
    def is_fetched(self) -> bool:
        """Return whether the checkpoint is a hub's or a registry's, and so not known before it is fetched."""
        return self.checkpoint is not None and self.checkpoint.startswith(("hf-hub:", "models:/"))

    @property
    def ready_made(self) -> bool:
        """Return whether the model comes with weights, so that no dense training is needed."""
        return self.pretrained or self.checkpoint is not None


class DataSettings(Settings):
    """Images as Parquet (``image: {bytes, path}`` or bytes, ``label``): files, folders, globs."""

    source: Literal["digits"] | None = Field(None, description="data that espalier writes itself")
    train: Name | None = Field(
        None, description="training images: a file, folder or glob of Parquet; needed without source"
    )
    validation: Name | None = Field(
        None, description="images by which models are chosen; default: a fixed part of train"
    )
    test: Name | None = Field(
        None,
        description="images of the table at the end, looked at for it alone; default: those of validation",
    )
    holdout: float = Field(
        0.1, gt=0.0, lt=1.0, description="share of train held out where validation is not given"
    )
    mean: tuple[Mean, Mean, Mean] | None = Field(
        None, description="mean of each channel (R, G, B), pixels from 0 to 1; default: the model's own"
    )
    std: tuple[Deviation, Deviation, Deviation] | None = Field(
        None, description="deviation of each channel, pixels from 0 to 1; default: the model's own"
    )
    image_column: Name | None = Field(
        None, description="name of the column; default: the one Image of the hub's metadata, or 'image'"
    )
    label_column: Name | None = Field(
        None, description="name of the column; default: the one ClassLabel of the hub's metadata, or 'label'"
    )
    bad_images: Literal["stop", "skip"] = Field(
        "stop", description="images that cannot be decoded, rows without a label, files that cannot be read"
    )
    bad_limit: int = Field(100, ge=0, le=10**9, description="skip: images of training that may be left out")

    @model_validator(mode="after")
    def _source_or_files(self) -> DataSettings:
        if (self.source is None) == (self.train is None):
            raise ValueError("train: give either source or train")
        if self.source is not None and self.columns.named:
            raise ValueError("image_column, label_column: go with files, not with source")
        if self.image_column is not None and self.image_column == self.label_column:
            raise ValueError("label_column: is the image_column too")
        return self

    @property
    def columns(self) -> Columns:
        """The columns of the tables that the recipe names."""
        return Columns(self.image_column, self.label_column)
