"""Measure speed, memory and accuracy of models on engines, interleaved, and only if their answers are right.

Each model on each engine is a process of its own (:mod:`trainers.engines.process`). First all are loaded and
answer the same images; one whose answers differ from the model's is not timed. Then they are timed in rounds:
in each round each process runs a few batches, in a new random order, so that other load of the machine slows
down all of them alike.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestration.benchmark.images import Tests, comparison_images
from orchestration.benchmark.models import Variant
from orchestration.benchmark.options import BenchmarkOptions
from orchestration.commands.progress import Bars
from pruners.errors import InputError, first_line
from trainers.config.engines import Choice
from trainers.engines.agreement import Agreement
from trainers.engines.interleave import time_interleaved
from trainers.engines.process import EngineError, EngineProcess
from trainers.engines.registry import check

_CHUNK = 64  # images of one pass when accuracy is measured


@dataclass(frozen=True)
class Row:
    """A model on an engine at one batch size.

    Attributes:
        seconds: of one pass, in each round.
        memory: peak memory of its process in bytes, imports and loading included.
        disk: bytes of the files that it runs.
        note: the reason if there is no time, as text.
    """

    model: str
    choice: Choice
    batch: int
    sparsity: float
    seconds: tuple[float, ...] = ()
    memory: int | None = None
    disk: int | None = None
    top1: float | None = None
    agreement: Agreement | None = None
    note: str = ""

    @property
    def timed(self) -> bool:
        return bool(self.seconds)

    @property
    def latency(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles, in seconds."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)

    @property
    def throughput(self) -> float:
        """Images per second."""
        return self.batch / self.latency

    @property
    def wrong(self) -> bool:
        """Return whether the engine's answers are not the model's."""
        return self.agreement is not None and not self.agreement.holds(self.choice.kind, self.choice.engine)


@dataclass
class _Case:
    """A model on an engine, while it is being measured."""

    variant: Variant
    choice: Choice
    row: Row
    process: EngineProcess | None = None
    memory: dict[int, int] = field(default_factory=dict)

    def fails(self, note: str) -> None:
        self.row = replace(self.row, note=note)
        if self.process is not None:
            self.process.close()
            self.process = None


def measure(variants: Sequence[Variant], options: BenchmarkOptions, bars: Bars) -> list[Row]:
    """Measure each model on each engine at each batch size.

    Args:
        variants: the models.
        options: engines, batch sizes, images, rounds.
        bars: show how far it is.

    Returns:
        A row for each of them.

    Raises:
        InputError: images that the models cannot take, or engines that run none of the models.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="espalier-")))
        cases = _cases(variants, options)
        tests = (
            None
            if options.data is None
            else Tests.of(variants[0], options.data, options.images, options.columns)
        )
        images = {
            variant.name: comparison_images(variant, options.data, options.columns) for variant in variants
        }
        for number, case in enumerate(cases):
            _start(case, options, images[case.variant.name], variants, scratch=scratch, stack=stack)
            bars("engines", number + 1, len(cases))
        workers = {key: case.process for key, case in enumerate(cases) if case.process is not None}
        times, failed = time_interleaved(workers, options.batches, options.repetitions, bars)
        for key, note in failed.items():
            cases[key].fails(f"fails: {note}")
        if tests is not None:
            _accuracy([cases[key] for key in times], tests, scratch, bars)
        return [
            row for key, case in enumerate(cases) for row in _rows(case, options.batches, times.get(key, {}))
        ]


def _cases(variants: Sequence[Variant], options: BenchmarkOptions) -> list[_Case]:
    """All pairs of models and engines; an exported folder only with its own engine."""
    cases = []
    for variant in variants:
        for choice in options.choices:
            row = Row(variant.name, choice, 0, variant.sparsity)
            refused = variant.refuses(choice)
            if refused is None:
                cases.append(_Case(variant, choice, row))
            elif variant.model is not None:
                cases.append(_Case(variant, choice, replace(row, note=refused)))
        if not any(case.variant is variant for case in cases):
            own = Choice(variant.record["engine"], variant.record["type"])
            if options.engines is not None:
                asked = ", ".join(map(str, options.choices))
                raise InputError("--engines", asked, f"none runs {variant.name}, which is a file for {own}")
            check(own, options.device, key="--engines")
            cases.append(_Case(variant, own, Row(variant.name, own, 0, variant.sparsity)))
    return cases


def _start(
    case: _Case,
    options: BenchmarkOptions,
    images: NDArray[np.float32],
    others: Sequence[Variant],
    *,
    scratch: Path,
    stack: ExitStack,
) -> None:
    """Write the engine's file, load it, compare its answers, and run each batch size for the first time."""
    if case.row.note:
        return
    known = case.variant.questions(images, others)
    if known is None:
        case.fails("not timed, as nothing says what it ought to answer: name the model it was made from too")
        return
    asked, expected = known
    batches = scratch / f"{case.variant.name.replace('/', '-')}-batches.npy"
    if not batches.exists():
        size = max(*options.batches, len(images))
        np.save(batches, np.resize(images, (size, *images.shape[1:])), allow_pickle=False)
    try:
        file = case.variant.file(case.choice, scratch)
    except InputError as error:
        case.fails(error.expected)
        return
    case.row = replace(case.row, disk=file.size)
    try:
        case.process = EngineProcess(case.choice, file.path, options.hardware, batches)
        stack.callback(case.process.close)
        questions = scratch / "questions.npy"
        np.save(questions, asked, allow_pickle=False)
        agreement = Agreement.of(case.process.answers(questions, len(asked)), expected)
        case.row = replace(case.row, agreement=agreement)
        if case.row.wrong:
            case.fails(f"wrong answers: {agreement}")
            return
        for batch in options.batches:
            case.memory[batch] = case.process.warm(batch)
    except EngineError as error:
        case.fails(f"fails: {first_line(error)}")


def _accuracy(cases: Sequence[_Case], tests: Tests, scratch: Path, bars: Bars) -> None:
    """Top-1 of each model by each engine; images are decoded once for all models that take them alike."""
    right = dict.fromkeys(map(id, cases), 0)
    for done, (labels, pixels) in enumerate(tests.chunks([case.variant for case in cases]), start=1):
        for case in cases:
            assert case.process is not None
            path = scratch / "chunk.npy"
            np.save(path, pixels[case.variant.name], allow_pickle=False)
            logits = case.process.answers(path, _CHUNK)
            right[id(case)] += int((logits.argmax(1) == labels).sum())
        bars("accuracy", done, tests.parts)
    for case in cases:
        case.row = replace(case.row, top1=right[id(case)] / len(tests))


def _rows(case: _Case, batches: Sequence[int], times: Mapping[int, tuple[float, ...]]) -> Iterator[Row]:
    for batch in batches:
        yield replace(case.row, batch=batch, seconds=times.get(batch, ()), memory=case.memory.get(batch))
