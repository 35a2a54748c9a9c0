"""Jobs: the inputs of a group of workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from trainers.config.base import (
    Count,
    Name,
    Seed,
    Settings,
    Share,
)
from trainers.config.data import DataSettings, ModelSettings
from trainers.config.pruning import Method, PruningSettings
from trainers.config.quantization import Calibration, check_training
from trainers.config.training import TrainingSettings


class Origin(Settings):
    """A checkpoint of another run, from which a run starts if it has no checkpoint of its own."""

    checkpoint: Name = Field(description="folder on the shared storage")
    differs: tuple[Name, ...] = Field(description="keys of the job that may differ from that run's job")


class TrainJob(Settings):
    """The job of a worker group that trains one model, or prunes it and lets it recover."""

    name: Name = Field(description="name in error messages")
    seed: Seed = Field(0, description="of all random choices")
    model: ModelSettings = Field(description="the model to start from")
    data: DataSettings = Field(description="the images, with whole addresses")
    training: TrainingSettings = Field(description="the training, or the recovery from pruning")
    pruning: PruningSettings | None = Field(None, description="the pruning; without it the model is trained")
    method: Method | None = Field(None, description="of pruning")
    allocation: dict[str, int] | None = Field(
        None, description="pruned weights of each layer at the end; without it the method's own allocation"
    )
    quantize: Calibration | None = Field(
        None, description="quantization-aware training: images for its first ranges of activations"
    )
    threads: Count = Field(1, description="CPU threads of each worker")
    keep_folder: str | None = Field(None, description="folder for the best model of each sparsity to keep")
    lineage: Mapping[str, Any] = Field({}, description="origin of the model, recorded in pruning.json")
    origin: Origin | None = Field(None, description="the run from whose checkpoint this run starts")

    @model_validator(mode="after")
    def _trains_for_int8(self) -> TrainJob:
        if self.quantize is not None:
            if self.pruning is not None:
                raise ValueError("pruning: training for INT8 holds the zeros there are; drop pruning")
            check_training(self.training, "training.")
        return self


class OrderJob(Settings):
    """The job of workers that compute the elimination order of a model, and write it to a folder."""

    checkpoint: Name = Field(description="folder or URI of the model whose weights are ordered")
    data: DataSettings = Field(description="the images for the gradients, with whole addresses")
    pruning: PruningSettings = Field(description="settings of the method")
    method: Method = Field(description="of pruning")
    seed: Seed = Field(0, description="decides which images the gradients are of")
    rounds: tuple[Share, ...] = Field((), description="sparsity after each round, if there are several")
    round: int = Field(0, ge=0, description="number of this round, from 0")
    threads: Count = Field(1, description="CPU threads of each worker")
    folder: Name = Field(description="for the order, on the shared storage")
    fingerprint: Name = Field(description="hash of all that the order depends on")
