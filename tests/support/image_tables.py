"""Small Parquet files of synthetic images, and checkpoint folders of tiny models, for several test files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from torch import nn

from trainers.checkpoint.folder import save_checkpoint

VIT = "vit_tiny_patch16_224"
VIT_ARGS: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}
SWIN = "swin_tiny_patch4_window7_224"
SWIN_ARGS: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "window_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
}
IMAGES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number: int, side: int = 16, shade: int | None = None) -> bytes:
    """A noisy image; ``shade`` sets its mean, so that classes can be told apart."""
    noise = np.random.default_rng(number).integers(0, 80, (side, side, 3))
    pixels = (noise + (0 if shade is None else shade)).clip(0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def table(labels: Sequence[Any], *, kind: pa.DataType | None = None, first: int = 0) -> pa.Table:
    """Images in the hub's layout, one for each label."""
    rows = []
    for number, label in enumerate(labels, start=first):
        shade = 50 * label if isinstance(label, int) else None
        rows.append({"bytes": png(number, shade=shade), "path": f"{number}.png"})
    return pa.table({"image": pa.array(rows, IMAGES), "label": pa.array(labels, kind or pa.int64())})


def write(path: Path, content: pa.Table, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, **options)
    return str(path)


def tiny(architecture: str = VIT, classes: int = 3, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model of timm's registry, and the arguments that build it."""
    arguments = VIT_ARGS if architecture == VIT else SWIN_ARGS
    size = {"input_size": (3, 16, 16), "crop_pct": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(
            architecture, num_classes=classes, pretrained_cfg_overlay=size, **arguments
        ).eval()
    return model, arguments


def dense_folder(folder: Path, architecture: str = VIT, classes: int = 3, seed: int = 0) -> Path:
    """A dense checkpoint folder."""
    model, arguments = tiny(architecture, classes, seed)
    record = {"method": "dense", "sparsity": 0.0, "allocation": {}}
    save_checkpoint(folder, model, model_args=arguments, masks=None, record=record)
    return folder


def normed_folder(folder: Path, classes: int = 3) -> Path:
    """A checkpoint folder of a small ResNet, which has batch norms; its images are of 32 by 32."""
    arguments = {"stem_width": 8, "channels": [8, 16, 16, 32]}
    size = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    model = timm.create_model("resnet10t", num_classes=classes, pretrained_cfg_overlay=size, **arguments)
    save_checkpoint(folder, model, model_args=arguments, masks=None, record={"method": "dense"})
    return folder


def images(count: int, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
