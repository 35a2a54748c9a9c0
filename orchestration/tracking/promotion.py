"""Promotion: decide by a rule which version gets an alias, by figures on the same data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from orchestration.recipe.schema import Promotion
from orchestration.tracking.registry import CHAMPION, Registry, Version
from pruners.errors import InputError

_SLACK = 5e-4  # whole weights, blocks or groups miss the requested sparsity by a little
_LEVEL = re.compile(r"sparsity-\d+(_\d)?")


@dataclass(frozen=True)
class Decision:
    """The decision about an alias for which ``candidate`` was considered.

    Attributes:
        holder: the version that has the alias now; ``None``: no version.
        why: the reason, as text.
    """

    alias: str
    candidate: Version
    holder: Version | None
    why: str

    @property
    def refused(self) -> bool:
        return self.holder is None or self.holder.version != self.candidate.version

    def __str__(self) -> str:
        return f"{self.candidate.model}@{self.alias}: {self.why}"


def level_alias(sparsity: float) -> str:
    """``sparsity-75``, ``sparsity-62_5``: MLflow's aliases have no points."""
    return f"sparsity-{round(100 * sparsity, 1):g}".replace(".", "_")


def settle(registry: Registry, versions: Sequence[Version], rule: Promotion) -> list[Decision]:
    """Move the aliases after a sweep: ``champion``, then the alias of each sparsity.

    Args:
        registry: the registry of the versions.
        versions: the versions that the sweep registered.
        rule: which version may become champion.

    Returns:
        A decision for each alias that one of the versions could have.
    """
    levels = [
        level_alias(version.sparsity) for version in sorted(versions, key=lambda version: -version.sparsity)
    ]
    decisions = []
    for alias in dict.fromkeys([CHAMPION, *levels]):
        fit = [version for version in versions if _unfit(version, alias, rule) is None]
        if fit:
            candidate = max(fit, key=lambda version: version.rank)
            decisions.append(promote(registry, candidate, alias, rule))
    return decisions


def choose(registry: Registry, model: str, alias: str, rule: Promotion) -> Version:
    """Choose the best version for an alias, of those that can be compared with its present version.

    Args:
        registry: the registry of the versions.
        model: name of the registered model.
        alias: ``champion``, or one of a sparsity.
        rule: which version may become champion.

    Returns:
        The best version by validation.

    Raises:
        InputError: the rule allows none.
    """
    holder = registry.holder(model, alias)
    versions = [
        version for version in registry.versions(model) if holder is None or version.data == holder.data
    ]
    fit = [version for version in versions if _unfit(version, alias, rule) is None]
    if not fit:
        asked = alias if _LEVEL.fullmatch(alias) else f"{100 * (rule.sparsity or 0):g} % zeros"
        raise InputError("NAME", model, f"has no version with {asked} for @{alias}")
    return max(fit, key=lambda version: version.rank)


def promote(
    registry: Registry, candidate: Version, alias: str, rule: Promotion, *, force: bool = False
) -> Decision:
    """Give a version the alias if the rule allows it, or by force; the present version loses it.

    Args:
        registry: the registry of the version.
        candidate: the version.
        alias: ``champion``, or one of a sparsity.
        rule: which version may become champion.
        force: give it even if the rule does not allow it.

    Returns:
        The decision, with its reason.
    """
    holder = registry.holder(candidate.model, alias)
    if holder is not None and holder.version == candidate.version:
        return Decision(alias, candidate, holder, f"{_format_version(holder)} carries it already")
    against = None if force else _unfit(candidate, alias, rule) or _beaten(candidate, holder, alias, rule)
    if against is not None:
        stays = f"stays with version {holder.version}" if holder is not None else "stays free"
        return Decision(alias, candidate, holder, f"{stays}: {against}")
    registry.set_alias(candidate, alias)
    before = f" takes it over from {_format_version(holder)}" if holder is not None else " takes it"
    return Decision(
        alias, candidate, candidate, f"{_format_version(candidate)}{before}{', by force' if force else ''}"
    )


def _unfit(version: Version, alias: str, rule: Promotion) -> str | None:
    """The reason why a version cannot have an alias at all; ``None`` if it can."""
    if "espalier.precision" in version.tags:  # an alias stands for a checkpoint that timm loads
        return f"version {version.version} is {version.tags['espalier.precision']}"
    has = f"version {version.version} has {100 * version.sparsity:.4g} % zeros"
    if _LEVEL.fullmatch(alias):
        return None if level_alias(version.sparsity) == alias else has
    asked = rule.sparsity or 0.0
    return None if version.sparsity >= asked - _SLACK else f"{has}, and {100 * asked:g} % are asked for"


def _beaten(candidate: Version, holder: Version | None, alias: str, rule: Promotion) -> str | None:
    """The reason why the present version keeps an alias; ``None`` if there is none."""
    if holder is None:
        return None
    if not candidate.data or candidate.data != holder.data:
        ours, theirs = (
            f"data {version.data}" if version.data else "data not recorded" for version in (candidate, holder)
        )
        return f"it was measured on other images ({theirs}) than version {candidate.version} ({ours})"
    if candidate.rank > holder.rank:
        return None
    # without this an old version within the tolerance and the new one would alternate
    newer = int(candidate.version) > int(holder.version)
    tolerance = None if _LEVEL.fullmatch(alias) else rule.tolerance
    if newer and tolerance is not None and candidate.top1 >= holder.top1 - tolerance - 1e-9:
        return None
    return (
        f"version {candidate.version} has {_percent(candidate)} on validation, and it has {_percent(holder)}"
    )


def _format_version(version: Version) -> str:
    return (
        f"version {version.version} ({_percent(version)} on validation, {100 * version.sparsity:.4g} % zeros)"
    )


def _percent(version: Version) -> str:
    return f"{100 * version.top1:.2f} %"
