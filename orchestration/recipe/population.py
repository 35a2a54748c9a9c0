"""Checks of a population's search space: all its values must be able to change in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel

from orchestration.recipe.distribution import Distribution
from trainers.config.training import TrainingSettings

_PREFIX = "recovery."
_IDLE = {"checkpoint_minutes"}  # changes no result


def check_population(trials: int, sampler: str, space: Mapping[str, Distribution]) -> None:
    """Check that population-based training can work with a search's settings.

    Args:
        trials: how many members the population has.
        sampler: of the search.
        space: the searched keys and their distributions.

    Raises:
        ValueError: settings of the search, or a key of its space, that it cannot work with.
    """
    if trials < 2:
        raise ValueError(f"scheduler: a population needs trials: 2 at least ({trials} given)")
    if sampler != "random":
        raise ValueError(f"scheduler: draws its trials itself; needs sampler: random ({sampler} given)")
    if not space:
        raise ValueError("scheduler: a population needs a space, as {recovery.lr.peak: {log: [5e-5, 1e-3]}}")
    for key, distribution in space.items():
        if distribution.uniform is None and distribution.log is None:
            kind = "choice" if distribution.choice is not None else "integer"
            raise ValueError(f"scheduler: searches by uniform and log alone; {key} is searched by {kind}")
        if distribution.when:
            raise ValueError(f"scheduler: searches all values of a run at any time; {key} has a when")
        if not _can_change(key):
            raise ValueError(
                f"scheduler: searches what can change within a run, numbers of recovery as recovery.lr.peak; "
                f"{key} cannot"
            )


def job_key(key: str) -> str:
    """Translate a recipe's key ``recovery.…`` to the key of a job."""
    return f"training.{key.removeprefix(_PREFIX)}"


def _can_change(key: str) -> bool:
    """Return whether a key is a float of ``recovery``; unknown keys count too: other checks refuse them."""
    if not key.startswith(_PREFIX):
        return False
    model: type[BaseModel] = TrainingSettings
    *parents, last = key.removeprefix(_PREFIX).split(".")
    for parent in parents:
        if parent not in model.model_fields:
            return True
        below = [kind for kind in _kinds(model.model_fields[parent].annotation) if _is_model(kind)]
        if not below:
            return False
        model = below[0]
    if last not in model.model_fields:
        return True
    return last not in _IDLE and set(_kinds(model.model_fields[last].annotation)) <= {float, NoneType}


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that a field can have, without their limits."""
    if hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    inner = get_args(annotation)
    if inner and getattr(annotation, "__origin__", None) is None:  # a union
        for kind in inner:
            yield from _kinds(kind)
    else:
        yield annotation


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
