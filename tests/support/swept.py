"""One small sweep by the real command line, as the tests of the whole share it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commands import Command


@dataclass(frozen=True)
class Swept:
    """A finished ``espalier sweep`` of ``recipes/small.yaml``, in a folder of its own."""

    folder: Path
    command: Command

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    def logs(self) -> dict[str, dict[str, Any]]:
        """The trial log of every phase, by its folder's name without the hash (``schedule-ovit``)."""
        import json

        files = sorted(self.storage.glob("*/**/trials.json"))
        return {
            path.parent.name.rpartition("-")[0] or "dense": json.loads(path.read_text(encoding="utf-8"))
            for path in files
        }
