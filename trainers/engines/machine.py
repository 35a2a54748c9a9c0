"""Describe the machine on which something is measured, as far as it matters to speed; without its name."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from trainers.optional_imports import installed

_FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "i8mm",
)
_PACKAGES = ("espalier", "torch", "timm", "onnx", "onnxruntime", "openvino", "nncf", "numpy")
_CPU, _MEMORY = Path("/proc/cpuinfo"), Path("/proc/meminfo")


def describe_machine() -> dict[str, Any]:
    """Processor, instruction sets, cores, memory in bytes, GPU, load of the last minute, versions."""
    return {
        "processor": _field(_CPU, "model name") or platform.processor() or platform.machine(),
        "instructions": [flag for flag in _FLAGS if flag in _field(_CPU, "flags", "Features").split()],
        "cores": os.cpu_count(),
        "memory": 1024 * int((_field(_MEMORY, "MemTotal") or "0").split()[0]),
        "gpu": _gpu(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **installed(*_PACKAGES)},
    }


def _field(path: Path, *names: str) -> str:
    """The value of the first line of a ``/proc`` file that has one of these names."""
    if not path.exists():
        return ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
