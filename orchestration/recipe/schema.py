"""The recipe: everything a user asks for, typed. Reading it needs neither torch nor ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from orchestration.common import defaults
from orchestration.recipe.phases import Phase
from orchestration.recipe.search import AllocationSearch, ScheduleSearch
from trainers.config.base import Amount, Distinct, Name, Seed, Settings, Share, ShortName, Workers
from trainers.config.data import DataSettings, ModelSettings
from trainers.config.presets import merged
from trainers.config.pruning import PruningSettings
from trainers.config.quantization import Calibration, Mode, check_training
from trainers.config.structured import StructuredSettings
from trainers.config.training import TrainingSettings

# keys that a long run may change: methods, layers and patterns stay those of the search before it
_OF_LONG_RUN = ("recovery.", "pruning.schedule.", "pruning.keep.", "pruning.fisher.", "pruning.reconstruct.")


ExportFormat = Literal[
    "onnx", "onnx-int8", "openvino", "openvino-int8", "sparse", "sparse-int8", "torch-export"
]
"""The formats of :data:`trainers.deploy.formats.FORMATS`."""


class WorkerRange(Settings):
    """A run that goes on with fewer workers when a node leaves, at the same global batch."""

    min: Workers = Field(1, description="least number of workers with which a run continues")
    max: Workers = Field(description="number of workers where the cluster has room for them")

    @model_validator(mode="after")
    def _ordered(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min: must not lie above max ({self.max})")
        return self


class Resources(Settings):
    """What a training run takes from the cluster."""

    workers: Workers | WorkerRange = Field(
        1, description="data-parallel workers of a run, or {min, max} of them as nodes come and go"
    )
    cpus_per_worker: Amount = Field(
        1.0, gt=0.0, description="processors that each worker reserves, and its threads"
    )
    gpus_per_worker: Amount = Field(0.0, description="GPUs that each worker reserves; 0: on the processor")
    retries: int = Field(1, ge=0, le=10**6, description="restarts of a worker group after a failure")

    @property
    def least(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max


class PhaseResources(Resources):
    """What training runs take from the cluster; keys that a phase leaves out are those of all other runs."""

    dense: Resources | None = Field(
        None, description="for the dense model; keys left out are those of resources"
    )
    structured: Resources | None = Field(
        None, description="for recovery after the structured step; keys left out are those of resources"
    )
    long_run: Resources | None = Field(
        None, description="for the long run; keys left out are those of resources"
    )

    @model_validator(mode="before")
    @classmethod
    def _inherited(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        rest = {key: value for key, value in content.items() if key in Resources.model_fields}
        return {
            key: {**rest, **value} if isinstance(value, Mapping) and key not in rest else value
            for key, value in content.items()
        }

    def of(self, phase: Phase) -> Resources:
        own = {"dense": self.dense, "structured": self.structured, "long_run": self.long_run}.get(phase)
        return self if own is None else own


class Promotion(Settings):
    """Which version becomes champion: the best on validation of those sparse enough, on the same data."""

    sparsity: Share | None = Field(None, description="least sparsity; default pruning.sparsity")
    tolerance: Share | None = Field(
        0.0, description="how far below the champion's top-1 a newer one may lie; null: it must be better"
    )


class Tracking(Settings):
    """Where MLflow is; without a URI a server of our own is started on loopback."""

    uri: Name | None = Field(
        None,
        description="address of an MLflow server; default: MLFLOW_TRACKING_URI, or a server of our own on "
        "loopback",
    )
    experiment: ShortName = Field("espalier", description="MLflow's experiment, which runs are logged in")
    registered_model: ShortName | None = Field(None, description="default espalier-<name>")
    promotion: Promotion = Promotion()


OWN_DEFAULTS = "own_defaults"
"""In what a field says of itself: defaults that differ from those of its type elsewhere, key by key."""
AWARE: dict[str, Any] = {"epochs": 10, "lr": {"kind": "linear", "peak": 1e-4, "floor": 1e-5}}
"""How training for INT8 goes where nothing else is said: the rate is that of the oViT paper's."""


class AwareTraining(TrainingSettings):
    """Settings that fake quantisation can be trained with; what is left out is as in :data:`AWARE`."""

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, value: Any) -> Any:
        return merged(AWARE, value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _can_be(self) -> AwareTraining:
        check_training(self, "")
        return self


class Quantization(Calibration):
    """After the last gradual run of each method; ``static`` and ``qat`` take ranges from training images.

    ``dynamic`` measures activations as they come, ``static`` fixes their ranges once, ``qat`` trains the
    float model with fake quantisation before, its zeros held.
    """

    mode: Mode = Field(
        "static",
        description="ranges of activations: measured as the model runs (dynamic), fixed on images (static), "
        "or fixed and trained with (qat)",
    )
    recovery: AwareTraining | None = Field(
        None,
        description="qat: how it is trained",
        json_schema_extra={OWN_DEFAULTS: AWARE},
    )

    @model_validator(mode="after")
    def _fits_the_mode(self) -> Quantization:
        if self.mode == "dynamic" and self.images is not None:
            raise ValueError("images: dynamic quantisation needs none; drop it")
        if self.recovery is not None and self.mode != "qat":
            raise ValueError(f"recovery: only qat trains (mode is {self.mode})")
        return self

    @property
    def training(self) -> TrainingSettings | None:
        """The training of ``qat``; ``None`` for other modes."""
        if self.mode != "qat":
            return None
        return self.recovery or AwareTraining.model_validate({})

    @property
    def calibration(self) -> Calibration:
        return Calibration(images=self.images)


class Recipe(Settings):
    """One sweep or run. YAML keys are the names below; ``extends:`` inherits from another recipe."""

    name: ShortName = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="of the sweep, its folder and its runs: letters, digits, '.', '_' and '-', 128 at most",
    )
    description: str = Field(
        "", max_length=5000, description="what it is for; a note of the sweep's run in MLflow"
    )
    seed: Seed = Field(defaults.SEED, description="decides all that is drawn at random, 0 to 2,147,483,647")
    storage: Name = Field(defaults.STORAGE, description="folder or pyarrow URI that every node reaches")
    model: ModelSettings
    data: DataSettings
    dense: TrainingSettings | None = Field(
        None, description="how the dense model is trained, or fine-tuned from pretrained weights"
    )
    structured: StructuredSettings | None = Field(
        None, description="whole channels are cut, and the smaller model recovers, before weights are pruned"
    )
    pruning: PruningSettings = PruningSettings()
    recovery: TrainingSettings = Field(
        TrainingSettings(), description="training of gradual runs, between and after pruning steps"
    )
    allocation: AllocationSearch = AllocationSearch()
    schedule: ScheduleSearch = ScheduleSearch()
    long_run: dict[str, Any] = Field(
        {}, description="recipe key -> value: a last gradual run with the best schedule's values and these"
    )
    quantize: Quantization | None = Field(None, description="the best model of each method as INT8")
    export: Annotated[tuple[ExportFormat, ...], Distinct] = Field(
        (), description="the best model of each method as files for engines"
    )
    resources: PhaseResources = PhaseResources()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _dense_model_comes_from_somewhere(self) -> Recipe:
        if not self.model.ready_made and self.dense is None:
            raise ValueError("dense: needed, as the model has neither pretrained weights nor a checkpoint")
        if self.model.checkpoint is not None and not self.model.is_file and self.dense is not None:
            raise ValueError("dense: not needed, as the checkpoint is the dense model; drop one of the two")
        for sparsity in self.allocation.sparsities:
            self.pruning.check_reach(sparsity, "allocation.sparsities")
        for key in self.long_run:
            if not f"{key}.".startswith(_OF_LONG_RUN):
                raise ValueError(
                    f"long_run: {key} cannot change; only keys below {', '.join(_OF_LONG_RUN)} do"
                )
        return self

    @model_validator(mode="after")
    def _zeros_stand_as_the_engine_wants(self) -> Recipe:
        if "sparse-int8" in self.export and self.pruning.pattern != "1x4":
            raise ValueError(
                f"export: sparse-int8 leaves zeros out in blocks alone; pruning.pattern must be 1x4, "
                f"not {self.pruning.pattern}"
            )
        return self

    @model_validator(mode="after")
    def _an_image_for_each_worker(self) -> Recipe:
        runs: tuple[tuple[str, TrainingSettings | None, Phase], ...] = (
            ("dense", self.dense, "dense"),
            ("structured.recovery", self.structured.recovery if self.structured else None, "structured"),
            ("recovery", self.recovery, "schedule"),
            ("recovery", self.recovery if self.long_run else None, "long_run"),
            ("quantize.recovery", None if self.quantize is None else self.quantize.training, "quantize"),
        )
        for key, settings, phase in runs:
            most = self.resources.of(phase).most
            if settings is not None and settings.batch_size < most:
                raise ValueError(
                    f"{key}.batch_size: {settings.batch_size} must be an image at least for each of "
                    f"resources.workers ({most})"
                )
        return self

    @model_validator(mode="after")
    def _images_to_solve_on(self) -> Recipe:
        images = self.pruning.reconstruct
        if self.allocation.reconstruct and not images:
            raise ValueError(
                "allocation.reconstruct: the weights of what is best are not solved; give pruning.reconstruct"
            )
        most = max(self.resources.of("schedule").most, self.resources.of("long_run").most)
        if 0 < images < most:
            raise ValueError(
                f"pruning.reconstruct: {images} must be an image at least for each of "
                f"resources.workers ({most})"
            )
        return self

    @model_validator(mode="after")
    def _sparsities_to_choose_from(self) -> Recipe:
        between, key = self.allocation.reach, f"allocation.{self.allocation.between_key}"
        if between is None:
            return self
        for sparsity in between:
            self.pruning.check_reach(sparsity, key)
            try:
                self.pruning.schedule.check(sparsity)
            except ValueError as error:
                raise ValueError(f"{key}: {sparsity:g}: {error}") from None
        rounds = self.pruning.fisher.rounds
        if not isinstance(rounds, int):
            raise ValueError(f"pruning.fisher.rounds: must be a number where {key} chooses the sparsity")
        if rounds > 1 and self.pruning.sparsity < between[0]:
            raise ValueError(
                f"pruning.sparsity: must not lie below {key} ({between[0]:g}), to which the rounds lead"
            )
        if any(level >= between[0] for level in self.pruning.keep):
            raise ValueError(f"pruning.keep: must lie below {key} ({between[0]:g})")
        return self

    @model_validator(mode="after")
    def _champion_can_be(self) -> Recipe:
        asked, most = self.tracking.promotion.sparsity, max(self._sparsities)
        if asked is not None and asked > most:
            raise ValueError(
                f"tracking.promotion.sparsity: no model of this recipe has so many zeros; at most {most:g}"
            )
        return self

    @property
    def _sparsities(self) -> tuple[float, ...]:
        """Sparsities at which gradual runs end; of a range, its ends."""
        if self.allocation.reach is not None:
            return self.allocation.reach
        distribution = self.schedule.space.get("pruning.sparsity")
        ends = distribution and (
            distribution.uniform or distribution.log or distribution.integer or distribution.choice
        )
        numbers = [float(value) for value in ends or () if isinstance(value, int | float)]
        return tuple(numbers or (self.pruning.sparsity,))  # a value that is no number is refused elsewhere

    @property
    def promotion(self) -> Promotion:
        """The champion's rule, with the sparsity that it asks for."""
        rule = self.tracking.promotion
        least = min(self._sparsities) if rule.sparsity is None else rule.sparsity
        return rule.model_copy(update={"sparsity": least})

    @property
    def allocated_sparsities(self) -> list[float]:
        """Sparsities that an allocation is searched for, ascending."""
        if not self.allocation.trials:
            return []
        return sorted({self.pruning.sparsity, *self.allocation.sparsities})

    def in_phase(self, phase: Phase) -> Recipe:
        """The recipe with the resources that a phase takes, for all."""
        own = self.resources.of(phase)
        if own is self.resources:
            return self
        # checked with the recipe; again, and batches of other phases would be held against these workers
        return self.model_copy(update={"resources": PhaseResources(**dict(own))})

    @property
    def registered_model(self) -> str:
        return self.tracking.registered_model or f"espalier-{self.name}"
