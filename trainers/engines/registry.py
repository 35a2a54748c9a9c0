"""What runs a model: torch in several ways, ONNX Runtime, OpenVINO. Each behind the same small protocol.

Nothing heavy is imported before an engine loads, so that a process which runs ONNX Runtime holds no torch,
and the memory that is measured of it is its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pruners.errors import InputError
from trainers.config.engines import TYPES, Choice, stored_as
from trainers.data.preprocessing import Images
from trainers.optional_imports import missing, openvino_core

if TYPE_CHECKING:
    from torch import nn

Run = Callable[[Images], NDArray[np.float32]]
"""Images (batch, channels, height, width), normalised, to logits (batch, classes)."""
SPARSE_ENOUGH = 0.5
"""Least share of zeros with which the engine ``csr`` takes a layer for a sparse one."""


@dataclass(frozen=True)
class Placement:
    """Where an engine works: so many threads of the processor, or ``cuda``."""

    threads: int
    device: str = "cpu"


class Engine(Protocol):
    """Attributes:
    types: the data types that it computes in, its default first.
    devices: on which it runs.
    """

    @property
    def types(self) -> tuple[str, ...]: ...

    @property
    def devices(self) -> tuple[str, ...]: ...

    def lacking(self, kind: str, device: str) -> str | None:
        """Why it cannot compute here in a data type; ``None`` if it can."""

    def load(self, path: Path, kind: str, place: Placement) -> Run:
        """Take a model's file (or folder) to run."""


@dataclass(frozen=True)
class Torch:
    """torch itself: a checkpoint folder, a ``.pt2``, or the ``.safetensors`` of one linear layer.

    ``change`` makes of the model what is to be run.
    """

    types: tuple[str, ...] = TYPES["torch"]
    devices: tuple[str, ...] = ("cpu", "cuda")
    change: Callable[[nn.Module], nn.Module] | None = None
    needs: Callable[[str], str | None] = lambda device: None

    def lacking(self, kind: str, device: str) -> str | None:
        return self.needs(device)

    def load(self, path: Path, kind: str, place: Placement) -> Run:
        import torch

        torch.set_num_threads(place.threads)
        if path.suffix == ".pt2":
            model: nn.Module = torch.export.load(path).module()
        elif path.suffix == ".safetensors":
            model = _linear(path)
        else:
            from trainers.checkpoint.folder import load_checkpoint

            model = load_checkpoint(str(path), key="model").model.eval()
        dtype: torch.dtype = getattr(torch, kind)
        model = model.to(place.device, dtype).requires_grad_(False)
        if self.change is not None:
            model = self.change(model)

        def run(images: Images) -> NDArray[np.float32]:
            with torch.inference_mode():
                logits = model(torch.from_numpy(images).to(place.device, dtype))
                found: NDArray[np.float32] = logits.float().cpu().numpy()
            return found

        return run


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime's CPU provider: ``model.onnx`` as it is; in INT8 if the file is."""

    types: tuple[str, ...] = TYPES["onnxruntime"]
    devices: tuple[str, ...] = ("cpu",)

    def lacking(self, kind: str, device: str) -> str | None:
        return missing("onnxruntime", "onnx", "onnxscript")

    def load(self, path: Path, kind: str, place: Placement) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = place.threads, 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: np.asarray(session.run(None, {name: images})[0], np.float32)


@dataclass(frozen=True)
class OpenVino:
    """OpenVINO's CPU plug-in: ``model.xml``, or an ONNX file. bfloat16 only where the processor has it.

    ``int8-bfloat16`` is an INT8 file whose other operations are computed in bfloat16. With ``fixed`` the
    model is compiled for each shape of images that it is given, a tenth faster than once for all of them.
    """

    types: tuple[str, ...] = TYPES["openvino"]
    devices: tuple[str, ...] = ("cpu",)
    fixed: bool = True

    def lacking(self, kind: str, device: str) -> str | None:
        lacks = missing("openvino", "onnx", "onnxscript", *(["nncf"] if stored_as(kind) == "int8" else []))
        if lacks is not None or not kind.endswith("bfloat16"):
            return lacks
        able = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return None if "BF16" in able else "this processor has no bfloat16"

    def load(self, path: Path, kind: str, place: Placement) -> Run:
        settings = {
            "INFERENCE_NUM_THREADS": place.threads,
            "NUM_STREAMS": 1,
            # by itself it would compute in bfloat16 where it can, and call that float32
            "INFERENCE_PRECISION_HINT": "bf16" if kind.endswith("bfloat16") else "f32",
        }
        core = openvino_core()
        model = core.read_model(path)
        if not self.fixed:
            whole = core.compile_model(model, "CPU", settings)
            return lambda images: np.array(whole(images)[0], np.float32)

        @cache
        def compiled(shape: tuple[int, ...]) -> Any:
            model.reshape(list(shape))
            return core.compile_model(model, "CPU", settings)

        return lambda images: np.array(compiled(images.shape)(images)[0], np.float32)


def _linear(path: Path) -> nn.Module:
    """One linear layer, of its ``weight`` and ``bias``."""
    from safetensors.torch import load_file
    from torch import nn

    state = load_file(path)
    outputs, inputs = state["weight"].shape
    layer = nn.Linear(inputs, outputs)
    layer.load_state_dict(state)
    return nn.Sequential(layer)  # in a model, so that it can be replaced


def _compiled(model: nn.Module) -> nn.Module:
    import torch

    made: Any = torch.compile(model, dynamic=False)  # each batch size for itself, as fast as it goes
    return made  # type: ignore[no-any-return]


def _sparse_rows(model: nn.Module) -> nn.Module:
    """Linear layers with zeros enough as sparse rows (CSR)."""
    import warnings

    from torch import nn

    from trainers.engines.sparse_linear import SparseRows

    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and zeros(module) >= SPARSE_ENOUGH:
            model.set_submodule(name, SparseRows(module))
    return model


def _semi_structured(model: nn.Module) -> nn.Module:
    """Linear layers that keep 2:4 in the form that the GPU's sparse units take, compiled."""
    from torch import nn
    from torch.sparse import to_sparse_semi_structured

    for module in model.modules():
        if isinstance(module, nn.Linear) and keeps_2_of_4(module):
            sparse = to_sparse_semi_structured(module.weight.detach().contiguous())
            module.weight = nn.Parameter(sparse, requires_grad=False)
    return _compiled(model)


def keeps_2_of_4(layer: nn.Linear) -> bool:
    """Whether at least two of each four weights along the inputs are zero, in sides that the GPU takes."""
    rows, columns = layer.weight.shape
    if rows % 32 or columns % 64:
        return False
    return bool(((layer.weight.detach().reshape(rows, -1, 4) == 0).sum(-1) >= 2).all())


def zeros(layer: nn.Linear) -> float:
    """The share of a layer's weights that are zero."""
    return float((layer.weight == 0).float().mean())


def _compiler(device: str) -> str | None:
    if device == "cpu" and not any(
        map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))
    ):
        return "torch.compile needs a C++ compiler (g++), and there is none"
    return None


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "torch": Torch(),
        "compile": Torch(types=TYPES["compile"], change=_compiled, needs=_compiler),
        "csr": Torch(types=TYPES["csr"], devices=("cpu",), change=_sparse_rows),
        "onnxruntime": OnnxRuntime(),
        "openvino": OpenVino(),
        "2:4": Torch(types=TYPES["2:4"], devices=("cuda",), change=_semi_structured),
    }
)
ANY_BATCH: Mapping[str, Engine] = MappingProxyType({**ENGINES, "openvino": OpenVino(fixed=False)})
"""The same, none of which is told the batch size before it compiles a file."""


def check(choice: Choice, device: str, key: str = "engine") -> None:
    """Whether an engine can run here.

    Raises:
        InputError: one that is not installed (names the extra), or cannot run on ``device``.
    """
    engine = ENGINES[choice.engine]
    if device not in engine.devices:
        others = [name for name, other in ENGINES.items() if device in other.devices]
        expected = f"runs on {', '.join(engine.devices)} only; on {device}: {', '.join(others)}"
        raise InputError(key, choice.engine, expected)
    lacking = engine.lacking(choice.kind, device)
    if lacking is not None:
        raise InputError(key, str(choice), lacking)


def load(choice: Choice, path: Path, place: Placement) -> Run:
    """A model's file (or folder), as an engine runs it."""
    return ENGINES[choice.engine].load(path, choice.kind, place)
