"""What one worker group is asked to do: typed, checked, and free of torch so that the CLI answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Method = Literal["dimap", "magnitude", "ovit"]
ScopeName = Literal["layer", "module", "stage", "global"]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


Name = Annotated[str, AfterValidator(_not_blank)]


class Settings(BaseModel):
    """Base of every part of a recipe: unknown keys are refused, values never change after they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSettings(Settings):
    """A timm architecture (trained by us, or ``pretrained``), or a checkpoint to start from."""

    architecture: Name | None = Field(None, description="timm model name")
    args: dict[str, Any] = Field({}, description="keyword arguments of timm.create_model")
    pretrained: bool = Field(False, description="take timm's own weights as the dense model")
    checkpoint: Name | None = Field(None, description="folder (any pyarrow URI), hf-hub:NAME or models:/NAME")
    classes: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if (self.architecture is None) == (self.checkpoint is None):
            raise ValueError("architecture: give either architecture or checkpoint")
        if self.checkpoint is not None and (self.pretrained or self.args):
            raise ValueError("checkpoint: holds its own weights and args; drop pretrained and args")
        return self

    @property
    def ready_made(self) -> bool:
        """Whether weights come with it, so that no dense training is needed."""
        return self.pretrained or self.checkpoint is not None


class DataSettings(Settings):
    """Images as Parquet in the Hugging Face layout (``image: {bytes, path}``, ``label``)."""

    source: Literal["digits"] | None = Field(None, description="data that espalier writes itself")
    train: Name | None = None
    validation: Name | None = Field(None, description="default: a fixed part of train is held out")
    test: Name | None = None
    holdout: float = Field(0.1, gt=0.0, lt=1.0, description="part of train held out without validation")
    mean: tuple[float, float, float] | None = Field(None, description="default: the model's own")
    std: tuple[float, float, float] | None = None

    @model_validator(mode="after")
    def _source_or_files(self) -> DataSettings:
        if (self.source is None) == (self.train is None):
            raise ValueError("train: give either source or train")
        return self


class AugmentSettings(Settings):
    """Augmentation of training images; the default does nothing but resize and normalise."""

    shift: int = Field(0, ge=0, description="random shift, pixels")
    scale: tuple[Share, Share] | None = Field(None, description="area of random resized crops")
    flip: Share = 0.0
    rand_augment: Name | None = Field(None, description="timm's string, rand-m9-mstd0.5-inc1")
    erasing: Share = 0.0
    mixup: float = Field(0.0, ge=0.0)
    cutmix: float = Field(0.0, ge=0.0)


class LearningRate(Settings):
    """``cosine``: warm-up, then one cosine to the floor. ``cyclic``: a jump to the peak at each pruning step,
    then linear to the floor until the next."""

    kind: Literal["cosine", "cyclic"] = "cosine"
    peak: float = Field(1e-3, gt=0.0)
    floor: float = Field(0.0, ge=0.0)
    warmup_epochs: float = Field(0.0, ge=0.0)
    cycle_peaks: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(
        (), description="cyclic: a peak for each cycle in place of one for all; the last goes on"
    )

    @model_validator(mode="after")
    def _floor_below_peak(self) -> LearningRate:
        if self.floor > self.peak:
            raise ValueError(f"floor: must not lie above peak ({self.peak})")
        return self


class TrainingSettings(Settings):
    """How a model is trained, or recovers after pruning."""

    epochs: int = Field(30, ge=1)
    batch_size: int = Field(64, ge=1, description="images a step over all workers")
    optimizer: Name = Field("adamw", description="timm optimizer name")
    lr: LearningRate = LearningRate()
    weight_decay: float = Field(0.05, ge=0.0)
    clip_grad: float | None = Field(1.0, gt=0.0)
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    augment: AugmentSettings = AugmentSettings()
    data_workers: int = Field(0, ge=0, description="decoding processes of each worker")
    checkpoint_every: int = Field(5, ge=1, description="epochs")


class FisherSettings(Settings):
    """oViT's Fisher: ``gradients`` small batches over all workers, blocks of B weights, damping λ."""

    gradients: int = Field(4096, ge=1)
    batch_size: int = Field(128, ge=1)
    block_size: int = Field(192, ge=1)
    damp: float = Field(1e-8, gt=0.0)


class PruningSchedule(Settings):
    """Gradual pruning: ``steps`` raises, linear from ``start`` to the target, the last at ``last_at``."""

    start: Share = Field(0.5, description="sparsity of the first step (of a run with several)")
    steps: int = Field(4, ge=1)
    last_at: float = Field(
        0.5, ge=0.0, lt=1.0, description="share of the epochs at which the last step falls"
    )


class PruningSettings(Settings):
    """What is pruned, and how far."""

    methods: tuple[Method, ...] = Field(("dimap", "ovit"), min_length=1)
    sparsity: Share = 0.75
    layers: dict[str, tuple[str, ...]] | None = Field(None, description="module -> regular expressions")
    scope: ScopeName | None = Field(None, description="what shares one threshold; default the method's own")
    floor: Share = Field(0.0, description="least sparsity of a layer")
    ceiling: Share = Field(1.0, description="largest sparsity of a layer")
    schedule: PruningSchedule = PruningSchedule()
    fisher: FisherSettings = FisherSettings()

    @model_validator(mode="after")
    def _floor_below_ceiling(self) -> PruningSettings:
        if not self.floor <= self.sparsity <= self.ceiling:
            raise ValueError(
                f"sparsity: cannot be met with floor {self.floor} and ceiling {self.ceiling}; "
                f"nearest feasible: {min(max(self.sparsity, self.floor), self.ceiling)}"
            )
        if len(set(self.methods)) != len(self.methods):
            raise ValueError("methods: must not name one twice")
        return self

    def options(self, method: str) -> dict[str, Any]:
        """Constructor arguments of a method."""
        if method == "ovit":
            return {"block_size": self.fisher.block_size, "damp": self.fisher.damp}
        return {}


class TrainJob(Settings):
    """Everything a worker group needs to train, or to prune and recover, one model."""

    name: Name
    seed: int = 0
    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    pruning: PruningSettings | None = None
    method: Method | None = None
    allocation: dict[str, int] | None = Field(None, description="searched: pruned weights a layer at the end")
    threads: int = Field(1, ge=1)
    lineage: Mapping[str, Any] = Field({}, description="recorded in pruning.json")
