"""The report of a benchmark as a table, lines and JSON, with the model and engine that it recommends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from orchestration.benchmark.measure import Row
from trainers.config.engines import Choice
from trainers.engines.registry import Placement

FORMAT = "espalier-benchmark-1"
GAIN = 1.05
"""Minimum speed-up to count as faster; the quartiles must not overlap either."""
_FLOAT32 = tuple(Choice(engine, "float32") for engine in ("torch", "compile", "onnxruntime", "openvino"))
_OVER = {"csr": _FLOAT32[:1], "sparse": _FLOAT32, "2:4": (Choice("compile", "bfloat16"),)}
"""Engines for sparse models, each with the dense engines that it is compared with; the fastest of these
counts."""


@dataclass(frozen=True)
class Report:
    """The rows of a benchmark; all models are compared with the first one.

    Attributes:
        rows: a row for each model, engine and batch size.
        hardware: threads and device.
        rounds: number of times that each row was timed.
        loss: share of the first model's accuracy that a recommended one may lose.
        images: table of the labelled images for accuracy, if there was one.
        same_size: models with as many parameters as the first: they differ from it only by zeros.
        machine: description of the machine.
        load_after: its load at the end, as ``machine`` has that at the start.
    """

    rows: Sequence[Row]
    hardware: Placement
    rounds: int
    loss: float
    images: str | None
    same_size: frozenset[str]
    machine: dict[str, Any]
    load_after: float

    @property
    def first(self) -> str:
        return self.rows[0].model

    @property
    def batches(self) -> list[int]:
        return sorted({row.batch for row in self.rows})

    @property
    def right(self) -> bool:
        """Return whether all engines gave the model's answers, and none failed."""
        return not any(row.wrong or row.note.startswith("fails") for row in self.rows)

    def row(self, model: str, choice: Choice, batch: int) -> Row | None:
        """The row of a model on an engine at a batch size, if it was timed.

        Args:
            model: its name.
            choice: the engine and data type.
            batch: images at once.

        Returns:
            The row, or ``None``.
        """
        wanted = (model, choice, batch)
        return next((r for r in self.rows if (r.model, r.choice, r.batch) == wanted and r.timed), None)

    def best_dense(self, batch: int) -> Row | None:
        """The first model on its fastest engine in float32: the base of all speed-ups."""
        timed = [r for r in self.rows if r.model == self.first and r.batch == batch and r.timed]
        plain = [row for row in timed if row.choice.kind == "float32"]
        return min(plain or timed, key=lambda row: row.latency, default=None)

    def table(self) -> Table:
        """A row for each model, engine and batch size, the fastest of each batch size marked."""
        heading = f"{self._threads()}, median of {self.rounds} rounds in turns (quartiles)"
        table = Table(title=heading, title_justify="left")
        table.add_column("model", overflow="fold")
        table.add_column("engine", no_wrap=True)
        for name in ("batch", "ms", "quartiles", "images/s", f"× {self.first}", "memory", "disk", "top-1"):
            table.add_column(name, justify="right", no_wrap=True)
        fastest = {
            batch: min(self._timed(batch), key=lambda r: r.latency, default=None) for batch in self.batches
        }
        for row in self.rows:
            style = "bold" if row is fastest[row.batch] else None
            table.add_row(*self._cells(row), style=style)
        return table

    def notes(self) -> Iterator[str]:
        """Lines below the table: reasons for missing times, and the speed-up by zeros on each engine."""
        yield (
            f"× {self.first}: over {self.first} on its fastest engine in float32, at the same batch size; "
            f"memory: of a process with the engine and this model alone"
        )
        noted = set()
        for row in self.rows:
            key = (row.model, row.choice, row.note)
            if row.note and key not in noted:
                noted.add(key)
                yield f"{row.model} on {row.choice}: {row.note}"
        yield from self._zeros()
        if self.machine["load"] > 0.5 * (self.machine["cores"] or 1):
            yield (
                f"this machine was busy with other things (load {self.machine['load']:g} before, "
                f"{self.load_after:g} after): ratios count for more than times"
            )

    def recommendations(self) -> Iterator[str]:
        """For each batch size the fastest model and engine among those that lose little enough accuracy."""
        for batch in self.batches:
            best, dense = self.recommended(batch), self.best_dense(batch)
            if best is None:
                yield f"batch {batch}: nothing to recommend"
                continue
            text = f"batch {batch}: {best.model} on {best.choice}, {milliseconds(best.latency)} ms"
            if dense is not None and dense is not best:
                text += f", {dense.latency / best.latency:.2f}× as fast as {self.first} on {dense.choice}"
            if best.top1 is None:
                text += " (the fastest; without --data nothing is known of its accuracy)"
            else:
                text += f"; top-1 {100 * best.top1:.2f} %"
                if best.model != self.first and self._dense_top1() is not None:
                    text += f", {self.first} {100 * (self._dense_top1() or 0):.2f} %"
            yield text

    def recommended(self, batch: int) -> Row | None:
        """The fastest row whose top-1 is at most :attr:`loss` below the first model's."""
        dense = self._dense_top1()
        candidates = self._timed(batch)
        if dense is not None:
            least = dense * (1 - self.loss)
            candidates = [row for row in candidates if row.top1 is not None and row.top1 >= least]
        return min(candidates, key=lambda row: row.latency, default=None)

    def as_json(self) -> dict[str, Any]:
        """The whole report, without any path of this machine."""
        return {
            "format": FORMAT,
            "machine": self.machine | {"load_after": self.load_after},
            "threads": self.hardware.threads,
            "device": self.hardware.device,
            "rounds": self.rounds,
            "first": self.first,
            "loss": self.loss,
            "images": self.images,
            "rows": [_as_dict(row) for row in self.rows],
            "words": list(self.notes()),
            "recommended": {
                str(batch): None if best is None else {"model": best.model, "engine": str(best.choice)}
                for batch in self.batches
                for best in [self.recommended(batch)]
            },
        }

    def _timed(self, batch: int) -> list[Row]:
        return [row for row in self.rows if row.batch == batch and row.timed]

    def _dense_top1(self) -> float | None:
        of_first = [row for row in self.rows if row.model == self.first and row.top1 is not None]
        plain = [row for row in of_first if row.choice.kind == "float32"]
        return (plain or of_first)[0].top1 if of_first else None

    def _threads(self) -> str:
        if self.hardware.device != "cpu":
            return self.hardware.device
        count = self.hardware.threads
        return f"{count} thread{'s' * (count > 1)} on {count} processor{'s' * (count > 1)}"

    def _cells(self, row: Row) -> list[str]:
        name = f"{row.model} ({100 * row.sparsity:.0f} % zeros)" if row.sparsity else row.model
        head = [name, str(row.choice), str(row.batch)]
        if not row.timed:
            return [*head, "–", "wrong" if row.wrong else "–", *["–"] * 5]
        low, high = row.spread
        dense = self.best_dense(row.batch)
        return [
            *head,
            milliseconds(row.latency),
            f"{milliseconds(low)} … {milliseconds(high)}",
            f"{row.throughput:,.0f}",
            "–" if dense is None else f"{dense.latency / row.latency:.2f}",
            "–" if row.memory is None else f"{row.memory / 1e6:.0f} MB",
            "–" if row.disk is None else f"{row.disk / 1e6:.2f} MB",
            "–" if row.top1 is None else f"{100 * row.top1:.2f} %",
        ]

    def _zeros(self) -> Iterator[str]:
        """Lines about the measured speed-up by the zeros of each sparse model on each engine."""
        for model, choice in dict.fromkeys((r.model, r.choice) for r in self.rows if r.timed and r.sparsity):
            others = _OVER.get(choice.engine)
            if others is None and (model == self.first or model not in self.same_size):
                continue
            gains, dense_by_batch = [], {}
            for batch in self.batches:
                row = self.row(model, choice, batch)
                dense = (
                    self.row(self.first, choice, batch)
                    if others is None
                    else self._fastest(model, others, batch)
                )
                if row is not None and dense is not None:
                    gains.append((batch, gain(row, dense), dense.latency / row.latency))
                    dense_by_batch[batch] = dense.choice
            if not gains:
                continue
            named = " and ".join(dict.fromkeys(map(str, dense_by_batch.values())))
            over = f"{self.first} there" if others is None else f"it on {named}"
            shares = ", ".join(f"{ratio:.2f}× at batch {batch}" for batch, _, ratio in gains)
            if not any(faster for _, faster, _ in gains):
                yield f"zeros of {model} give nothing on {choice}: {shares} as fast as {over}"
            else:
                where = [str(batch) for batch, faster, _ in gains if not faster]
                but = f"; nothing at batch {' and '.join(where)}" if where else ""
                yield f"zeros of {model} on {choice}: {shares} as fast as {over}{but}"

    def _fastest(self, model: str, choices: Sequence[Choice], batch: int) -> Row | None:
        """The fastest timed row of a model on one of some engines."""
        rows = [row for choice in choices if (row := self.row(model, choice, batch)) is not None]
        return min(rows, key=lambda row: row.latency, default=None)


def gain(row: Row, over: Row) -> bool:
    """Return whether ``row`` is faster than ``over`` by more than the measurement varies."""
    return over.latency >= GAIN * row.latency and row.spread[1] < over.spread[0]


def milliseconds(seconds: float) -> str:
    """A time with three digits, or with all those before the point."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _as_dict(row: Row) -> dict[str, Any]:
    low, high = row.spread if row.timed else (None, None)
    return {
        "model": row.model,
        "engine": row.choice.engine,
        "type": row.choice.kind,
        "batch": row.batch,
        "sparsity": row.sparsity,
        "seconds": row.latency if row.timed else None,
        "quartiles": [low, high],
        "rounds": list(row.seconds),
        "images_per_second": row.throughput if row.timed else None,
        "memory": row.memory,
        "disk": row.disk,
        "top1": row.top1,
        "difference": None if row.agreement is None else _finite(row.agreement.as_dict()),
        "note": row.note,
    }


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """Values with ``None`` for infinity, which JSON does not have."""
    return {key: value if abs(value) < float("inf") else None for key, value in values.items()}
