"""What ``espalier finetune`` is asked for, checked without torch so that a mistake is answered at once."""

from __future__ import annotations

from dataclasses import dataclass

from orchestration.commands.prune_options import layer_patterns, one_of
from orchestration.recipe.loading import part
from trainers.config.training import TrainingSettings
from trainers.sources.columns import ColumnOptions

# gentler than training from the start, and each epoch can be gone on from
_DEFAULTS = {"epochs": 10, "lr": {"peak": 1e-4}, "checkpoint_every": 1}


@dataclass(frozen=True)
class FinetuneOptions(ColumnOptions):
    """The options as they were typed."""

    checkpoint: str
    train: str
    out: str
    settings: tuple[str, ...] = ()
    validation: str | None = None
    classes: int | None = None
    layers: tuple[str, ...] = ()
    seed: int = 0
    device: str | None = None
    tracking_uri: str | None = None
    storage: str = "runs"

    def check(self) -> None:
        """Raises:
        InputError: the first thing that cannot work, by its option or key and value.
        """
        if self.device is not None:
            one_of("--device", self.device, ("cpu", "cuda"))
        layer_patterns(self.layers)
        assert self.training is not None, "it is read, and what is wrong in it told"

    @property
    def training(self) -> TrainingSettings:
        """Raises:
        InputError: a key or value of ``settings`` that cannot be.
        """
        return part(TrainingSettings, self.settings, _DEFAULTS)
