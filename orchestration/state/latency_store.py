"""Latency tables on the shared storage: measured once on a machine, read by every later search for it.

A table lies in ``latency/``, in a file named by a hash of all that its times depend on: the machine and its
versions, the engine and its settings, the pattern, and the model's shape. A table of another machine is never
read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from torch import nn

from orchestration.common.hashing import digest
from pruners.errors import InputError
from pruners.model.costs import cost_model
from pruners.model.layers import PrunableLayer
from pruners.model.sparsity_pattern import Pattern
from trainers import storage
from trainers.checkpoint.folder import load_checkpoint
from trainers.config.latency import LatencyTarget
from trainers.config.pruning import PruningSettings
from trainers.engines.latency import Target, linear_shapes, measure, measure_models
from trainers.engines.latency_table import LatencyTable
from trainers.engines.machine import describe_machine
from trainers.engines.registry import Placement, check
from trainers.loop.prune_step import prunable_layers
from trainers.models import factory

T = TypeVar("T")
_SHOWN = 0.9  # sparsity of the time that is shown beside the dense time


@dataclass(frozen=True)
class LatencyJob:
    """A request for a latency table: its model and its target; tables are kept below ``storage_uri``."""

    checkpoint: str
    pruning: PruningSettings
    target: LatencyTarget
    storage_uri: str

    def run(self) -> tuple[LatencyTable, bool]:
        """The table of this machine, and whether it was measured now.

        Raises:
            InputError: an engine that is not installed, too few processors, or no layer whose time depends on
                zeros.
            RuntimeError: the engine fails.
        """
        run = _target_here(self.target, "allocation.target")
        with self._model() as (folder, model):
            layers = prunable_layers(model, self.pruning)
            check_linear(model, layers)
            about = self._about(model)
            known = self._stored(about)
            if known is not None:
                return known, False
            shapes = linear_shapes(model, layers)
            whole, curves = measure(folder, shapes, run, Pattern.parse(self.pruning.pattern))
        table = LatencyTable(about, whole, shapes, curves)
        storage.write_json(self._file(about), table.as_json())
        return table, True

    def known(self) -> tuple[str, LatencyTable | None]:
        """The name of this machine's table, and the table if it was measured before."""
        with self._model() as (_, model):
            about = self._about(model)
        return digest(about), self._stored(about)

    @contextmanager
    def _model(self) -> Iterator[tuple[Path, nn.Module]]:
        """A local copy of the model's folder, and the model."""
        with storage.local_copy(self.checkpoint) as folder:
            yield folder, load_checkpoint(str(folder), layers=self.pruning.layers).model

    def _file(self, about: Mapping[str, Any]) -> str:
        return f"{self.storage_uri}/latency/{digest(about)}.json"

    def _stored(self, about: Mapping[str, Any]) -> LatencyTable | None:
        return _read(self._file(about), about)

    def _about(self, model: nn.Module) -> dict[str, Any]:
        """A description of everything that the times depend on."""
        size = factory.input_size(model)
        costs = cost_model(model, size)
        return {
            **circumstances(self.target),
            "pattern": self.pruning.pattern,
            "layers": self.pruning.model_dump(mode="json", include={"layers", "unfit"}),
            "model": {
                "kind": type(model).__name__,
                "input": list(size),
                "macs": costs.macs,
                "weights": {name: list(weight.shape) for name, weight in model.named_parameters()},
            },
        }


def circumstances(target: LatencyTarget) -> dict[str, Any]:
    """A description of what the times of all models depend on: this machine, the engine and its settings."""
    machine, choice = describe_machine(), target.choice
    packages = ("torch", "timm", choice.engine)
    return {
        "machine": {key: machine[key] for key in ("processor", "instructions", "cores", "system")},
        "versions": {name: machine["versions"][name] for name in packages if name in machine["versions"]},
        "engine": choice.engine,
        "compiled": "for the batch size",  # tables of OpenVINO compiled for any were slower
        "type": choice.kind,
        "batch": target.batch,
        "threads": target.threads,
    }


def times_of(checkpoints: list[str], target: LatencyTarget) -> list[float]:
    """Seconds that whole models take for a batch on this machine, measured interleaved.

    Raises:
        InputError: an engine that is not installed, or too few processors.
        RuntimeError: the engine fails.
    """
    run = _target_here(target, "structured.target")
    with ExitStack() as stack:
        folders = [stack.enter_context(storage.local_copy(checkpoint)) for checkpoint in checkpoints]
        return measure_models(folders, run)


def on_server(target: LatencyTarget, function: Callable[..., T], *given: Any) -> T:
    """Run a function as a Ray task, on a node with the resources that the target names.

    Args:
        target: the engine that will serve the model, and its resources.
        function: importable on the node.
        given: its arguments.

    Returns:
        What the function returns.
    """
    task = ray.remote(num_cpus=0, resources=target.resources or None)(function)
    result: T = ray.get(task.remote(*given))
    return result


def _target_here(target: LatencyTarget, key: str) -> Target:
    """Check that this machine can run a target, and return it with its threads and device.

    Raises:
        InputError: this machine cannot run it.
    """
    check(target.choice, "cpu", key=f"{key}.engine")
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    check_threads(target, processors, f"{key}.threads")
    return Target(target.choice, Placement(target.threads), target.batch)


def format_times(table: LatencyTable, target: LatencyTarget) -> str:
    """One line about a table: its times for the dense and a sparse model, a note if zeros gain nothing."""
    dense, sparse = table.at({}), table.uniform(_SHOWN)
    fastest = min(table.uniform(sparsity) for curve in table.curves.values() for sparsity in curve.sparsities)
    gain = "" if fastest < dense else "; zeros gain nothing on it"
    times = f"{1e3 * dense:.2f} ms dense, {1e3 * sparse:.2f} ms with {100 * _SHOWN:.0f} % zeros"
    return f"{target}: {times}{gain}"


def check_threads(target: LatencyTarget, processors: int, key: str) -> None:
    """Check that the serving machine has a processor for each thread.

    Args:
        target: the engine that will serve the model, and its threads.
        processors: number of processors of the machine.
        key: the recipe key of the threads, for the error message.

    Raises:
        InputError: more threads than processors.
    """
    if target.threads > processors:
        raise InputError(key, target.threads, f"the machine that serves has {processors} processors")


def check_linear(model: nn.Module, layers: Sequence[PrunableLayer]) -> None:
    """Check that zeros can save time at all.

    Raises:
        InputError: none of the pruned layers is linear.
    """
    linear = {f"{name}.weight" for name, part in model.named_modules() if type(part) is nn.Linear}
    if not linear & {layer.name for layer in layers}:
        expected = "no engine gains by zeros but in linear layers, and of this model none is pruned"
        raise InputError("allocation.objective", "latency", expected)


def _read(file: str, about: Mapping[str, Any]) -> LatencyTable | None:
    """Read a stored table; ``None`` if it is incomplete, or of other circumstances."""
    if not storage.exists(file):
        return None
    try:
        table = LatencyTable.from_json(storage.read_json(file))
    except (ValueError, KeyError, TypeError):
        return None
    return table if table.about == about else None
