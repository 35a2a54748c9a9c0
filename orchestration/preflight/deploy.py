"""Checks of what a sweep makes of its models at the end: INT8, files for engines, latency tables."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import nn

from orchestration.preflight.training import check_training
from orchestration.recipe.schema import Recipe
from orchestration.recipe.search import Fastest
from orchestration.state.latency_store import check_linear, check_threads
from pruners.errors import InputError
from pruners.model.layers import PrunableLayer
from trainers.config.latency import LatencyTarget
from trainers.deploy.formats import FORMATS, check_packable
from trainers.engines.registry import check
from trainers.optional_imports import require
from trainers.quantization.checks import check_mode
from trainers.quantization.int8_folder import NEEDS


def check_libraries(recipe: Recipe) -> None:
    """Check that this machine can write INT8 and the files that are asked for, and run them.

    Raises:
        InputError: a library or an instruction of the processor is missing, or INT8 cannot be trained for.
    """
    if recipe.quantize is not None:
        require("quantize.mode", recipe.quantize.mode, *NEEDS)
        if recipe.quantize.training is not None:
            check_training(recipe.quantize.training, "quantize.recovery.")
    for kind in recipe.export:
        form = FORMATS[kind]
        calibration = "data.train" if form.calibration == "needed" else None
        with InputError.renamed({"format": "export"}):
            form.check(kind, calibration)


def check_deployable(recipe: Recipe, model: nn.Module, layers: Sequence[PrunableLayer]) -> None:
    """Check that a model can be quantized and written as the recipe asks, by its structure alone.

    Args:
        recipe: that asks for it.
        model: on any device, the meta device too.
        layers: those that the recipe prunes.

    Raises:
        InputError: INT8 would leave the larger part of its weights in float32, or an engine cannot run it.
    """
    if recipe.quantize is not None:
        check_mode(model, recipe.quantize.mode, [layer.name for layer in layers], "quantize.mode")
    if any(FORMATS[kind].engine == "sparse" for kind in recipe.export):
        check_packable(model, "export")
    for part, target in _targets(recipe).items():
        if target.engine == "sparse":
            check_packable(model, f"{part}.target.engine")
    if "allocation" in _targets(recipe):
        check_linear(model, layers)


def check_latency(recipe: Recipe, *, local: bool) -> None:
    """Check that latencies can be measured: the engine is installed, and the machine has the threads.

    Raises:
        InputError: it is not, or it has not.
    """
    for part, target in _targets(recipe).items():
        check(target.choice, "cpu", key=f"{part}.target.engine")
        if local and not os.environ.get("RAY_ADDRESS"):
            check_threads(target, os.cpu_count() or 1, key=f"{part}.target.threads")


def _targets(recipe: Recipe) -> dict[str, LatencyTarget]:
    """What latencies are measured for, by the part of the recipe."""
    rule, step = recipe.allocation.rule, recipe.structured
    targets: dict[str, LatencyTarget] = {}
    if step is not None and step.objective == "latency":
        targets["structured"] = step.serves
    if isinstance(rule, Fastest) and recipe.allocation.trials:
        targets["allocation"] = rule.target
    return targets
