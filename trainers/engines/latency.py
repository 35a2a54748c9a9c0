"""Measure a latency table: each shape of linear layer at some sparsities, and the whole model, interleaved.

Only linear layers are timed: no engine here is faster for zeros elsewhere, so convolutions belong to the
rest. A layer is timed alone, with random weights and with zeros at random positions that follow the pattern.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, nextafter, sqrt
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pruners.errors import InputError, first_line
from pruners.model.costs import cost_model
from pruners.model.layers import PrunableLayer
from pruners.model.sparsity_pattern import Pattern
from trainers.checkpoint.folder import load_checkpoint, model_args, save_checkpoint
from trainers.config.engines import Choice
from trainers.data.preprocessing import pattern_images, preprocessing_of
from trainers.engines.interleave import K, time_interleaved
from trainers.engines.latency_table import Curve, LinearShape
from trainers.engines.process import EngineError, EngineProcess
from trainers.engines.registry import SPARSE_ENOUGH, Placement
from trainers.models import factory
from trainers.sparse.break_even import break_even

LAYER_SPARSITIES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Sparsities at which a layer is timed, unless the pattern fixes the sparsity."""
MODEL_SPARSITIES = (0.0, 0.5, 0.9)
"""Sparsities at which the whole model is timed: 0, the least that an engine treats as sparse, and high."""
_ROUNDS = 9
_SPARSE_FROM = {"csr": lambda: SPARSE_ENOUGH, "sparse": break_even}
"""By engine, the least share of zeros with which a layer runs without them on this machine."""
_OPSET, _IR = 18, 10  # versions of ONNX that all supported engines read


@dataclass(frozen=True)
class Target:
    """The target of a latency measurement: engine, threads and device, and the batch size in images."""

    choice: Choice
    placement: Placement
    batch: int


def linear_shapes(model: nn.Module, layers: Iterable[PrunableLayer]) -> dict[str, LinearShape]:
    """The shapes of the layers that are ``nn.Linear``, by the names of their weights."""
    modules = dict(model.named_modules())
    linear = [
        layer.name
        for layer in layers
        if layer.name.endswith(".weight") and type(modules[layer.name.removesuffix(".weight")]) is nn.Linear
    ]
    macs = cost_model(model, factory.input_size(model)).weight_macs
    shapes = {name: model.get_parameter(name).shape for name in linear}
    return {
        name: LinearShape(outputs, inputs, round(macs[name] / (outputs * inputs)))
        for name, (outputs, inputs) in shapes.items()
    }


def sparsities(pattern: Pattern, free: tuple[float, ...] = LAYER_SPARSITIES) -> tuple[float, ...]:
    """Sparsities at which layers with a pattern are timed: ``free``, or 0 and the one that N:M fixes."""
    return free if pattern.forced is None else (0.0, pattern.forced)


def measure(
    folder: Path,
    layers: Mapping[str, LinearShape],
    target: Target,
    pattern: Pattern,
    rounds: int = _ROUNDS,
) -> tuple[Curve, dict[LinearShape, Curve]]:
    """Measure the times of a latency table, as medians over interleaved rounds.

    Args:
        folder: a dense checkpoint folder.
        layers: shapes of the layers, as :func:`linear_shapes` finds them.
        target: the engine, where it runs, and the batch size.
        pattern: that of the zeros.
        rounds: number of samples of each time.

    Returns:
        Seconds of the whole model for a batch at several sparsities of these layers, and seconds of each
        shape of layer.

    Raises:
        InputError: a model that the engine's format cannot hold.
        RuntimeError: the engine fails; the message says how.
    """
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="espalier-") as made:
        scratch = Path(made)
        files: dict[tuple[LinearShape | None, float], _File] = {}
        for sparsity in sparsities(pattern, MODEL_SPARSITIES):
            directory = scratch / f"whole-{sparsity}"
            directory.mkdir()
            source = folder
            if sparsity:
                source = directory / "model"
                _write_sparse(folder, source, layers, sparsity, pattern=pattern, random=random)
            files[None, sparsity] = _whole(source, target, directory)
        for number, shape in enumerate(sorted(set(layers.values()))):
            inputs = scratch / f"{number}.npy"
            batch = random.standard_normal((target.batch, 1, shape.tokens, shape.inputs), np.float32)
            np.save(inputs, batch, allow_pickle=False)
            for sparsity in sparsities(pattern):
                weight = pruned_at(shape, sparsity, pattern, random)
                layer = _layer_file(weight, target.choice, scratch / f"{number}-{sparsity}")
                files[shape, sparsity] = layer, inputs
        curves = _curves(_medians(files, target, rounds), target.choice)
    whole = curves.pop(None)
    return whole, {shape: curve for shape, curve in curves.items() if shape is not None}


def _write_sparse(
    dense: Path,
    folder: Path,
    layers: Mapping[str, LinearShape],
    sparsity: float,
    *,
    pattern: Pattern,
    random: np.random.Generator,
) -> None:
    """Write a checkpoint with zeros at random positions of its layers, only to be timed."""
    model = load_checkpoint(str(dense)).model
    with torch.no_grad():
        for name, shape in layers.items():
            zeros = pruned_at(shape, sparsity, pattern, random) == 0
            model.get_parameter(name).masked_fill_(torch.from_numpy(zeros), 0.0)
    folder.mkdir()
    record = {"method": "dense", "sparsity": 0.0, "allocation": {}}
    save_checkpoint(folder, model, model_args=model_args(dense), masks=None, record=record)


def measure_models(folders: Sequence[Path], target: Target, rounds: int = _ROUNDS) -> list[float]:
    """Measure how long whole models take for a batch, as medians over interleaved rounds.

    Args:
        folders: checkpoint folders.
        target: the engine, where it runs, and the batch size.
        rounds: number of samples of each time.

    Returns:
        Seconds, in the order of the folders.

    Raises:
        InputError: a model that the engine's format cannot hold.
        RuntimeError: the engine fails; the message says how.
    """
    with tempfile.TemporaryDirectory(prefix="espalier-") as made:
        files = {}
        for number, folder in enumerate(folders):
            scratch = Path(made, str(number))
            scratch.mkdir()
            files[number] = _whole(folder, target, scratch)
        medians = _medians(files, target, rounds)
    return [medians[number] for number in range(len(folders))]


_File = tuple[Path, Path]  # the model that an engine loads, and its inputs


def _medians(files: Mapping[K, _File], target: Target, rounds: int) -> dict[K, float]:
    """Median seconds of each file for a batch, interleaved, in one process bound to the target's threads."""
    (first, *others) = files
    try:
        with EngineProcess(target.choice, files[first][0], target.placement, files[first][1]) as process:
            timed = {first: _Part(process, 0)}
            timed |= {key: _Part(process, process.add(*files[key])) for key in others}
            times, failed = time_interleaved(timed, [target.batch], rounds)
    except EngineError as error:
        raise RuntimeError(f"{target.choice} cannot be timed: {first_line(error)}") from None
    if failed:
        raise RuntimeError(f"{target.choice} cannot be timed: {next(iter(failed.values()))}")
    return {key: statistics.median(samples[target.batch]) for key, samples in times.items()}


@dataclass(frozen=True)
class _Part:
    """One of the files that an engine process has loaded."""

    process: EngineProcess
    number: int

    def seconds(self, batch: int, calls: int) -> float:
        """Mean seconds of ``calls`` passes over a batch."""
        return self.process.seconds(batch, calls, self.number)


def pruned_at(
    shape: LinearShape, sparsity: float, pattern: Pattern, random: np.random.Generator
) -> NDArray[np.float32]:
    """Make a random weight with zeros at random positions that follow a pattern.

    Args:
        shape: of the layer.
        sparsity: share of zeros, at least.
        pattern: that of the zeros.
        random: source of random numbers.

    Returns:
        (outputs, inputs), float32.
    """
    weight = random.standard_normal((shape.outputs, shape.inputs), np.float32) / sqrt(shape.inputs)
    if pattern.forced is not None and sparsity:
        groups = weight.reshape(-1, pattern.group)
        pruned = random.random(groups.shape).argsort(1) >= pattern.keep
        groups[pruned] = 0.0
        return groups.reshape(weight.shape)
    units = weight.reshape(-1, pattern.unit)
    units[random.permutation(len(units))[: ceil(sparsity * len(units))]] = 0.0
    return units.reshape(weight.shape)


def _curves(
    seconds: Mapping[tuple[LinearShape | None, float], float], choice: Choice
) -> dict[LinearShape | None, Curve]:
    """The times of each shape, and under ``None`` of the whole model, in ascending order of sparsity.

    The engines of :data:`_SPARSE_FROM` run a layer with fewer zeros as a dense one.
    """
    times_by_shape: dict[LinearShape | None, dict[float, float]] = {}
    for (shape, sparsity), took in seconds.items():
        times_by_shape.setdefault(shape, {})[sparsity] = took
    if choice.engine in _SPARSE_FROM:
        below = nextafter(_SPARSE_FROM[choice.engine](), 0.0)
        for times in times_by_shape.values():
            times[below] = times[0.0]
    return {
        shape: Curve(*zip(*sorted(times.items()), strict=True)) for shape, times in times_by_shape.items()
    }


def _whole(folder: Path, target: Target, scratch: Path) -> _File:
    """The file of a whole model as the engine loads it, and its images."""
    model = load_checkpoint(str(folder)).model.float().eval()
    images = scratch / "images.npy"
    np.save(images, pattern_images(preprocessing_of(model), target.batch), allow_pickle=False)
    if target.choice.engine in ("csr", "torch"):
        return folder, images
    if target.choice.engine == "sparse":
        from trainers.sparse.packing import pack

        try:
            pack(model, scratch / "packed", preprocessing=preprocessing_of(model))
        except ValueError as error:
            raise InputError("model", type(model).__name__, f"the sparse engine: {error}") from None
        return scratch / "packed", images
    from trainers.export.onnx import ONNX_FILE, export_onnx

    export_onnx(model, scratch / ONNX_FILE, factory.input_size(model), {})
    return scratch / ONNX_FILE, images


def _layer_file(weight: NDArray[np.float32], choice: Choice, path: Path) -> Path:
    """Write a linear layer as the engine loads it: safetensors for those that read checkpoints and for
    ``sparse``, else ONNX as in exported models."""
    bias = np.zeros(len(weight), np.float32)
    if choice.engine in ("csr", "sparse", "torch"):
        from safetensors.numpy import save_file

        file = path.with_name(f"{path.name}.safetensors")
        save_file({"weight": weight, "bias": bias}, file)
        return file
    from onnx import TensorProto, helper, numpy_helper

    outputs, inputs = weight.shape
    names = (("images", inputs), ("logits", outputs))
    first, last = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, "tokens", width])
        for name, width in names
    )
    nodes = [
        helper.make_node("MatMul", ["images", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
    ]
    weights = [numpy_helper.from_array(weight.T.copy(), "weight"), numpy_helper.from_array(bias, "bias")]
    graph = helper.make_graph(nodes, "linear", [first], [last], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    file = path.with_name(f"{path.name}.onnx")
    file.write_bytes(made.SerializeToString())
    return file
