"""A whole program of kernels in one call: stages, one after the other, whose tiles threads share.

A stage is a list of operations and a list of tiles. A thread takes the next tile, runs all operations of
the stage on it, and takes another; when none is left it waits until the others have finished theirs.
"""

from __future__ import annotations

import platform

from trainers.sparse.kernels.builder import Code, Value

# a stage: int64 numbers; the last two change as it runs and are zero before
OPERATIONS, COUNT, ITEMS, TILES, NEXT, DONE = range(6)
STAGE = 6
WIDTHS = 8  # tiles have 1 to so many vectors
OPERATION = 2 * WIDTHS  # for each width the addresses of a kernel and of its arguments
ITEM = 2  # first vector, width
PATIENCE = 2000  # turns of waiting before the system may give the processor to another


def driver(name: str, lanes: int) -> Code:
    """``driver(stages, count, scratch)``, called by each thread with its own scratch."""
    code = Code(name, lanes)
    stages, count, scratch = code.parameters("ptr", "i64", "i64")

    def add(pointer: Value, order: str) -> Value:
        return code.value("i64", f"atomicrmw add ptr {pointer.text}, i64 1 {order}")

    def run(stage: Value, number: Value) -> None:
        item = code.at(code.load("ptr", stage, 8 * ITEMS), number * (8 * ITEM))
        vector, width = code.load("i64", item), code.load("i64", item, 8)
        operations = code.load("ptr", stage, 8 * OPERATIONS)
        with code.loop(code.load("i64", stage, 8 * COUNT)) as index:
            entry = code.at(operations, index * (8 * OPERATION) + (width - 1) * 16)
            kernel, arguments = code.load("ptr", entry), code.load("ptr", entry, 8)
            code.invoke(kernel.text, [arguments, vector, scratch])

    with code.loop(count) as index:
        stage = code.at(stages, index * (8 * STAGE))
        tiles = code.load("i64", stage, 8 * TILES)
        following, done = code.at(stage, 8 * NEXT), code.at(stage, 8 * DONE)
        with code.repeat_while() as again:
            number = add(following, "monotonic")
            more = code.compare("slt", number, tiles)
            with code.when(more):
                run(stage, number)
                add(done, "release")
            again.append(more)
        turns = code.variable(code.whole(0))
        with code.repeat_while() as again:
            _pause(code)
            turns.set(code.value("i64", f"add i64 {turns.get().text}, 1"))
            if platform.system() != "Windows":
                with code.when(code.compare("sgt", turns.get(), code.whole(PATIENCE))):
                    code.call("i32", "sched_yield")
            finished = code.value("i64", f"load atomic i64, ptr {done.text} acquire, align 8")
            again.append(code.compare("slt", finished, tiles))
    return code


def _pause(code: Code) -> None:
    """A hint to the processor that this is a loop that waits."""
    if platform.machine().lower() in {"x86_64", "amd64"}:
        code.declared.add("declare void @llvm.x86.sse2.pause()")
        code.invoke("@llvm.x86.sse2.pause", [])
