"""Elimination orders on the shared storage: computed once, read by all trials of all sweeps.

An order lies in a folder named by a hash of all that it depends on, with a part for each worker that made it.
The file that is written last records the number of parts. Trials map the order from a local disk, so that all
trials of a node share the same memory.
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
    """A method's order of a model: its ``folder`` (any pyarrow URI) and its ``fingerprint``."""

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
        """Find the folder for the order of these weights and this data; the order need not exist yet.

        Args:
            storage_uri: the storage, below which orders lie.
            method: of pruning.
            pruning: its settings; for one of several rounds the settings of the round.
            weights: hash of the ordered weights: of the dense model, or of the model after the last round.
            data: hash of the training images.
            seed: decides which images are used.
            skip: number of gradients that earlier rounds used.

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
        """The number of parts, and the chosen λ if several were compared."""
        facts: dict[str, Any] = storage.read_json(f"{self.folder}/{ORDER_FACTS}")
        return facts

    def open(self, *, device: str = "cpu", updates: bool = True) -> EliminationOrder:
        """Open the order, mapped from this machine's disk; it is copied there first if it lies elsewhere.

        Args:
            updates: read the updates of the weights too; without them it gives losses and masks only.
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
