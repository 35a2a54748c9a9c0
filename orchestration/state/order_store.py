"""Elimination orders on the shared storage: computed once, read by all trials of all sweeps.

An order lies in a folder named by all that it depends on, in a part for each worker that made it; the file
written last says how many. Trials map it from a local disk, so that all of a node read the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from orchestration.common.hashing import digest
from pruners.elimination.order import EliminationOrder, merge
from pruners.methods.registry import SECOND_ORDER
from trainers import storage
from trainers.cache_folder import cache_folder
from trainers.config.pruning import PruningSettings
from trainers.loop.elimination import ORDER_FACTS


@dataclass(frozen=True)
class StoredOrder:
    """A method's order of a model, at ``folder`` (any pyarrow URI), by its ``fingerprint``."""

    folder: str
    fingerprint: str

    @classmethod
    def of(
        cls,
        storage_uri: str,
        method: str,
        pruning: PruningSettings,
        *,
        weights: str,
        data: str,
        seed: int,
        skip: int = 0,
    ) -> StoredOrder:
        """Find where the order of these weights and this data is kept; it need not be there yet.

        Args:
            storage_uri: the storage, below which orders lie.
            method: of pruning.
            pruning: its settings; of one of several rounds those of the round.
            weights: hash of the weights that are ordered: the dense model's, or what the round before left.
            data: hash of the training images.
            seed: by which images are drawn.
            skip: gradients that earlier rounds took.

        Returns:
            The order's folder and fingerprint.
        """
        decides: dict[str, Any] = pruning.model_dump(
            mode="json", include={"layers", "pattern", "unfit", "ceiling"}
        )
        decides |= {"method": method, "options": pruning.options(method)}
        if method in SECOND_ORDER:
            decides["fisher"] = pruning.fisher.model_dump(mode="json", exclude={"memory", "rounds"})
            decides |= {"data": data, "seed": seed}
            if skip:
                decides["skip"] = skip
            if pruning.order_begins_at:
                decides["begins_at"] = pruning.order_begins_at
        if pruning.tries_damps(method):  # λ is chosen at the recipe's sparsity
            decides |= pruning.model_dump(mode="json", include={"sparsity", "scope", "table", "floor"})
        key = digest(weights, decides)
        return cls(f"{storage_uri}/orders/{key}", key)

    @property
    def known(self) -> bool:
        return storage.exists(f"{self.folder}/{ORDER_FACTS}")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """How many parts there are, and the λ that was chosen of several."""
        facts: dict[str, Any] = storage.read_json(f"{self.folder}/{ORDER_FACTS}")
        return facts

    def open(self, *, device: str = "cpu", updates: bool = True) -> EliminationOrder:
        """The order, mapped from this machine's disk; copied there first from another file system.

        Args:
            updates: without them it gives losses and masks, but no weights.
        """
        parts = [self._local() / f"part-{number}" for number in range(self.facts["parts"])]
        return merge(
            EliminationOrder.load(part, self.fingerprint, device=device, updates=updates) for part in parts
        )

    def _local(self) -> Path:
        if storage.is_local(self.folder):
            return Path(storage.resolve(self.folder)[1])
        cached = cache_folder() / "orders" / self.fingerprint
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):
            if not cached.exists():
                storage.copy(self.folder, str(cached))
        return cached
