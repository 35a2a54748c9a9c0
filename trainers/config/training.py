"""What one worker group is asked to do: typed, checked, and free of torch so that the CLI answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, model_validator

from pruners.errors import InputError
from pruners.model.sparsity_pattern import Pattern
from trainers.config.base import (
    Arguments,
    Count,
    Distinct,
    Expression,
    Images,
    Name,
    Rate,
    Seed,
    Settings,
    Share,
    Steps,
    is_weights_file,
)
from trainers.config.presets import TRAINING, merged
from trainers.config.quantization import Calibration, check_training
from trainers.config.schedules import LearningRate, PruningSchedule
from trainers.sources.columns import Columns

PerLayer = Share | dict[str, Share]
Method = Literal[
    "dimap", "dimap+ovit", "lamp", "magnitude", "magnitude_global", "ovit", "ovit_fast", "woodfisher"
]
SECOND_ORDER = frozenset({"dimap+ovit", "ovit", "ovit_fast", "woodfisher"})
ScopeName = Literal["layer", "module", "stage", "global"]
Mean = Annotated[float, Field(ge=-1e3, le=1e3)]
Deviation = Annotated[float, Field(ge=1e-4, le=1e4)]
Patterns = Annotated[tuple[Expression, ...], Field(min_length=1)]


class ModelSettings(Settings):
    """A timm architecture (trained by us, or ``pretrained``), or a checkpoint to start from; with a file of
    weights as the checkpoint the architecture says what they are of."""

    architecture: Name | None = Field(None, description="timm model name")
    args: Arguments = Field({}, description="keyword arguments of timm.create_model")
    pretrained: bool = Field(False, description="take timm's own weights as the dense model")
    checkpoint: Name | None = Field(
        None,
        description="folder (any pyarrow URI), hf-hub:NAME, models:/NAME; or a .pth file of architecture",
    )
    classes: Annotated[int, Field(ge=2, le=10**6)] = Field(
        1000, description="of one class there is nothing to learn: its loss is 0"
    )

    @model_validator(mode="before")
    @classmethod
    def _checkpoint_path(cls, value: Any) -> Any:
        """timm's own argument for a file of weights, which is none of the architecture's."""
        args = value.get("args") if isinstance(value, Mapping) else None
        if not isinstance(args, Mapping) or "checkpoint_path" not in args:
            return value
        if value.get("checkpoint") is not None:
            raise ValueError("checkpoint: args.checkpoint_path names another one; drop one of the two")
        rest = {key: one for key, one in args.items() if key != "checkpoint_path"}
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
        """Whether the checkpoint is a file of weights, and no folder with all that describes them."""
        return self.checkpoint is not None and is_weights_file(self.checkpoint)

    @property
    def ready_made(self) -> bool:
        """Whether weights come with it, so that no dense training is needed."""
        return self.pretrained or self.checkpoint is not None


class DataSettings(Settings):
    """Images as Parquet (``image: {bytes, path}`` or bytes, ``label``): files, folders, globs."""

    source: Literal["digits"] | None = Field(None, description="data that espalier writes itself")
    train: Name | None = None
    validation: Name | None = Field(None, description="default: a fixed part of train is held out")
    test: Name | None = None
    holdout: float = Field(0.1, gt=0.0, lt=1.0, description="part of train held out without validation")
    mean: tuple[Mean, Mean, Mean] | None = Field(None, description="default: the model's own")
    std: tuple[Deviation, Deviation, Deviation] | None = None
    image_column: Name | None = Field(
        None, description="default: the one Image of the hub's metadata, or 'image'"
    )
    label_column: Name | None = Field(
        None, description="default: the one ClassLabel of the hub's metadata, or 'label'"
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
        return Columns(self.image_column, self.label_column)


class AugmentSettings(Settings):
    """Augmentation of training images; the default does nothing but resize and normalise."""

    shift: int = Field(0, ge=0, le=4096, description="random shift, pixels")
    scale: tuple[Share, Share] | None = Field(None, description="area of random resized crops")
    flip: Share = 0.0
    rand_augment: Name | None = Field(None, description="timm's string, rand-m9-mstd0.5-inc1")
    erasing: Share = 0.0
    mixup: Rate = 0.0
    cutmix: Rate = 0.0


class DistillSettings(Settings):
    """A teacher whose outputs the model learns from beside the labels (hard: its choice; soft: its logits).

    Models with a distillation head (DeiT's) learn from the teacher with that head alone.
    """

    teacher: Name = Field("dense", description="dense (what the run starts from), a timm model or a folder")
    kind: Literal["soft", "hard"] = "soft"
    weight: float = Field(0.5, gt=0.0, le=1.0, description="share of the loss")
    temperature: float = Field(1.0, ge=1e-3, le=1e3, description="soft: of both sides")


class TrainingSettings(Settings):
    """How a model is trained, or recovers; a ``preset`` sets augmentation and regularisation."""

    preset: Literal["light1", "light2", "medium1", "medium2", "deit"] | None = None
    epochs: Steps = 30
    batch_size: Count = Field(64, description="images a step over all workers")
    accumulate: Count = Field(1, description="parts that a worker takes its images of a step in")
    optimizer: Name = Field("adamw", description="timm optimizer name")
    optimizer_args: Arguments = Field({}, description="its keyword arguments, as {betas: [0.9, 0.95]}")
    lr: LearningRate = LearningRate()
    weight_decay: Rate = Field(0.05, description="not for biases and norms")
    layer_decay: float | None = Field(None, gt=0.0, le=1.0, description="learning rate, layer by layer down")
    clip_grad: float | None = Field(1.0, gt=0.0, le=1e9)
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    drop_path: float | None = Field(None, ge=0.0, lt=1.0, description="default: the model's own")
    augment: AugmentSettings = AugmentSettings()
    distill: DistillSettings | None = None
    freeze: tuple[Expression, ...] = Field(
        (), description="regular expressions of parameters that stay as they are"
    )
    ema: float | None = Field(None, gt=0.0, lt=1.0, description="decay of a moving average of the weights")
    moments: Literal["mask", "reset"] = Field(
        "mask", description="what the optimizer remembers after a pruning step: all but what fell, or nothing"
    )
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = Field(False, description="torch.compile")
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="a step that is not finite: end the run, or leave it out (ten of a run at most)"
    )
    data_workers: int = Field(0, ge=0, le=1024, description="decoding processes of each worker")
    checkpoint_every: Count = Field(5, description="epochs")
    checkpoint_minutes: float | None = Field(
        10.0, gt=0.0, le=1e6, description="within an epoch too, this far apart"
    )
    checkpoint_steps: Images | None = Field(None, description="within an epoch too, this many steps apart")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, value: Any) -> Any:
        preset = value.get("preset") if isinstance(value, Mapping) else None
        if not isinstance(preset, str) or preset not in TRAINING:
            return value  # no preset, or one that is refused
        return merged(TRAINING[preset], value)

    @model_validator(mode="after")
    def _warm_up_within(self) -> TrainingSettings:
        if self.lr.warmup_epochs > self.epochs:
            raise ValueError(
                f"lr.warmup_epochs: {self.lr.warmup_epochs:g} must not be more than epochs ({self.epochs})"
            )
        return self


def _not_sexagesimal(value: object) -> object:
    """YAML reads 2:4 without quotes as a number of base 60."""
    return f"{value // 60}:{value % 60}" if isinstance(value, int) and value >= 60 else value


PatternName = Annotated[Name, BeforeValidator(_not_sexagesimal)]


class FisherSettings(Settings):
    """The Fisher of second-order methods: small batches, blocks of B weights, damping λ.

    Without values of its own each method takes its defaults (``ovit`` m = 4096 and λ = 1e-8; ``ovit_fast``
    m = 256 and λ = 1e-2 of the mean diagonal).
    """

    gradients: Count | None = Field(None, description="m, over all workers")
    batch_size: Count = Field(128, description="images of a gradient")
    per_sample: bool = Field(False, description="a gradient of each image instead of each batch")
    block_size: Count | dict[str, Count] = Field(192, description="B, for all layers or for each module")
    damp: Annotated[float, Field(gt=0.0, le=1e9)] | Literal["auto"] | None = Field(
        None, description="λ; auto tries 1e-4 … 1e-9 on held-out training images before each pruning step"
    )
    relative: bool | None = Field(None, description="λ is a share of the mean of each layer's diagonal")
    double: bool = Field(False, description="sums in float64")
    memory: ByteSize | None = Field(
        None, description="for the Fisher of a worker, as 8GiB; default 60 % of what is free"
    )


class PruningSettings(Settings):
    """What is pruned, and how far."""

    methods: Annotated[tuple[Method, ...], Distinct] = Field(("dimap", "ovit"), min_length=1)
    sparsity: Share = 0.75
    layers: dict[Name, Patterns] | None = Field(
        None, min_length=1, description="module -> regular expressions"
    )
    pattern: PatternName = Field("unstructured", description="unstructured, N:M as 2:4 or 4:8, or 1x4")
    unfit: Literal["refuse", "dense"] = Field("refuse", description="layers that the pattern cannot fit")
    scope: ScopeName | None = Field(None, description="what shares one threshold; default the method's own")
    table: dict[Expression, Share] | None = Field(
        None, min_length=1, description="layer-name pattern -> sparsity, instead of thresholds"
    )
    floor: PerLayer = Field(0.0, description="least sparsity of a layer, or of those that a pattern matches")
    ceiling: PerLayer = Field(1.0, description="largest sparsity of a layer, or by patterns")
    schedule: PruningSchedule = PruningSchedule()
    keep: Annotated[tuple[Share, ...], Distinct] = Field(
        (), description="sparsities on the way whose best model is kept too"
    )
    fisher: FisherSettings = FisherSettings()

    @model_validator(mode="after")
    def _floor_below_ceiling(self) -> PruningSettings:
        self.check_reach(self.sparsity, "sparsity")
        self.schedule.check(self.sparsity)
        if self.table is not None and self.scope is not None:
            raise ValueError("table: says what each layer gives up; drop scope")
        return self

    def check_reach(self, sparsity: float, key: str) -> None:
        """Raises:
        ValueError: a sparsity that floor, ceiling or the pattern do not allow.
        """
        floor = self.floor if isinstance(self.floor, float) else 0.0
        ceiling = self.ceiling if isinstance(self.ceiling, float) else 1.0
        if not floor <= sparsity <= ceiling:
            raise ValueError(
                f"{key}: cannot be met with floor {floor} and ceiling {ceiling}; "
                f"nearest feasible: {min(max(sparsity, floor), ceiling)}"
            )
        forced = forced_sparsity(self.pattern)
        if forced is not None and abs(sparsity - forced) > 1e-9:
            raise ValueError(f"{key}: {self.pattern} leads to {forced:g}, no other ({sparsity} given)")

    def options(self, method: str) -> dict[str, Any]:
        """Constructor arguments of a method (``damp: auto`` is for those who order, not for the method)."""
        found: dict[str, Any] = {"pattern": self.pattern}
        if method in SECOND_ORDER:
            fisher = self.fisher
            found |= {"block_size": fisher.block_size, "double": fisher.double}
            found |= {
                key: value
                for key in ("gradients", "damp", "relative")
                if (value := getattr(fisher, key)) not in (None, "auto")
            }
            if isinstance(fisher.damp, float) and fisher.relative is None:
                found["relative"] = False  # a λ that is given is meant as it stands
        return found

    def tries_damps(self, method: str) -> bool:
        return method in SECOND_ORDER and self.fisher.damp == "auto"


def forced_sparsity(pattern: str) -> float | None:
    """What an N:M pattern leads to.

    Raises:
        ValueError: no pattern at all.
    """
    try:
        return Pattern.parse(pattern).forced
    except InputError as error:
        raise ValueError(f"pattern: {error.expected} ({pattern!r} given)") from None


class Origin(Settings):
    """A checkpoint of another run, which a run that has none of its own goes on from."""

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
    threads: Count = 1
    folder: Name = Field(description="of the order, on the shared storage")
    fingerprint: Name


__all__ = [
    "SECOND_ORDER",
    "AugmentSettings",
    "DataSettings",
    "DistillSettings",
    "FisherSettings",
    "LearningRate",
    "Method",
    "ModelSettings",
    "Name",
    "OrderJob",
    "Origin",
    "PerLayer",
    "PruningSchedule",
    "PruningSettings",
    "ScopeName",
    "Settings",
    "Share",
    "TrainJob",
    "TrainingSettings",
    "forced_sparsity",
]
