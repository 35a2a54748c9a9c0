"""The check that runs on each node of a cluster. It is sent as source, as the node may lack Espalier."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

_PACKAGES = ("ray", "torch", "timm", "pyarrow")
_OURS = ("pruners", "trainers", "orchestration")


def look(storage_uri: str | None, uri: str | None, node: str) -> dict[str, Any]:
    """Versions on this node, and whether it writes to the storage and reaches MLflow.

    Args:
        storage_uri: a folder; a file named by the node is written there. ``None``: not tried.
        uri: of MLflow; ``None``: not tried.
        node: its id.

    Returns:
        ``versions`` by package, and ``problems`` as lines.
    """
    problems = []
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    versions["espalier"] = _source()
    if versions["espalier"] == "missing":
        return {"versions": versions, "problems": ["espalier is not installed there"]}
    if storage_uri is not None:
        from trainers import storage

        try:
            storage.write_bytes(f"{storage_uri}/{node}", node.encode())
        except (OSError, ValueError) as error:
            problems.append(f"cannot write to the storage ({str(error).splitlines()[0]})")
    if uri is not None:
        from orchestration.tracking.check import check_uri

        try:
            check_uri(uri)
        except ValueError as error:
            problems.append(str(error))
    return {"versions": versions, "problems": problems}


def see(storage_uri: str, nodes: list[str]) -> list[str]:
    """The nodes whose file this node does not see in the storage."""
    from trainers import storage

    missing = []
    for node in nodes:
        try:
            if storage.read_bytes(f"{storage_uri}/{node}") != node.encode():
                missing.append(node)
        except (OSError, ValueError):
            missing.append(node)
    return missing


def remove(storage_uri: str) -> str | None:
    """Delete the files; return the error as text, if there was one."""
    from trainers import storage

    try:
        storage.remove(storage_uri)
    except OSError as error:
        return str(error).splitlines()[0]
    return None


def _source() -> str:
    """Hash of Espalier's source: two checkouts can have the same version number."""
    content = hashlib.sha256()
    for name in _OURS:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            return "missing"
        folder = Path(spec.submodule_search_locations[0])
        for file in sorted(folder.rglob("*.py")):
            content.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return content.hexdigest()[:8]
