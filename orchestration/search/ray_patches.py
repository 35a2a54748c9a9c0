"""An actor that Ray's memory monitor kills costs its trial, not the search."""

from __future__ import annotations

from typing import Any

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError

from pruners.errors import first_line


def one_trial_pays() -> None:
    """Make Tune treat an out-of-memory kill as the death of an actor, which it is.

    Tune knows two failures of a call to a trial's actor, the actor's death and an error in the call, and ends
    the whole experiment at any other. Ray tells a kill by its memory monitor by an error that is neither.
    There is no place to say otherwise, so the method that decides is wrapped.
    """
    original = RayActorManager._actor_task_failed
    if getattr(original, "tells_memory", False):
        return

    def fail_trial(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=first_line(exception))
        original(self, tracked_actor_task=tracked_actor_task, exception=exception)

    fail_trial.tells_memory = True  # type: ignore[attr-defined]
    RayActorManager._actor_task_failed = fail_trial
