"""Jobs: everything that a group of workers gets before it starts."""

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
    """A checkpoint of another run, from which a run starts that has no checkpoint of its own."""

    checkpoint: Name = Field(description="folder on the shared storage")
    differs: tuple[Name, ...] = Field(description="keys of the job that need not be as they were there")


class TrainJob(Settings):
    """Everything a worker group needs to train, or to prune and recover, one model."""

    name: Name
    seed: Seed = 0
    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    pruning: PruningSettings | None = None
    method: Method | None = None
    allocation: dict[str, int] | None = Field(None, description="searched: pruned weights a layer at the end")
    quantize: Calibration | None = Field(
        None, description="quantisation-aware training, and what its ranges begin with"
    )
    threads: Count = 1
    keep_folder: str | None = Field(None, description="where the best model of each sparsity is kept")
    lineage: Mapping[str, Any] = Field({}, description="recorded in pruning.json")
    origin: Origin | None = Field(None, description="the run that this one branches off from")

    @model_validator(mode="after")
    def _trains_for_int8(self) -> TrainJob:
        if self.quantize is not None:
            if self.pruning is not None:
                raise ValueError("pruning: training for INT8 holds the zeros there are; drop pruning")
            check_training(self.training, "training.")
        return self


class OrderJob(Settings):
    """Everything that workers need to order the weights of a dense model, and to write that down."""

    checkpoint: Name
    data: DataSettings
    pruning: PruningSettings
    method: Method
    seed: Seed = 0
    rounds: tuple[Share, ...] = Field((), description="sparsity of each round, where there are several")
    round: int = Field(0, ge=0, description="which of them this is; the checkpoint is the one before's")
    threads: Count = 1
    folder: Name = Field(description="of the order, on the shared storage")
    fingerprint: Name
