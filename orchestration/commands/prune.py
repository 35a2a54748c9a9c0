"""``espalier prune``: one model in one shot, on this machine, without Ray."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from torch import nn

from orchestration.commands.model_source import check_images, device_for, layers_of, load
from orchestration.commands.output import enough_memory, free_folder, whole_folder
from orchestration.commands.progress import Bars, interruptible
from orchestration.commands.prune_options import PruneOptions, layer_patterns
from pruners.allocation.bounds import bounds
from pruners.allocation.projection import check_feasible
from pruners.arithmetic import ceil_div
from pruners.elimination.damping import LADDER
from pruners.elimination.gradients import Batch
from pruners.errors import InputError
from pruners.methods.base import Pruner
from pruners.methods.registry import SECOND_ORDER, create_pruner
from pruners.methods.second_order import SecondOrder
from pruners.model.costs import Costs, count_costs
from pruners.model.layers import PrunableLayer
from pruners.model.left_dense import LeftDense
from pruners.model.masks import MaskSet
from pruners.model.sparsity_pattern import fitting_layers
from pruners.one_shot import PruneReport, pattern_budget, prune
from pruners.reconstruction.reconstruct import Reconstruction
from trainers.checkpoint.folder import save_checkpoint, size_on_disk
from trainers.data import datasets
from trainers.data.datasets import fixed_batches
from trainers.loop.evaluation import Evaluation, evaluate
from trainers.loop.prune_step import Gradients, gradient_source
from trainers.models import factory
from trainers.sources.columns import Columns


@dataclass(frozen=True)
class PruneJob:
    """A pruning, loaded and checked; nothing is written yet.

    ``masks`` are the model's own masks, which keep the zeros of layers that are not pruned now.
    """

    options: PruneOptions
    target: Path
    model: nn.Module
    layers: list[PrunableLayer]
    pruner: Pruner
    gradients: Gradients | None
    images: Callable[[], Iterable[Batch]] | None
    tests: datasets.Batches | None
    masks: MaskSet | None = None

    @classmethod
    def of(cls, options: PruneOptions) -> PruneJob:
        """Load and check all that the options name.

        Raises:
            InputError: any error that can be found before the work begins; names the option.
        """
        with _renamed(options):
            target = free_folder(options.out, "--out")
            device = device_for(options.device)
            patterns = layer_patterns(options.layers)
            loaded = load(options.model, patterns)
            chosen = options.for_method()
            if options.tries_damps:
                del chosen["damp"]
            pruner = create_pruner(options.method, **chosen)
            layers = fitting_layers(layers_of(loaded, patterns), pruner.sparsity_pattern, unfit=options.unfit)
            _check_budget(options, loaded.model, layers, pruner)
            model = loaded.model.to(device).eval()
            gradients, images = _gradients(options, model, pruner), _reconstruction_images(options, model)
            tests = _tests(options, model)
            return cls(options, target, model, layers, pruner, gradients, images, tests, loaded.masks)

    def run(self) -> list[str]:
        """Prune, write the folder, and return lines about it."""
        # torch warns about the attention of single images; no setting avoids it
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        with _renamed(self.options):
            with Bars(heading=self._plan()) as bars:
                outcome = interruptible(lambda: self._work(bars))
            self._write(outcome)
        return [f"{key:<12}{value}" for key, value in outcome.summary(self.target)]

    def _work(self, bars: Bars) -> Outcome:
        options, gradients = self.options, self.gradients
        before = self._top1(bars, "test before")
        report = prune(
            self.model,
            options.method,
            options.target,
            **options.for_method(),
            layers=self.layers,
            unfit=options.unfit,
            scope=options.scope,  # type: ignore[arg-type]  # checked
            floor=options.floor,
            ceiling=options.ceiling,
            batches=self._batches(),
            rounds=options.in_rounds,
            reconstruct=options.reconstruct or 0,
            held_out=None if gradients is None or gradients.held_out is None else _Again(gradients.held_out),
            per_sample=options.per_sample,
            memory=None if gradients is None else gradients.memory,
            progress=bars,
        )
        after = self._top1(bars, "test after")
        costs = count_costs(self.model, factory.input_size(self.model), report.allocation)
        tests = None if before is None or after is None else (before, after)
        return Outcome(options, self.layers, self._dense(), self.pruner, report, costs, tests)

    def _batches(self) -> Iterable[Batch] | None:
        """The batches for the gradients, or for a reconstruction alone."""
        if self.gradients is not None:
            return _Again(self.gradients.batches)
        return None if self.images is None else _Again(self.images)

    def _top1(self, bars: Bars, what: str) -> Evaluation | None:
        if self.tests is None:
            return None
        return evaluate(self.model, bars.over(what, self.tests, len(self.tests)))

    def _write(self, outcome: Outcome) -> None:
        masks, record = outcome.report.masks.over(self.masks), outcome.record()
        with whole_folder(self.target, self.options.out, "--out") as folder:
            # timm knows the arguments that built the model
            save_checkpoint(folder, self.model.cpu(), model_args={}, masks=masks, record=record)

    def _dense(self) -> LeftDense:
        return LeftDense.of(self.model, self.layers)

    def _plan(self) -> str:
        weights = sum(layer.numel for layer in self.layers)
        plan = f"left dense: {self._dense()}; --layers takes others\n"
        plan += f"{self.options.method}: {weights:,} weights in {len(self.layers)} layers"
        if self.gradients is None:
            return plan
        tries = f"; then {len(LADDER)} rounds, to find λ" if self.options.tries_damps else ""
        return f"{plan}, from {gradients_taken(self.options, self.pruner)}{tries}"


@dataclass(frozen=True)
class _Again:
    """Batches that each iteration reads from the beginning: a Fisher in parts needs several passes."""

    batches: Callable[[], Iterable[Batch]]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches())


def _gradients(options: PruneOptions, model: nn.Module, pruner: Pruner) -> Gradients | None:
    if options.method not in SECOND_ORDER or options.data is None:
        return None
    return gradient_source(
        _images(options.data, model, options.columns, "--data"),
        options.fisher,
        pruner,
        tries_damps=options.tries_damps,
        rank=0,
        world=1,
        seed=options.seed,
    )


def _reconstruction_images(options: PruneOptions, model: nn.Module) -> Callable[[], Iterable[Batch]] | None:
    """The batches for a reconstruction after a method without gradients."""
    if options.method in SECOND_ORDER or options.reconstruct is None or options.data is None:
        return None
    images = _images(options.data, model, options.columns, "--data")
    number = ceil_div(options.reconstruct, options.batch_size)
    return lambda: fixed_batches(images, options.batch_size, 0, number, rank=0, world=1, seed=options.seed)


def _tests(options: PruneOptions, model: nn.Module) -> datasets.Batches | None:
    if options.test is None:
        return None
    return datasets.eval_loader(_images(options.test, model, options.columns, "--test"), options.batch_size)


def _images(uri: str, model: nn.Module, columns: Columns, key: str) -> datasets.ImageTable:
    check_images(uri, model, key, columns)
    transform = datasets.eval_transform(factory.data_config(model))
    return datasets.images(uri, transform, key=key, columns=columns)


def _check_budget(
    options: PruneOptions, model: nn.Module, layers: list[PrunableLayer], pruner: Pruner
) -> None:
    """Check early whether floors and ceilings allow the budget, which :func:`prune` would find only later."""
    masks = MaskSet.from_zeros(model, layers)
    total = pattern_budget(layers, options.target, pruner.sparsity_pattern, masks)
    if sum(masks.pruned().values()) > total:
        expected = f"the model has more already: {masks.sparsity:.4f} of its prunable weights are zero"
        raise InputError("sparsity", options.target, expected)
    limits = bounds(layers, options.floor, options.ceiling, masks.pruned(), unit=pruner.sparsity_pattern.unit)
    ends = np.array([limits[layer.name] for layer in layers]).reshape(-1, 2)
    check_feasible(total, ends[:, 0], ends[:, 1])


@contextmanager
def _renamed(options: PruneOptions) -> Iterator[None]:
    """Errors of the layers below become errors of this command's options.

    Raises:
        InputError: also where the GPU's memory gives out.
    """

    def as_typed(error: InputError) -> InputError:
        if error.key == "budget":  # a count of weights
            return InputError("sparsity", options.target, f"{error.value:,} weights {error.expected}")
        if error.key in {"memory", "floor"}:
            return error.replaced(value=getattr(options, error.key))
        if error.key == "data" and error.value == options.test:
            return error.replaced(key="test")
        return error

    memory = enough_memory("batch_size", options.batch_size, "a smaller --memory")
    with InputError.renamed(_OPTIONS, _PHRASES), InputError.renamed(as_typed), memory:
        yield


_ARGUMENTS = ("model", "out")  # errors name these without dashes
_OPTIONS = {
    field.name: f"--{field.name.replace('_', '-')}"
    for field in fields(PruneOptions)
    if field.name not in _ARGUMENTS
} | {"batches": "--data", "held_out": "--data"}
"""Keys of the layers below -> what this command's user wrote."""
_PHRASES = {"unfit: dense": "--unfit dense"}


_FISHER = ("gradients", "block_size", "damp", "relative")


@dataclass(frozen=True)
class Outcome:
    """A model as it was pruned; ``tests`` are its figures before and after."""

    options: PruneOptions
    layers: list[PrunableLayer]
    dense: LeftDense
    pruner: Pruner
    report: PruneReport
    costs: Costs
    tests: tuple[Evaluation, Evaluation] | None

    def record(self) -> dict[str, Any]:
        """The record for ``pruning.json``, without versions and checksums."""
        options, report = self.options, self.report
        source = options.model
        record = {
            "method": report.method,
            "sparsity": report.sparsity,
            "allocation": report.allocation,
            "costs": self.costs.as_dict(),
            "seed": options.seed,
            "source": Path(source).name
            if Path(source).expanduser().exists()
            else source,  # without a path of this machine
            "options": options.as_record() | self._resolved(),
        }
        if report.reconstruction is not None:
            errors = report.reconstruction.errors.items()
            record["reconstruction"] = {
                "images": report.reconstruction.images,
                "errors": {name: {"before": before, "after": after} for name, (before, after) in errors},
            }
        if len(report.rounds) > 1:
            record["rounds"] = list(report.rounds)
        if report.damp is not None:
            tried = report.damp.losses.items()
            losses = {f"{damp:g}": loss if math.isfinite(loss) else None for damp, loss in tried}
            record["damp"] = {"chosen": report.damp.damp, "held_out_losses": losses}
        if self.tests is not None:
            before, after = self.tests
            record["figures"] = {"test_top1_before": before.top1, "test_top1": after.top1}
        return record

    def summary(self, target: Path) -> Iterator[tuple[str, str]]:
        """Headings and figures, once the checkpoint is at ``target``."""
        report, costs = self.report, self.costs
        sparsity_pattern = self.pruner.sparsity_pattern
        pattern = f", {sparsity_pattern.name}" if sparsity_pattern.structured else ""
        source = f", {gradients_taken(self.options, self.pruner)}" if self.pruner.gradients else ""
        yield "method", f"{report.method}{pattern}{source}"
        if isinstance(self.pruner, SecondOrder):
            yield "λ", self._damp(self.pruner)
        if len(report.rounds) > 1:
            yield "rounds", ", ".join(f"{100 * sparsity:.4g} %" for sparsity in report.rounds)
        if report.reconstruction is not None:
            yield "reconstruct", _solved(report.reconstruction)
        modules = Counter(layer.module for layer in self.layers)
        by_module = ", ".join(f"{count} {module}" for module, count in modules.items())
        yield "layers", f"{len(self.layers)} ({by_module})"
        weights = sum(layer.numel for layer in self.layers)
        yield "left dense", f"{self.dense} (--layers MODULE=REGEX takes others)"
        yield "pruned", f"{sum(report.allocation.values()):,} of {weights:,} weights"
        yield "sparsity", f"{100 * report.sparsity:.2f} % ({', '.join(self._shares())})"
        yield "parameters", f"{costs.parameters:,} → {costs.parameters_sparse:,} non-zero"
        yield "MACs", f"{costs.macs:,} → {costs.macs_sparse:,} where zeros cost nothing"
        if self.tests is not None:
            before, after = self.tests
            figures = f"{100 * before.top1:.2f} % → {100 * after.top1:.2f} %"
            yield "top-1", f"{figures} on {after.images:,} images of {self.options.test}"
        yield "written to", f"{self.options.out} ({size_on_disk(target) / 1e6:.2f} MB)"
        yield "load it by", f"timm.create_model({f'local-dir:{target}'!r}, pretrained=True)"

    def _damp(self, pruner: SecondOrder) -> str:
        choice = self.report.damp
        if choice is None:
            return f"{pruner.damp:g}" + (" of the mean of each layer's diagonal" if pruner.relative else "")
        tried = ", ".join(f"{damp:g}: {loss:.4f}" for damp, loss in choice.losses.items())
        return f"{choice.damp:g}, by the lowest held-out loss after one shot ({tried})"

    def _shares(self) -> Iterator[str]:
        weights, pruned = Counter[str](), Counter[str]()
        for layer in self.layers:
            weights[layer.module] += layer.numel
            pruned[layer.module] += self.report.allocation[layer.name]
        for module, count in weights.items():
            yield f"{module} {100 * pruned[module] / count:.2f} %"

    def _resolved(self) -> dict[str, Any]:
        """The method's own values for options that were not given."""
        if not isinstance(self.pruner, SecondOrder):
            return {}
        names = ("gradients", "block_size") if self.options.tries_damps else _FISHER
        return {name: getattr(self.pruner, name) for name in names}


def _solved(done: Reconstruction) -> str:
    """Text about a reconstruction: the layers' errors before and after, and the layers that it left."""
    before, after = (mean(pair[end] for pair in done.errors.values()) for end in (0, 1))
    error = f"mean squared error {before:.2g} → {after:.2g} of the variance"
    left = f"; not {', '.join(done.left)}" if done.left else ""
    return f"{len(done.errors)} layers on {done.images:,} images, {error}{left}"


def gradients_taken(options: PruneOptions, pruner: Pruner) -> str:
    """Text about the gradients: their number, and whether they are of batches or of single images."""
    of = "single images" if options.per_sample else f"{options.batch_size} images each"
    return f"{pruner.gradients:,} gradients of {of}"
