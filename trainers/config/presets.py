"""Presets: the schedules published for DIMAP and oViT, and the augmentation of oViT's appendix.

A name in a recipe stands for the values below; keys that the recipe gives beside it override them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SPARSITY: dict[str, dict[str, Any]] = {
    # oViT, ViT and DeiT in 300 epochs: every 20 epochs, linear between the points
    "ovit_300_90": {"kind": "points", "points": {0: 0.4, 40: 0.6, 100: 0.75, 280: 0.9}, "every": 20},
    "ovit_300_75": {"kind": "points", "points": {0: 0.4, 40: 0.6, 100: 0.75}, "every": 20},
    "ovit_300_50": {"kind": "points", "points": {0: 0.4, 20: 0.5}},
    # oViT to 75 % in 120 epochs: steps every 30 epochs
    "ovit_120_75": {"kind": "points", "points": {0: 0.5, 90: 0.75}, "every": 30},
}
"""Sparsity schedules (``pruning.schedule``)."""

LEARNING_RATE: dict[str, dict[str, Any]] = {
    "ovit_300_90": {"kind": "cyclic", "peak": 5e-4, "floor": 1e-5, "warmup_epochs": 5},
    "ovit_300_75": {"kind": "cyclic", "peak": 5e-4, "floor": 0.0, "warmup_epochs": 5},
    "ovit_120_75": {"kind": "cyclic", "cycle_peaks": [2e-4, 2e-4, 4e-4, 4e-4], "peak": 2e-4, "floor": 1e-5},
    "ovit_one_shot": {"kind": "linear", "peak": 1e-4, "floor": 1e-5},  # 20 epochs
    "ovit_2of4": {"kind": "linear", "peak": 5e-4, "floor": 1e-5},  # 50 epochs
    "ovit_int8": {"kind": "linear", "peak": 1e-4, "floor": 1e-5},  # 50 epochs of QAT
    "ovit_cnn": {"kind": "cyclic", "peak": 0.2, "floor": 1e-3, "cycle_epochs": 20},  # SGD
    # AdamW for 30 epochs, as Swin's own fine-tuning
    "dimap": {"kind": "cosine", "peak": 2e-5, "floor": 2e-7, "warmup_epochs": 15, "warmup_from": 2e-8},
}
"""Learning-rate schedules (``lr``)."""

_CROP = {"scale": (0.08, 1.0), "flip": 0.5}
_LIGHT = {"weight_decay": 0.03, "clip_grad": 1.0, "drop_path": 0.0}

TRAINING: dict[str, dict[str, Any]] = {
    "light1": {"augment": {**_CROP, "rand_augment": "rand-m0-n2"}, **_LIGHT},
    "light2": {"augment": {**_CROP, "rand_augment": "rand-m10-n2", "mixup": 0.2, "cutmix": 0.2}, **_LIGHT},
    "medium1": {"augment": {**_CROP, "rand_augment": "rand-m15-n2", "mixup": 0.2, "cutmix": 0.2}, **_LIGHT},
    "medium2": {"augment": {**_CROP, "rand_augment": "rand-m15-n2", "mixup": 0.5, "cutmix": 0.5}, **_LIGHT},
    "deit": {
        "augment": {
            **_CROP,
            "rand_augment": "rand-m9-mstd0.5-inc1",
            "erasing": 0.25,
            "mixup": 0.8,
            "cutmix": 1.0,
        },
        "weight_decay": 0.05,
        "clip_grad": 1.0,
        "drop_path": 0.1,
    },
}
"""Augmentation and regularisation (``training.preset``), from weak to strong; smaller models need less."""


def named(value: object, known: Mapping[str, Mapping[str, Any]]) -> object:
    """The settings that a preset's name stands for; a value that is no name is returned as it is.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(value, str):
        return value
    if value not in known:
        raise ValueError(f"must be one of {', '.join(known)}, or keys of its own ({value!r} given)")
    return dict(known[value])


def merged(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``preset`` overridden by the keys of ``given``, one level deep too."""
    settings = {**preset, **given}
    for key, value in preset.items():
        if isinstance(value, Mapping) and isinstance(given.get(key), Mapping):
            settings[key] = {**value, **given[key]}
    return settings
