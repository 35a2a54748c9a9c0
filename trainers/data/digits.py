"""The demo's data: scikit-learn's handwritten digits (1,797 real images), written once as Parquet."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainers.config.data import DataSettings
from trainers.storage import exists, write_bytes

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

CLASSES = 10
_SPLITS = {"train": 1097, "validation": 350, "test": 350}
_SIDE = 32
_SEED = 20261121


def prepare_digits(storage: str) -> DataSettings:
    """Write the splits of the digits under ``storage``, unless they exist; return the settings of the data.

    Args:
        storage: a folder, a path or any pyarrow URI.
    """
    uris = {part: f"{storage}/data/digits/{part}.parquet" for part in _SPLITS}
    if not all(exists(uri) for uri in uris.values()):
        for part, table in _tables().items():
            sink = io.BytesIO()
            pq.write_table(table, sink)
            write_bytes(uris[part], sink.getvalue())
    return DataSettings(**uris, mean=(0.31,) * 3, std=(0.35,) * 3)


def picture(digit: np.ndarray[Any, Any]) -> Image:
    """Make an RGB image of 32 × 32 pixels from one of scikit-learn's digits, (8, 8) with values 0…16."""
    import numpy as np
    from PIL import Image

    pixels = np.clip(digit * (255 / 16), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).convert("RGB")


def _tables() -> dict[str, pa.Table]:
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(_SEED).permutation(len(digits.target))
    tables: dict[str, pa.Table] = {}
    begin = 0
    for part, size in _SPLITS.items():
        rows = order[begin : begin + size]
        begin += size
        images = []
        for row in rows:
            sink = io.BytesIO()
            picture(digits.images[row]).save(sink, "PNG")
            images.append({"bytes": sink.getvalue(), "path": f"digits-{row}.png"})
        tables[part] = pa.table(
            {
                "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                "label": pa.array([int(digits.target[row]) for row in rows], pa.int64()),
            }
        )
    return tables
