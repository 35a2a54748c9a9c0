"""The ancestry of a registered version: the versions that it comes from, as lines."""

from __future__ import annotations

from collections.abc import Iterator

from orchestration.tracking.registry import Registry, Version
from pruners.errors import InputError

RECIPE = "recipe.yaml"  # an artifact of the sweep's run


def chain(registry: Registry, reference: str) -> Iterator[Version]:
    """List a version, the version of its dense model, and so on.

    Raises:
        InputError: there is no such version. (If an earlier version has been deleted, the chain ends there.)
    """
    version = registry.resolve(reference)
    seen: set[str] = set()
    while version.uri not in seen:
        yield version
        seen.add(version.uri)
        if "parent" not in version.tags:
            return
        try:
            version = registry.resolve(version.tags["parent"])
        except InputError:
            return


def lines(registry: Registry, reference: str) -> Iterator[str]:
    """Format the ancestry of a version, newest first."""
    for version in chain(registry, reference):
        tags = version.tags
        carries = f"  @{', @'.join(version.aliases)}" if version.aliases else ""
        yield f"{version.uri}{carries}"
        yield from (f"  {key:<12}{value}" for key, value in _facts(registry, version, dict(tags)))


def _facts(registry: Registry, version: Version, tags: dict[str, str]) -> Iterator[tuple[str, str]]:
    unknown = "not recorded"
    runs = registry.runs_above(version.run)
    where = f", {RECIPE} of run {runs[-1]}" if runs else ""
    yield "method", tags.get("method", unknown)
    if "structured" in tags:
        yield "structured", tags["structured"]
    if "espalier.precision" in tags:
        yield "precision", f"{tags['espalier.precision']}, {tags.get('espalier.quantize', unknown)}"
    yield "sparsity", f"{100 * version.sparsity:.2f} %"
    yield "validation", f"{100 * version.top1:.2f} %" if version.top1 >= 0 else unknown
    yield "recipe", f"{tags['recipe']}{where}" if "recipe" in tags else unknown
    yield "data", tags.get("data", unknown)
    yield "git commit", tags.get("git_commit", unknown)
    yield "run", version.run or unknown
    yield "dense", tags.get("dense", unknown)
    if "parent" in tags:
        yield "parent", tags["parent"]
