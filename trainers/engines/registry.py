"""Inference engines behind one protocol: torch in several ways, ONNX Runtime, OpenVINO, our sparse one.

Nothing heavy is imported before an engine loads a model: a process that runs ONNX Runtime does not load
torch, so that its measured memory is that of the engine.
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
"""The least share of zeros with which the engine ``csr`` stores a layer as a sparse one."""


@dataclass(frozen=True)
class Placement:
    """The threads and the device on which an engine runs.

    Attributes:
        threads: number of threads on the CPU.
        device: ``cpu`` or ``cuda``.
    """

    threads: int
    device: str = "cpu"


class Engine(Protocol):
    """An inference engine. All engines are listed in :data:`ENGINES`."""

    @property
    def types(self) -> tuple[str, ...]:
        """The data types in which it computes, its default first."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices on which it runs: ``cpu``, ``cuda``."""

    def lacking(self, kind: str, device: str) -> str | None:
        """The reason why the engine cannot compute in ``kind`` on this machine; ``None`` if it can."""

    def load(self, path: Path, kind: str, placement: Placement) -> Run:
        """Load a model.

        Args:
            path: a file or a folder, as the engine takes it.
            kind: the data type in which to compute.
            placement: threads and device.

        Returns:
            A function from images (batch, channels, height, width) to logits (batch, classes).
        """


@dataclass(frozen=True)
class Torch:
    """PyTorch: runs a checkpoint folder, a ``.pt2`` file, or the ``.safetensors`` of one linear layer.

    Attributes:
        types: data types in which it computes.
        devices: where it runs.
        change: converts the loaded model before it is run.
        needs: returns the reason why a device cannot run this engine; ``None`` if it can.
    """

    types: tuple[str, ...] = TYPES["torch"]
    devices: tuple[str, ...] = ("cpu", "cuda")
    change: Callable[[nn.Module], nn.Module] | None = None
    needs: Callable[[str], str | None] = lambda device: None

    def lacking(self, kind: str, device: str) -> str | None:
        """See :class:`Engine`."""
        return self.needs(device)

    def load(self, path: Path, kind: str, placement: Placement) -> Run:
        """See :class:`Engine`."""
        import torch

        torch.set_num_threads(placement.threads)
        if path.suffix == ".pt2":
            model: nn.Module = torch.export.load(path).module()
        elif path.suffix == ".safetensors":
            model = _linear(path)
        else:
            from trainers.checkpoint.folder import load_checkpoint

            model = load_checkpoint(str(path), key="model").model.eval()
        dtype: torch.dtype = getattr(torch, kind)
        model = model.to(placement.device, dtype).requires_grad_(False)
        if self.change is not None:
            model = self.change(model)

        def run(images: Images) -> NDArray[np.float32]:
            with torch.inference_mode():
                logits = model(torch.from_numpy(images).to(placement.device, dtype))
                answers: NDArray[np.float32] = logits.float().cpu().numpy()
            return answers

        return run


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime's CPU provider: runs ``model.onnx`` in the data type of the file."""

    types: tuple[str, ...] = TYPES["onnxruntime"]
    devices: tuple[str, ...] = ("cpu",)

    def lacking(self, kind: str, device: str) -> str | None:
        """See :class:`Engine`."""
        return missing("onnxruntime", "onnx", "onnxscript")

    def load(self, path: Path, kind: str, placement: Placement) -> Run:
        """See :class:`Engine`."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = placement.threads, 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: np.asarray(session.run(None, {name: images})[0], np.float32)


@dataclass(frozen=True)
class OpenVino:
    """OpenVINO's CPU plug-in: runs ``model.xml`` or an ONNX file; bfloat16 only where the processor has it.

    ``int8-bfloat16`` is an INT8 file whose other operations are computed in bfloat16.

    Attributes:
        types: data types in which it computes.
        devices: where it runs.
        fixed: compile the model for each shape of batch, which runs a tenth faster than one compiled for all.
    """

    types: tuple[str, ...] = TYPES["openvino"]
    devices: tuple[str, ...] = ("cpu",)
    fixed: bool = True

    def lacking(self, kind: str, device: str) -> str | None:
        """See :class:`Engine`."""
        lacks = missing("openvino", "onnx", "onnxscript", *(["nncf"] if stored_as(kind) == "int8" else []))
        if lacks is not None or not kind.endswith("bfloat16"):
            return lacks
        able = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return None if "BF16" in able else "this processor has no bfloat16"

    def load(self, path: Path, kind: str, placement: Placement) -> Run:
        """See :class:`Engine`."""
        settings = {
            "INFERENCE_NUM_THREADS": placement.threads,
            "NUM_STREAMS": 1,
            # by default it computes float32 models in bfloat16 where the processor can
            "INFERENCE_PRECISION_HINT": "bf16" if kind.endswith("bfloat16") else "f32",
        }
        core = openvino_core()
        model = core.read_model(path)
        if not self.fixed:
            for_all = core.compile_model(model, "CPU", settings)
            return lambda images: np.array(for_all(images)[0], np.float32)

        @cache
        def compiled(shape: tuple[int, ...]) -> Any:
            model.reshape(list(shape))
            return core.compile_model(model, "CPU", settings)

        return lambda images: np.array(compiled(images.shape)(images)[0], np.float32)


@dataclass(frozen=True)
class Sparse:
    """The engine of :mod:`trainers.sparse`: runs the folder that it packs, or the ``.safetensors`` of one
    linear layer.

    Attributes:
        types: data types in which it computes.
        devices: where it runs.
    """

    types: tuple[str, ...] = TYPES["sparse"]
    devices: tuple[str, ...] = ("cpu",)

    def lacking(self, kind: str, device: str) -> str | None:
        """See :class:`Engine`."""
        lacks = missing("llvmlite")
        if lacks is not None or kind != "int8":
            return lacks
        from trainers.sparse.kernels import host

        return None if host.has_vnni() else "this processor has no AVX-512 VNNI, which INT8 needs here"

    def load(self, path: Path, kind: str, placement: Placement) -> Run:
        """See :class:`Engine`."""
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            from trainers.sparse.single import SingleLinear

            state = load_file(path)
            return SingleLinear(state["weight"], state["bias"], threads=placement.threads)
        from trainers.sparse import load

        return load(path, threads=placement.threads)


def _linear(path: Path) -> nn.Module:
    """A model of one linear layer, from a file with its ``weight`` and ``bias``."""
    from safetensors.torch import load_file
    from torch import nn

    state = load_file(path)
    outputs, inputs = state["weight"].shape
    layer = nn.Linear(inputs, outputs)
    layer.load_state_dict(state)
    return nn.Sequential(layer)  # inside a model, so that the engine can replace it


def _compiled(model: nn.Module) -> nn.Module:
    import torch

    made: Any = torch.compile(model, dynamic=False)  # compiled for each batch size, which is fastest
    return made  # type: ignore[no-any-return]


def _sparse_rows(model: nn.Module) -> nn.Module:
    """Replace linear layers with enough zeros by sparse ones (CSR)."""
    import warnings

    from torch import nn

    from trainers.engines.sparse_linear import SparseRows

    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and zeros(module) >= SPARSE_ENOUGH:
            model.set_submodule(name, SparseRows(module))
    return model


def _semi_structured(model: nn.Module) -> nn.Module:
    """Store linear layers that follow 2:4 for the GPU's sparse tensor cores, and compile the model."""
    from torch import nn
    from torch.sparse import to_sparse_semi_structured

    for module in model.modules():
        if isinstance(module, nn.Linear) and keeps_2_of_4(module):
            sparse = to_sparse_semi_structured(module.weight.detach().contiguous())
            module.weight = nn.Parameter(sparse, requires_grad=False)
    return _compiled(model)


def keeps_2_of_4(layer: nn.Linear) -> bool:
    """Return whether two of each four weights along the inputs are zero, and the GPU supports the shape."""
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
        "sparse": Sparse(),
        "2:4": Torch(types=TYPES["2:4"], devices=("cuda",), change=_semi_structured),
    }
)
ANY_BATCH: Mapping[str, Engine] = MappingProxyType({**ENGINES, "openvino": OpenVino(fixed=False)})
"""The engines, compiled for any batch size, as users of an exported file run them."""


def check(choice: Choice, device: str, key: str = "engine") -> None:
    """Check that an engine can run on this machine.

    Args:
        choice: the engine and its data type.
        device: ``cpu`` or ``cuda``.
        key: the option or recipe key that asks for it, for the error message.

    Raises:
        InputError: the engine is not installed (names the extra), or cannot run on ``device``.
    """
    engine = ENGINES[choice.engine]
    if device not in engine.devices:
        others = [name for name, other in ENGINES.items() if device in other.devices]
        expected = f"runs on {', '.join(engine.devices)} only; on {device}: {', '.join(others)}"
        raise InputError(key, choice.engine, expected)
    lacking = engine.lacking(choice.kind, device)
    if lacking is not None:
        raise InputError(key, str(choice), lacking)


def load(choice: Choice, path: Path, placement: Placement) -> Run:
    """Load a model on an engine.

    Args:
        choice: the engine and its data type.
        path: a file or a folder, as the engine takes it.
        placement: threads and device.

    Returns:
        A function from images (batch, channels, height, width) to logits (batch, classes).
    """
    return ENGINES[choice.engine].load(path, choice.kind, placement)
