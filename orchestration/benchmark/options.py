"""Options of ``espalier benchmark``, checked before any model is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass

from orchestration.commands.output import free_file
from orchestration.common import defaults
from pruners.errors import InputError
from trainers.config.engines import Choice
from trainers.engines.registry import ENGINES, Placement, check
from trainers.sources.columns import ColumnOptions


@dataclass(frozen=True)
class BenchmarkOptions(ColumnOptions):
    """The options as they were typed."""

    models: tuple[str, ...]
    engines: str | None = None
    batch: str = defaults.BATCHES
    data: str | None = None
    calibration: str | None = None
    images: int | None = None
    threads: int | None = None
    repetitions: int = defaults.REPETITIONS
    loss: str = defaults.LOSS
    device: str = defaults.BENCHMARK_DEVICE
    json: str | None = None
    plot: str | None = None
    mlflow: bool = False
    tracking_uri: str | None = None
    storage: str = defaults.STORAGE

    def check(self) -> None:
        """Check the options together.

        Raises:
            InputError: the first option that cannot work; names it and its value.
        """
        if self.device not in ("cpu", "cuda"):
            raise InputError("--device", self.device, "must be cpu or cuda")
        if self.device == "cuda":
            from orchestration.commands.model_source import device_for

            device_for(self.device)
        here = len(os.sched_getaffinity(0))
        if self.threads is not None and self.threads > here:
            raise InputError("--threads", self.threads, f"this process may use {here} processors")
        _ = self.batches, self.choices, self.tolerated
        if self.plot is not None and self.data is None:
            raise InputError("--plot", self.plot, "shows accuracy: give test images by --data")
        for key, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None:
                free_file(path, key)

    @property
    def hardware(self) -> Placement:
        """Threads and device; by default all processors that this process may use."""
        return Placement(self.threads or len(os.sched_getaffinity(0)), self.device)

    @property
    def batches(self) -> tuple[int, ...]:
        """Images at once, smallest first.

        Raises:
            InputError: not a list of positive integers.
        """
        try:
            sizes = sorted({int(part) for part in self.batch.split(",")})
        except ValueError:
            sizes = [0]
        if sizes[0] < 1:
            raise InputError("--batch", self.batch, "must be numbers of images from 1 on, as 1,64")
        return tuple(sizes)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Engines with their data types; by default all that can run here, in their usual type.

        Raises:
            InputError: an unknown engine or type, one that is not installed, or one that cannot run here.
        """
        if self.engines is None:
            return tuple(
                Choice(name, engine.types[0])
                for name, engine in ENGINES.items()
                if self.device in engine.devices and engine.lacking(engine.types[0], self.device) is None
            )
        choices = [Choice.parse(part.strip(), key="--engines") for part in self.engines.split(",")]
        for choice in choices:
            check(choice, self.device, key="--engines")
            if (choice.engine, choice.stored) == ("openvino", "int8") and self.calibration is None:
                wanted = (
                    f"{choice} fixes the ranges of activations: give training images (Parquet: image, label)"
                )
                raise InputError("--calibration", None, wanted)
        return tuple(dict.fromkeys(choices))

    @property
    def tolerated(self) -> float:
        """The share of the first model's accuracy that may be lost.

        Raises:
            InputError: no share of 0 to 1.
        """
        text = self.loss.strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise InputError("--loss", self.loss, "must be a share of the accuracy, as 1% or 0.01")
        return share
