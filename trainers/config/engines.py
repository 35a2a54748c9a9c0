"""Names of inference engines and the data types that they compute in; :mod:`trainers.engines` runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pruners.errors import InputError, did_you_mean

TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "torch": ("float32", "bfloat16"),
        "compile": ("float32", "bfloat16"),
        "csr": ("float32",),
        "onnxruntime": ("float32", "int8"),
        "openvino": ("float32", "bfloat16", "int8", "int8-bfloat16"),
        "sparse": ("float32", "int8"),
        "2:4": ("bfloat16", "float16"),
    }
)
"""The data types of each engine, its default first."""


def stored_as(kind: str) -> str:
    """The data type of the weights in the file from which an engine computes in the data type ``kind``."""
    return "int8" if kind.startswith("int8") else "float32"


@dataclass(frozen=True)
class Choice:
    """An engine and the data type in which it computes."""

    engine: str
    kind: str

    @classmethod
    def parse(cls, text: str, key: str = "engine") -> Choice:
        """Read ``ENGINE`` or ``ENGINE:TYPE``.

        Raises:
            InputError: an unknown engine, or one without this data type.
        """
        name, kind = (text, "") if text in TYPES else text.rpartition(":")[::2]
        name, kind = (name, kind) if name else (kind, "")
        if name not in TYPES:
            raise InputError(key, name, f"must be one of {', '.join(TYPES)}{did_you_mean(name, TYPES)}")
        types = TYPES[name]
        if kind and kind not in types:
            expected = f"{name} computes in {', '.join(types)}{did_you_mean(kind, types)}"
            raise InputError(key, text, expected)
        return cls(name, kind or types[0])

    @property
    def stored(self) -> str:
        """The data type of the weights in the file that the engine loads."""
        return stored_as(self.kind)

    def __str__(self) -> str:
        return f"{self.engine}:{self.kind}"
