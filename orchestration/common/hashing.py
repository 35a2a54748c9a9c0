"""Hashes of inputs: results with the same hash come from the same inputs."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def content_hash(checkpoint: str) -> str:
    """Hash of a checkpoint's configuration and weights, the same wherever the checkpoint lies."""
    from trainers import storage  # trial processes use digest() alone, and must start fast
    from trainers.checkpoint.folder import weights_hash

    config = storage.read_bytes(f"{checkpoint}/config.json")
    return digest(config.hex(), weights_hash(checkpoint))


def digest(*parts: Any) -> str:
    """Twelve hexadecimal digits of the content of JSON-like parts."""
    content = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]
