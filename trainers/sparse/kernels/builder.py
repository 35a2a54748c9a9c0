"""Functions of LLVM IR, written as short Python programs.

A kernel is a Python function that calls a :class:`Code`; each call appends a line of LLVM's text form.
Variables that change (sums, counters) are stack slots, which LLVM's first pass turns into registers, so
that no phi node has to be written by hand::

    code = Code("twice", lanes=16)
    pointer, count = code.parameters("ptr", "i64")
    with code.loop(count) as i:
        place = code.at(pointer, i * code.vector_bytes)
        code.store(code.load("vector", place) * code.splat(2.0), place)
    text = code.finish()
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

ATTRIBUTES = 'nounwind "min-legal-vector-width"="512" "prefer-vector-width"="512"'


@dataclass(frozen=True)
class Value:
    """A typed value of the function under construction; ``+``, ``-`` and ``*`` append an instruction."""

    code: Code
    type: str
    text: str

    def _binary(self, other: Value | int | float, whole: str, real: str) -> Value:
        right = other if isinstance(other, Value) else self.code.like(self, other)
        name = real if "float" in self.type else whole
        return self.code.value(self.type, f"{name} {self.type} {self.text}, {right.text}")

    def __add__(self, other: Value | int | float) -> Value:
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Value | int | float) -> Value:
        return self._binary(other, "sub", "fsub")

    def __mul__(self, other: Value | int | float) -> Value:
        return self._binary(other, "mul", "fmul")

    def __truediv__(self, other: Value | int | float) -> Value:
        return self._binary(other, "udiv", "fdiv")


@dataclass(frozen=True)
class Variable:
    """A slot whose value changes while the function runs."""

    code: Code
    type: str
    slot: str

    def get(self) -> Value:
        return self.code.value(self.type, f"load {self.type}, ptr {self.slot}")

    def set(self, value: Value) -> None:
        self.code.line(f"store {value.type} {value.text}, ptr {self.slot}")


class Code:
    """The lines of one function that returns nothing.

    Args:
        name: the function's name in its module.
        lanes: numbers in a vector; ``"vector"`` as a type means so many float32.
    """

    def __init__(self, name: str, lanes: int) -> None:
        self.name, self.lanes = name, lanes
        self.vector = f"<{lanes} x float>"
        self.integers = f"<{lanes} x i32>"
        self.vector_bytes = 4 * lanes
        self.declared: set[str] = set()
        self._head: list[str] = []
        self._lines: list[str] = []
        self._slots: list[str] = []
        self._count = 0

    # values
    def parameters(self, *types: str) -> list[Value]:
        """Declare the function's parameters; called once, first."""
        self._head = [f"{kind} %p{i}" for i, kind in enumerate(types)]
        return [Value(self, kind, f"%p{i}") for i, kind in enumerate(types)]

    def value(self, kind: str, instruction: str) -> Value:
        self._count += 1
        name = f"%v{self._count}"
        self._lines.append(f"  {name} = {instruction}")
        return Value(self, kind, name)

    def line(self, instruction: str) -> None:
        self._lines.append(f"  {instruction}")

    def whole(self, number: int, kind: str = "i64") -> Value:
        return Value(self, kind, str(number))

    def real(self, number: float) -> Value:
        return Value(self, "float", _hexadecimal(number))

    def like(self, value: Value, number: float) -> Value:
        """A constant of a value's type, in every lane where it is a vector."""
        item = str(int(number)) if "float" not in value.type else _hexadecimal(number)
        if not value.type.startswith("<"):
            return Value(self, value.type, item)
        element = value.type.split(" x ")[1].rstrip(">")
        return Value(self, value.type, f"splat ({element} {item})")

    def splat(self, number: float | Value) -> Value:
        """A vector with one number in all lanes."""
        if not isinstance(number, Value):
            return Value(self, self.vector, f"splat (float {_hexadecimal(number)})")
        width = self.vector if number.type == "float" else self.integers
        first = self.value(width, f"insertelement {width} poison, {number.type} {number.text}, i64 0")
        order = f"<{self.lanes} x i32> zeroinitializer"
        return self.value(width, f"shufflevector {width} {first.text}, {width} poison, {order}")

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """Transpose a square of numbers, as many vectors as each has lanes.

        Pairs of rows exchange halves, then quarters, and so on.
        """
        values, distance = list(rows), self.lanes // 2
        while distance:
            for first in range(self.lanes):
                if first & distance:
                    continue
                pair = values[first], values[first + distance]
                for number, shift in ((0, 0), (1, distance)):
                    # lane i of both: from the first row below the distance, from the second above it
                    order = [
                        (i ^ distance) + self.lanes + shift if i & distance else i + shift
                        for i in range(self.lanes)
                    ]
                    values[first + number * distance] = self._shuffled(*pair, order)
            distance //= 2
        return values

    def _shuffled(self, left: Value, right: Value, order: Sequence[int]) -> Value:
        """Lanes of two vectors, numbered through."""
        mask = ", ".join(f"i32 {number}" for number in order)
        kind = left.type
        return self.value(
            kind, f"shufflevector {kind} {left.text}, {kind} {right.text}, <{self.lanes} x i32> <{mask}>"
        )

    # memory
    def at(self, pointer: Value, offset: Value | int) -> Value:
        """The address ``offset`` bytes further on."""
        by = offset.text if isinstance(offset, Value) else str(offset)
        return self.value("ptr", f"getelementptr i8, ptr {pointer.text}, i64 {by}")

    def load(self, kind: str, pointer: Value, offset: Value | int = 0, align: int = 0) -> Value:
        """Load a value of a type from memory; by default vectors are aligned to their size."""
        where = self.at(pointer, offset) if isinstance(offset, Value) or offset else pointer
        kind, align = self._placed(kind, align)
        return self.value(kind, f"load {kind}, ptr {where.text}, align {align}")

    def store(self, value: Value, pointer: Value, offset: Value | int = 0, align: int = 0) -> None:
        where = self.at(pointer, offset) if isinstance(offset, Value) or offset else pointer
        kind, align = self._placed(value.type, align)
        self.line(f"store {kind} {value.text}, ptr {where.text}, align {align}")

    def prefetch(self, pointer: Value, offset: Value | int = 0, *, write: bool = False) -> None:
        """Give a hint that the line of memory at an address is soon read, or written."""
        where = self.at(pointer, offset)
        self.declared.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        hints = [self.whole(int(write), "i32"), self.whole(3, "i32"), self.whole(1, "i32")]
        self.invoke("@llvm.prefetch.p0", [where, *hints])

    def lane_numbers(self, first: int = 0) -> Value:
        """``first``, ``first`` + 1 … in the lanes."""
        numbers = ", ".join(f"i32 {first + lane}" for lane in range(self.lanes))
        return Value(self, self.integers, f"<{numbers}>")

    def scatter(self, value: Value, pointer: Value, offsets: Value, mask: Value) -> None:
        """Store each lane whose mask is set at ``pointer`` + its offset (bytes)."""
        kind = f"<{self.lanes} x ptr>"
        at = self.value(kind, f"getelementptr i8, ptr {pointer.text}, {offsets.type} {offsets.text}")
        name = f"@llvm.masked.scatter.v{self.lanes}f32.v{self.lanes}p0"
        self.declared.add(f"declare void {name}({value.type}, {kind}, i32, {mask.type})")
        self.invoke(name, [value, at, self.whole(4, "i32"), mask])

    def gathered(self, pointer: Value, offsets: Value, mask: Value) -> Value:
        """Load float32 numbers from ``pointer`` + each of ``offsets`` (bytes); 0 where no mask is set."""
        kind = f"<{self.lanes} x ptr>"
        at = self.value(kind, f"getelementptr i8, ptr {pointer.text}, {offsets.type} {offsets.text}")
        zero = Value(self, self.vector, "zeroinitializer")
        values = [at, self.whole(4, "i32"), mask, zero]
        return self.call(self.vector, f"llvm.masked.gather.v{self.lanes}f32.v{self.lanes}p0", *values)

    def first_lanes(self, count: Value, first: int = 0) -> Value:
        """A mask of the lanes whose number, counted from ``first``, is below ``count``."""
        return self.compare("slt", self.lane_numbers(first), self.splat(self.convert("trunc", count, "i32")))

    def store_masked(self, value: Value, pointer: Value, mask: Value) -> None:
        """Store the lanes whose mask is set, at any address."""
        name = f"@llvm.masked.store.v{self.lanes}f32.p0"
        self.declared.add(f"declare void {name}({value.type}, ptr, i32, {mask.type})")
        self.invoke(name, [value, pointer, self.whole(4, "i32"), mask])

    def _placed(self, kind: str, align: int) -> tuple[str, int]:
        kind = {"vector": self.vector, "integers": self.integers}.get(kind, kind)
        sizes = {self.vector: self.vector_bytes, self.integers: self.vector_bytes}
        plain = {"float": 4, "i32": 4, "i64": 8, "ptr": 8, "i16": 2, "i8": 1}
        return kind, align or sizes.get(kind) or plain[kind]

    def variable(self, start: Value) -> Variable:
        """Make a variable with its first value."""
        self._count += 1
        slot = f"%s{self._count}"
        self._slots.append(f"  {slot} = alloca {start.type}")
        made = Variable(self, start.type, slot)
        made.set(start)
        return made

    # arithmetic
    def call(self, kind: str, name: str, *values: Value) -> Value:
        """Call an intrinsic, or a function declared elsewhere in the module, that returns a value."""
        types = ", ".join(value.type for value in values)
        self.declared.add(f"declare {kind} @{name}({types})")
        return self.value(kind, f"call {kind} @{name}({', '.join(f'{v.type} {v.text}' for v in values)})")

    def _intrinsic(self, name: str, *values: Value) -> Value:
        kind = values[0].type
        suffix = f"v{self.lanes}f32" if kind.startswith("<") else "f32"
        return self.call(kind, f"llvm.{name}.{suffix}", *values)

    def fma(self, left: Value, right: Value, total: Value) -> Value:
        """Compute ``left · right + total``, in one instruction if the processor has it."""
        return self._intrinsic("fmuladd", left, right, total)

    def sqrt(self, value: Value) -> Value:
        return self._intrinsic("sqrt", value)

    def nearest(self, value: Value) -> Value:
        """Round to the nearest whole number, as a float."""
        return self._intrinsic("rint", value)

    def larger(self, left: Value, right: Value) -> Value:
        """The larger of two; ``right`` where one is NaN."""
        return self.select(self.compare("ogt", left, right), left, right)

    def compare(self, how: str, left: Value, right: Value) -> Value:
        name = "fcmp" if "float" in left.type else "icmp"
        kind = f"<{self.lanes} x i1>" if left.type.startswith("<") else "i1"
        return self.value(kind, f"{name} {how} {left.type} {left.text}, {right.text}")

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        kind = yes.type
        return self.value(
            kind, f"select {condition.type} {condition.text}, {kind} {yes.text}, {kind} {no.text}"
        )

    def convert(self, how: str, value: Value, kind: str) -> Value:
        """Convert a value by an instruction of LLVM: ``zext``, ``fptosi``, ``bitcast``, ``inttoptr`` …"""
        kind = {"vector": self.vector, "integers": self.integers}.get(kind, kind)
        return self.value(kind, f"{how} {value.type} {value.text} to {kind}")

    def shift_left(self, value: Value, bits: int) -> Value:
        return self.value(value.type, f"shl {value.type} {value.text}, {self.like(value, bits).text}")

    # control
    def _label(self) -> str:
        self._count += 1
        return f"l{self._count}"

    @contextmanager
    def loop(self, count: Value | int, start: Value | int = 0, step: int = 1) -> Iterator[Value]:
        """Run the lines inside for ``start``, ``start + step`` … below ``count``."""
        end = count if isinstance(count, Value) else self.whole(count)
        counter = self.variable(start if isinstance(start, Value) else self.whole(start))
        test, body, after = self._label(), self._label(), self._label()
        self.line(f"br label %{test}")
        self._lines.append(f"{test}:")
        index = counter.get()
        inside = self.compare("slt", index, end)
        self.line(f"br i1 {inside.text}, label %{body}, label %{after}")
        self._lines.append(f"{body}:")
        yield index
        counter.set(index + step)
        self.line(f"br label %{test}")
        self._lines.append(f"{after}:")

    @contextmanager
    def repeat_while(self) -> Iterator[list[Value]]:
        """Repeat the lines inside while the condition (i1) that they append to the list holds."""
        body, after = self._label(), self._label()
        self.line(f"br label %{body}")
        self._lines.append(f"{body}:")
        condition: list[Value] = []
        yield condition
        self.line(f"br i1 {condition[-1].text}, label %{body}, label %{after}")
        self._lines.append(f"{after}:")

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run the lines inside if the condition holds."""
        body, after = self._label(), self._label()
        self.line(f"br i1 {condition.text}, label %{body}, label %{after}")
        self._lines.append(f"{body}:")
        yield
        self.line(f"br label %{after}")
        self._lines.append(f"{after}:")

    def invoke(self, target: str, values: Sequence[Value]) -> None:
        """Call a function of this module (``@name``) or at an address (a value's text)."""
        self.line(f"call void {target}({', '.join(f'{v.type} {v.text}' for v in values)})")

    def finish(self) -> str:
        """The whole function as text."""
        body = "\n".join([*self._slots, *self._lines, "  ret void"])
        return f"define void @{self.name}({', '.join(self._head)}) {ATTRIBUTES} {{\n{body}\n}}\n"


def _hexadecimal(number: float) -> str:
    """A float32 as LLVM writes it: the bits of the same number as a float64."""
    rounded = struct.unpack("<f", struct.pack("<f", number))[0]
    return "0x" + struct.pack(">d", rounded).hex().upper()
