"""``espalier benchmark``: who is timed and who is not, and what is said of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestration.benchmark.measure import Row
from orchestration.benchmark.plot import accuracy_over_latency
from orchestration.benchmark.report import Report, gain, milliseconds
from trainers.config.engines import Choice
from trainers.engines.agreement import TOLERANCE, Agreement
from trainers.engines.interleave import time_interleaved
from trainers.engines.machine import describe_machine
from trainers.engines.process import EngineError
from trainers.engines.registry import Placement

GOOD = Agreement(1e-6, 1e-7, 1.0)
TORCH, ORT, INT8 = Choice("torch", "float32"), Choice("onnxruntime", "float32"), Choice("onnxruntime", "int8")


def row(model: str, choice: Choice, milliseconds: float, batch: int = 1, **more: Any) -> Row:
    """Three rounds about a time."""
    seconds = tuple(1e-3 * milliseconds * share for share in (0.99, 1.0, 1.01))
    return Row(model, choice, batch, **{"sparsity": 0.0, "seconds": seconds, "agreement": GOOD, **more})


def report(
    *rows: Row, loss: float = 0.01, same_size: frozenset[str] = frozenset({"dense", "pruned"})
) -> Report:
    machine = {"processor": "a processor", "load": 0.1, "cores": 2}
    return Report(rows, Placement(1), 3, loss, None, same_size, machine, 0.1)


def text_of(benchmark: Report) -> str:
    console = Console(width=150, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(benchmark.table())
    return console.export_text() + "\n".join([*benchmark.notes(), *benchmark.recommendations()])


# taking turns


class Timed:
    """A worker that notes who was asked, and takes the seconds that it is told."""

    def __init__(self, name: str, takes: float, log: list[tuple[str, int, int]], last: int = 10**9) -> None:
        self._name, self._takes, self._log, self._last = name, takes, log, last

    def seconds(self, batch: int, calls: int) -> float:
        self._log.append((self._name, batch, calls))
        if len([entry for entry in self._log if entry[0] == self._name]) > self._last:
            raise EngineError("out of memory\nat some place")
        return self._takes * batch


def test_measure__all_take_turns_in_every_round() -> None:
    log: list[tuple[str, int, int]] = []
    workers = {name: Timed(name, takes, log) for name, takes in (("a", 0.001), ("b", 0.1))}
    times, failed = time_interleaved(workers, (1, 4), 5)
    assert failed == {}
    assert times == {
        "a": {1: (0.001,) * 5, 4: (0.004,) * 5},
        "b": {1: (0.1,) * 5, 4: (0.4,) * 5},
    }
    rounds = [log[i : i + 4] for i in range(0, len(log), 4)]
    assert len(rounds) == 6
    for order in rounds:
        assert {(name, batch) for name, batch, _ in order} == {("a", 1), ("a", 4), ("b", 1), ("b", 4)}
    assert len({tuple(order) for order in rounds[1:]}) > 1, (
        "always the same order: one always follows the same"
    )
    assert {(name, batch): calls for name, batch, calls in log[4:]} == {
        ("a", 1): 50,
        ("a", 4): 12,
        ("b", 1): 1,
        ("b", 4): 1,
    }


def test_measure__who_breaks_off_is_left_out() -> None:
    log: list[tuple[str, int, int]] = []
    workers = {"a": Timed("a", 0.1, log), "b": Timed("b", 0.1, log, last=3)}
    times, failed = time_interleaved(workers, (1,), 4)
    assert times == {"a": {1: (0.1,) * 4}}
    assert failed == {"b": "out of memory"}


# answers


def test_measure__what_is_no_answer_agrees_nowhere() -> None:
    expected = np.array([[1.0, 2.0], [3.0, -1.0]], np.float32)
    assert Agreement.of(expected, expected) == Agreement(0.0, 0.0, 1.0)
    for answers in (expected[:1], expected * np.nan, expected * np.inf, np.zeros((2, 3), np.float32)):
        assert not any(Agreement.of(answers, expected).holds(kind) for kind in TOLERANCE)
    half = Agreement.of(expected[::-1].copy(), expected)
    assert (half.top1, half.largest) == (0.0, 3.0)


@quick(40)
@given(st.floats(-3, 3), st.sampled_from(sorted(TOLERANCE)))
def test_measure__the_difference_is_relative(exponent: float, kind: str) -> None:
    expected = np.random.default_rng(0).normal(0, 10**exponent, (20, 5))
    for share, holds in ((0.9, True), (1.1, False)):
        answers = expected * (1 + share * TOLERANCE[kind])
        assert Agreement.of(answers, expected.astype(np.float64)).holds(kind) is holds  # type: ignore[arg-type]


# what is said


def test_measure__a_wrong_answer_is_never_called_fast() -> None:
    wrong = replace(
        row("pruned", INT8, 0.1, sparsity=0.5, top1=0.9), seconds=(), agreement=Agreement(9.0, 0.5, 0.1)
    )
    noted = replace(wrong, note=f"wrong answers: {wrong.agreement}")
    benchmark = report(row("dense", TORCH, 5, top1=0.9), row("dense", ORT, 3, top1=0.9), noted)
    assert wrong.wrong
    assert not benchmark.right
    best = benchmark.recommended(1)
    assert best is not None
    assert (best.model, best.choice) == ("dense", ORT)
    text = text_of(benchmark)
    assert "pruned on onnxruntime:int8: wrong answers" in text
    assert "wrong" in text.partition("50 % zeros")[2].splitlines()[0]
    assert json.loads(json.dumps(benchmark.as_json()))["rows"][2]["seconds"] is None


def test_measure__the_recommendation_keeps_the_accuracy() -> None:
    rows = [
        row("dense", TORCH, 5.0, top1=0.800),
        row("dense", ORT, 4.0, top1=0.800),
        row("pruned", ORT, 2.0, top1=0.793),
        row("pruned", INT8, 1.0, top1=0.780),
    ]
    best = report(*rows).recommended(1)
    assert best is rows[2]
    assert list(report(*rows).recommendations()) == [
        "batch 1: pruned on onnxruntime:float32, 2 ms, 2.00× as fast as dense on onnxruntime:float32; "
        "top-1 79.30 %, dense 80.00 %"
    ]
    assert report(*rows, loss=0.03).recommended(1) is rows[3]
    assert report(*rows, loss=0.0).recommended(1) is rows[1]
    unknown = [replace(timed, top1=None) for timed in rows]
    assert "without --data" in next(report(*unknown).recommendations())


def test_measure__zeros_that_give_nothing_are_told() -> None:
    slow, fast = (
        row("pruned", choice, time, batch, sparsity=0.9)
        for choice, time, batch in ((ORT, 3.9, 1), (Choice("csr", "float32"), 2.0, 1))
    )
    rows = [row("dense", TORCH, 5), row("dense", ORT, 4), row("pruned", TORCH, 5, sparsity=0.9), slow, fast]
    words = "\n".join(report(*rows).notes())
    assert (
        "zeros of pruned give nothing on onnxruntime:float32: 1.03× at batch 1 as fast as dense there"
        in words
    )
    assert "zeros of pruned give nothing on torch:float32: 1.00×" in words
    assert "zeros of pruned on csr:float32: 2.50× at batch 1 as fast as it on torch:float32" in words
    # a model with fewer channels is not only sparse
    words = "\n".join(report(*rows, same_size=frozenset({"dense"})).notes())
    assert "on onnxruntime:float32: " not in words.partition("zeros of")[2]
    more = [*rows, row("pruned", Choice("csr", "float32"), 9, 64, sparsity=0.9), row("pruned", TORCH, 8, 64)]
    assert "nothing at batch 64" in "\n".join(report(*more).notes())
    # of our own engine, over whichever runs the same model densely in the shortest time
    own = row("pruned", Choice("sparse", "float32"), 1.3, sparsity=0.9)
    words = "\n".join(report(*rows, own).notes())
    assert "zeros of pruned on sparse:float32: 3.00× at batch 1 as fast as it on onnxruntime:float32" in words


def test_measure__a_gain_is_larger_than_the_noise() -> None:
    quiet, noisy = row("a", ORT, 2.0), replace(row("a", ORT, 2.0), seconds=(0.001, 0.002, 0.006))
    assert gain(quiet, row("b", ORT, 2.2))
    assert not gain(quiet, row("b", ORT, 2.05))
    assert not gain(noisy, row("b", ORT, 2.2))


def test_measure__times_are_readable() -> None:
    assert [milliseconds(seconds) for seconds in (0.00012345, 0.0123456, 0.1234, 12.345)] == [
        "0.123",
        "12.3",
        "123",
        "12,345",
    ]


def test_measure__a_busy_machine_is_told() -> None:
    benchmark = report(row("dense", TORCH, 5))
    assert "busy" not in text_of(benchmark)
    assert "busy" in text_of(replace(benchmark, machine={**benchmark.machine, "load": 3.0}))


def test_measure__the_picture_shows_the_front() -> None:
    rows = [
        row("dense", TORCH, 5.0, top1=0.8),
        row("pruned", ORT, 2.0, top1=0.79),
        row("pruned", TORCH, 6.0, top1=0.79),
        row("dense", TORCH, 50.0, 64, top1=0.8),
    ]
    image = accuracy_over_latency(report(*rows))
    assert image[:4] == b"\x89PNG"


def test_measure__the_machine_has_no_name() -> None:
    machine = describe_machine()
    assert machine["cores"] == os.cpu_count()
    assert machine["memory"] > 2**28
    assert machine["processor"]
    assert os.uname().nodename not in json.dumps(machine)
