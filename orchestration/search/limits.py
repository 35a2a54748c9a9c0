"""Limits of a search: end a trial that takes too long, and a search of which too many trials fail."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.tune.experiment import Trial
from ray.tune.stopper import NoopStopper, Stopper

from orchestration.recipe.search import SearchLimits


@dataclass(frozen=True)
class Limits:
    """The recipe's limits of one search, and their key in the recipe."""

    settings: SearchLimits
    key: str

    def overdue(self, since: float) -> str | None:
        """The reason to end a trial that began at ``since`` (monotonic seconds); ``None``: no reason."""
        minutes = self.settings.trial_minutes
        if minutes is None or time.monotonic() - since < 60 * minutes:
            return None
        return f"no end after {minutes:g} minutes ({self.key}.trial_minutes)"


class FailureStopper(Stopper):  # type: ignore[misc]
    """Ends a search when more of its trials have failed than the recipe allows."""

    def __init__(self, limits: Limits, trials: int) -> None:
        self._limits, self._trials = limits, trials
        self.failed = 0
        self.last = ""

    def __reduce__(self) -> Any:
        # Tune pickles it with the experiment's state; we resume from the trial log instead
        return NoopStopper, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        # if all trials have failed there is nothing to stop; the search then fails as it has no best trial
        return self._limits.settings.failures * self._trials < self.failed < self._trials

    def note(self, error: str) -> None:
        """Count a failed trial."""
        self.failed, self.last = self.failed + 1, error

    def check(self) -> None:
        """Check that the search was not given up.

        Raises:
            RuntimeError: it was given up because too many trials failed.
        """
        if self.stop_all():
            count = f"{self.failed} of {self._trials} trials failed"
            share = f"more than {self._limits.key}.failures ({self._limits.settings.failures:g}) allows"
            raise RuntimeError(f"{count}, {share}; the last: {self.last}")


NONE = Limits(SearchLimits(failures=1.0), "")


def end_by_force(trial: Trial) -> None:
    """End the actor of a trial that does not answer; Tune then sees it fail."""
    actor = trial.temporary_state.ray_actor
    if actor is not None:
        ray.kill(actor)
