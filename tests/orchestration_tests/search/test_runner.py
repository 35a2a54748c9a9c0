"""Ray's memory monitor kills an actor: Tune is told of a death."""

from __future__ import annotations

from typing import Any

import pytest
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError

from orchestration.search.runner import one_trial_pays


def test_runner__a_kill_for_memory_is_the_death_of_an_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Exception] = []

    def decides(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        seen.append(exception)

    monkeypatch.setattr(RayActorManager, "_actor_task_failed", decides)
    one_trial_pays()
    one_trial_pays()  # wrapped once
    manager: Any = RayActorManager.__new__(RayActorManager)
    other = ValueError("another")
    low = OutOfMemoryError("low on memory\nmore")
    manager._actor_task_failed(tracked_actor_task=None, exception=low)  # as Ray calls it
    manager._actor_task_failed(tracked_actor_task=None, exception=other)
    assert isinstance(seen[0], RayActorError)
    assert str(seen[0]) == "low on memory"
    assert seen[1:] == [other]
