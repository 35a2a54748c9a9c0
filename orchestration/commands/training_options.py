"""Options of ``espalier finetune`` and ``quantize``, checked without torch: mistakes are answered at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from orchestration.commands.prune_options import layer_patterns, one_of
from orchestration.common import defaults
from orchestration.recipe.loading import load_part
from orchestration.recipe.schema import AwareTraining
from pruners.errors import InputError
from trainers.config.quantization import Mode
from trainers.config.training import TrainingSettings
from trainers.sources.columns import ColumnOptions
from trainers.storage import absolute

# a lower rate than for training from the start; a run can go on from each epoch
_DEFAULTS = {"epochs": 10, "lr": {"peak": 1e-4}, "checkpoint_every": 1}


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(ColumnOptions):
    """Options of the commands that may train a checkpoint, as they were typed."""

    checkpoint: str
    out: str
    settings: tuple[str, ...] = ()
    validation: str | None = None
    seed: int = defaults.SEED
    device: str | None = None
    tracking_uri: str | None = None
    storage: str = defaults.STORAGE

    def check(self) -> None:
        """Check the options together.

        Raises:
            InputError: the first thing that cannot work, by its option or key and value.
        """
        if self.device is not None:
            one_of("--device", self.device, ("cpu", "cuda"))


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(CheckpointOptions):
    """Options of ``espalier finetune``."""

    train: str
    classes: int | None = None
    layers: tuple[str, ...] = ()

    def check(self) -> None:
        """Check the options together.

        Raises:
            InputError: the first thing that cannot work, by its option or key and value.
        """
        super().check()
        layer_patterns(self.layers)
        _ = self.training  # raises where a setting is wrong

    @property
    def training(self) -> TrainingSettings:
        """The training's settings.

        Raises:
            InputError: a key or value of ``settings`` that cannot be.
        """
        return load_part(TrainingSettings, self.settings, _DEFAULTS)


@dataclass(frozen=True, kw_only=True)
class AwareOptions(FinetuneOptions):
    """Options of the training for INT8; ``images`` are what its ranges begin with."""

    images: int | None = None

    @property
    def training(self) -> TrainingSettings:
        """The training's settings.

        Raises:
            InputError: a key or value of ``settings`` that cannot be, or not with fake quantization.
        """
        return load_part(AwareTraining, self.settings, {"checkpoint_every": 1})


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(CheckpointOptions):
    """Options of ``espalier quantize``."""

    mode: str
    train: str | None = None
    test: str | None = None
    images: int | None = None

    def check(self) -> None:
        """Check the options together.

        Raises:
            InputError: the first thing that cannot work, by its option or key and value.
        """
        one_of("--mode", self.mode, get_args(Mode))
        super().check()
        of_training = {"--validation": self.validation, "KEY=VALUE": " ".join(self.settings) or None}
        if self.mode != "qat":
            self._refuse(of_training | {"--device": self.device}, "trains nothing; it goes with --mode qat")
        if self.mode == "dynamic":
            self._refuse({"--train": self.train, "--images": self.images}, "needs no images; drop it")
        elif self.train is None:
            wanted = f"{self.mode} takes ranges from training images: give some (Parquet: image, label)"
            raise InputError("--train", None, wanted)
        if self.mode == "qat":
            _ = self.aware.training  # raises where a setting is wrong

    @property
    def hidden(self) -> Path:
        """The hidden folder for the result of the training, until the INT8 folder is written."""
        out = Path(absolute(self.out, "OUT"))
        return out.with_name(f".{out.name}.float")

    @property
    def aware(self) -> AwareOptions:
        """Options of the training; its result lies hidden beside ``out`` until the INT8 folder is written."""
        assert self.train is not None, "checked"
        shared = {field.name: getattr(self, field.name) for field in fields(CheckpointOptions)}
        return AwareOptions(**shared | {"train": self.train, "images": self.images, "out": str(self.hidden)})

    def _refuse(self, given: Mapping[str, object], why: str) -> None:
        for key, value in given.items():
            if value is not None:
                raise InputError(key, value, f"{self.mode} quantisation {why}")
