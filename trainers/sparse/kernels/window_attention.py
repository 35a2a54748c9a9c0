"""Attention within a window, of one head, with a bias for each pair of tokens.

The window's queries, keys and values are copied from the tiles in which they lie, run by run
(:mod:`trainers.sparse.windows`), into the thread's scratch; there they are rows of the window's tokens, and
the products are those of :mod:`~trainers.sparse.kernels.attention`.
"""

from __future__ import annotations

from pruners.arithmetic import ceil_div
from trainers.sparse.kernels.builder import Code, Value, Variable
from trainers.sparse.kernels.tile import SIGNATURE
from trainers.sparse.kernels.vector_math import exponential
from trainers.sparse.layout import tile_widths
from trainers.sparse.windows import COUNT, LANE, ROW, RUN, SOURCE, TARGET

# RUNS and FIRST (the first run of each window, and their end) are windows.runs's tables; MASKS has the
# address of each window's mask; WORK are bytes in the scratch
(RUNS, FIRST, BIAS, MASKS, HEADS, HEAD_SIZE, FEATURES, SCALE, WORK) = range(9)


def work_floats(area: int, size: int, lanes: int) -> int:
    """Number of floats of scratch that a window takes: queries, keys, values, scores.

    Args:
        area: tokens in a window.
        size: features of a head.
        lanes: float32 numbers in a vector.
    """
    row = (ceil_div(area, lanes) + 1) * lanes
    return (3 * size + area) * row


def window_attention(name: str, lanes: int, area: int, *, masked: bool) -> Code:
    """Write the kernel ``softmax(scale · Qᵀ K + bias (+ mask)) V`` of one head of one window.

    Args:
        name: of the function, which takes an item: head ``item % heads`` of window ``item / heads``.
        lanes: float32 numbers in a vector.
        area: tokens in a window.
        masked: whether there are masks.

    Returns:
        The kernel.
    """
    return _Writer(name, lanes, area, masked).write()


class _Writer:
    """Writes the kernel part by part."""

    def __init__(self, name: str, lanes: int, area: int, masked: bool) -> None:
        self.code = code = Code(name, lanes)
        self.area, self.masked = area, masked
        self.arguments, item, scratch = code.parameters(*SIGNATURE)
        self.heads, self.size = self._number(HEADS), self._number(HEAD_SIZE)
        self.window = item / self.heads
        self.head = item - self.window * self.heads
        self.work = code.convert("inttoptr", self._number(WORK) + scratch, "ptr")
        self.padded = ceil_div(area, lanes) * code.vector_bytes  # bytes of a row of scores, bias, mask
        self.row = self.padded + code.vector_bytes  # bytes of a row of queries, keys or values; runs overrun
        self.features = self._number(FEATURES)

    def _number(self, argument: int) -> Value:
        return self.code.load("i64", self.arguments, 8 * argument)

    def _pointer(self, argument: int) -> Value:
        return self.code.load("ptr", self.arguments, 8 * argument)

    def _part(self, number: int) -> Value:
        """Address of a part of the scratch: queries (0), keys (1), values (2) or scores (3)."""
        return self.code.at(self.work, self.size * (self.row * number))

    def write(self) -> Code:
        code = self.code
        self._collect()
        start = 0
        for width in _widths(self.area, code.lanes):
            self._queries(start, width)
            start += width * code.vector_bytes
        self._hand_out()
        return code

    def _runs(self) -> tuple[Value, Value]:
        """The window's runs: address of the first one, and their number."""
        first = self.code.at(self._pointer(FIRST), self.window * 8)
        begin, end = self.code.load("i64", first), self.code.load("i64", first, 8)
        return self.code.at(self._pointer(RUNS), begin * (8 * RUN)), end - begin

    def _collect(self) -> None:
        code = self.code
        table, count = self._runs()
        scale = code.splat(code.load("float", self.arguments, 8 * SCALE))
        with code.loop(count) as number:
            run = code.at(table, number * (8 * RUN))
            source, row, lane = (code.load(kind, run, 8 * i) for kind, i in _ENTRIES)
            for part in range(3):
                first = self.features * part + self.head * self.size
                reading = code.variable(code.at(source, first * row))
                writing = code.variable(code.at(self._part(part), lane))
                with code.loop(self.size):
                    value = code.load("vector", reading.get(), align=4)
                    code.store(value if part else value * scale, writing.get(), align=4)
                    reading.set(code.at(reading.get(), row))
                    writing.set(code.at(writing.get(), self.row))

    def _hand_out(self) -> None:
        """Copy the results, which have replaced the queries, to their tiles."""
        code = self.code
        table, count = self._runs()
        with code.loop(count) as number:
            run = code.at(table, number * (8 * RUN))
            row, lane = code.load("i64", run, 8 * ROW), code.load("i64", run, 8 * LANE)
            mask = code.first_lanes(code.load("i64", run, 8 * COUNT))
            target = code.load("ptr", run, 8 * TARGET)
            writing = code.variable(code.at(target, self.head * self.size * row))
            reading = code.variable(code.at(self._part(0), lane))
            with code.loop(self.size):
                code.store_masked(code.load("vector", reading.get(), align=4), writing.get(), mask)
                writing.set(code.at(writing.get(), row))
                reading.set(code.at(reading.get(), self.row))

    def _queries(self, start: int, width: int) -> None:
        """Compute scores and results for ``width`` vectors of queries, from byte ``start`` of a row on."""
        code = self.code
        rows = 4 if width >= 4 else 8
        offsets = [start + v * code.vector_bytes for v in range(width)]
        scores = self._part(3)
        best = [code.variable(code.splat(-3.0e38)) for _ in offsets]
        whole = self.area // rows * rows
        with code.loop(whole, step=rows) as key:
            self._scores(scores, key, rows, offsets, best)
        if self.area > whole:
            self._scores(scores, code.whole(whole), self.area - whole, offsets, best)
        totals = [code.variable(code.splat(0.0)) for _ in offsets]
        most = [each.get() for each in best]
        with code.loop(self.area) as key:
            row = code.at(scores, key * self.padded)
            for offset, largest, total in zip(offsets, most, totals, strict=True):
                value = exponential(code, code.load("vector", row, offset) - largest)
                total.set(total.get() + value)
                code.store(value, row, offset)
        shares = [code.splat(1.0) / total.get() for total in totals]
        by_rows = self.size / rows * rows
        with code.loop(by_rows, step=rows) as d:
            self._mix(scores, d, rows, offsets, shares)
        with code.loop(self.size, start=by_rows) as d:
            self._mix(scores, d, 1, offsets, shares)

    def _scores(
        self, scores: Value, key: Value, count: int, offsets: list[int], best: list[Variable]
    ) -> None:
        code = self.code
        sums = [[code.variable(code.splat(0.0)) for _ in offsets] for _ in range(count)]
        query = code.variable(self._part(0))
        keys = code.variable(code.at(self._part(1), key * 4))
        with code.loop(self.size):
            loaded = [code.load("vector", query.get(), offset) for offset in offsets]
            for r in range(count):
                factor = code.splat(code.load("float", keys.get(), 4 * r))
                for total, value in zip(sums[r], loaded, strict=True):
                    total.set(code.fma(factor, value, total.get()))
            query.set(code.at(query.get(), self.row))
            keys.set(code.at(keys.get(), self.row))
        bias = code.at(self._pointer(BIAS), (self.head * self.area + key) * self.padded)
        added = [bias]
        if self.masked:
            mask = code.load("ptr", self._pointer(MASKS), self.window * 8)
            added.append(code.at(mask, key * self.padded))
        target = code.at(scores, key * self.padded)
        for r in range(count):
            for total, offset, most in zip(sums[r], offsets, best, strict=True):
                value = total.get()
                for table in added:
                    value = value + code.load("vector", table, r * self.padded + offset)
                most.set(code.larger(most.get(), value))
                code.store(value, target, r * self.padded + offset)

    def _mix(self, scores: Value, d: Value, count: int, offsets: list[int], shares: list[Value]) -> None:
        code = self.code
        sums = [[code.variable(code.splat(0.0)) for _ in offsets] for _ in range(count)]
        values = code.variable(code.at(self._part(2), d * self.row))
        probability = code.variable(scores)
        with code.loop(self.area):
            loaded = [code.load("vector", probability.get(), offset) for offset in offsets]
            for r in range(count):
                factor = code.splat(code.load("float", values.get(), r * self.row))
                for total, value in zip(sums[r], loaded, strict=True):
                    total.set(code.fma(factor, value, total.get()))
            values.set(code.at(values.get(), 4))
            probability.set(code.at(probability.get(), self.padded))
        target = code.at(self._part(0), d * self.row)
        for r in range(count):
            for total, share, offset in zip(sums[r], shares, offsets, strict=True):
                code.store(total.get() * share, target, r * self.row + offset)


_ENTRIES = (("ptr", SOURCE), ("i64", ROW), ("i64", LANE))


def _widths(area: int, lanes: int) -> list[int]:
    return tile_widths(ceil_div(area, lanes))
