"""Settings of training; without torch, so that the command line starts fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from trainers.config.base import (
    Arguments,
    Count,
    Expression,
    Images,
    Name,
    Rate,
    Settings,
    Share,
    Steps,
)
from trainers.config.presets import TRAINING, merged
from trainers.config.schedules import LearningRate


class AugmentSettings(Settings):
    """Augmentation of training images; by default they are only resized and normalised."""

    shift: int = Field(0, ge=0, le=4096, description="random shift, pixels")
    scale: tuple[Share, Share] | None = Field(
        None, description="random resized crops: least and largest share of the image's area, as [0.08, 1]"
    )
    flip: Share = Field(0.0, description="probability of a horizontal flip, 0 to 1")
    rand_augment: Name | None = Field(None, description="timm's string, rand-m9-mstd0.5-inc1")
    erasing: Share = Field(0.0, description="probability that a random rectangle is erased, 0 to 1")
    mixup: Rate = Field(0.0, description="α of the Beta distribution of mixup's shares; 0: no mixup")
    cutmix: Rate = Field(0.0, description="α of the Beta distribution of CutMix's areas; 0: no CutMix")


class DistillSettings(Settings):
    """Distillation: the model learns from a teacher's outputs beside the labels.

    ``soft`` learns from the teacher's logits (Hinton et al., 2015), ``hard`` from the class that it predicts
    (Touvron et al., 2021). Models with a distillation head (DeiT's) learn from the teacher by that head
    alone.
    """

    teacher: Name = Field("dense", description="dense (what the run starts from), a timm model or a folder")
    kind: Literal["soft", "hard"] = Field(
        "soft", description="soft: by the teacher's logits; hard: by the class that it predicts"
    )
    weight: float = Field(
        0.5, gt=0.0, le=1.0, description="the teacher's share of the loss; the rest is the labels'"
    )
    temperature: float = Field(
        1.0, ge=1e-3, le=1e3, description="soft: what logits of teacher and model are divided by"
    )


class TrainingSettings(Settings):
    """How a model is trained, or recovers from pruning; a ``preset`` sets augmentation and regularisation."""

    preset: Literal["light1", "light2", "medium1", "medium2", "deit"] | None = Field(
        None,
        description="augmentation, weight_decay, clip_grad and drop_path by name, from weak to strong; keys "
        "given beside it override it",
    )
    epochs: Steps = Field(30, description="passes over the training images, 1 to 100,000")
    batch_size: Count = Field(64, description="images a step over all workers")
    accumulate: Count = Field(1, description="parts that a worker takes its images of a step in")
    optimizer: Name = Field("adamw", description="timm optimizer name")
    optimizer_args: Arguments = Field({}, description="its keyword arguments, as {betas: [0.9, 0.95]}")
    lr: LearningRate = LearningRate()
    weight_decay: Rate = Field(0.05, description="not for biases and norms")
    layer_decay: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="factor of the learning rate from each layer to the one below; null: 1",
    )
    clip_grad: float | None = Field(
        1.0, gt=0.0, le=1e9, description="largest norm of the gradient of all weights; null: not clipped"
    )
    label_smoothing: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of a label that all classes have alike, 0 to below 1"
    )
    drop_path: float | None = Field(None, ge=0.0, lt=1.0, description="default: the model's own")
    augment: AugmentSettings = AugmentSettings()
    distill: DistillSettings | None = Field(
        None, description="learn from a teacher's outputs beside the labels; {}: with the values below"
    )
    freeze: tuple[Expression, ...] = Field(
        (), description="regular expressions of parameters that stay as they are"
    )
    ema: float | None = Field(None, gt=0.0, lt=1.0, description="decay of a moving average of the weights")
    moments: Literal["mask", "reset"] = Field(
        "mask",
        description="what the optimizer remembers after a pruning step: all but what was pruned, or nothing",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="of forward passes, mixed with float32 (autocast); float16 scales the loss",
    )
    channels_last: bool = Field(
        False, description="layout of images and convolutions in memory: channels last (NHWC)"
    )
    compile: bool = Field(False, description="torch.compile")
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="a step that is not finite: end the run, or leave it out (ten of a run at most)"
    )
    data_workers: int = Field(0, ge=0, le=1024, description="decoding processes of each worker")
    checkpoint_every: Count = Field(5, description="epochs between two checkpoints of a run")
    checkpoint_minutes: float | None = Field(
        10.0, gt=0.0, le=1e6, description="within an epoch too, this many minutes apart"
    )
    checkpoint_steps: Images | None = Field(None, description="within an epoch too, this many steps apart")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, value: Any) -> Any:
        preset = value.get("preset") if isinstance(value, Mapping) else None
        if not isinstance(preset, str) or preset not in TRAINING:
            return value  # no preset, or an unknown one, which is refused later
        return merged(TRAINING[preset], value)

    @model_validator(mode="after")
    def _warm_up_within(self) -> TrainingSettings:
        if self.lr.warmup_epochs > self.epochs:
            raise ValueError(
                f"lr.warmup_epochs: {self.lr.warmup_epochs:g} must not be more than epochs ({self.epochs})"
            )
        return self
