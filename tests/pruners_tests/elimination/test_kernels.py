"""The compiled loops: inverses against LAPACK, and parts of the work on threads."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from helpers import quick, threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pruners.elimination import kernels
from pruners.elimination.fisher import invert


def sums_of(
    seed: int, blocks: int, size: int, half: int, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Σ g gᵀ of correlated gradients (n, B, B), whole and as the two parts that are kept of it."""
    random = torch.Generator().manual_seed(seed)
    gradients = torch.randn(blocks, 2 * size, size, generator=random, dtype=torch.float64)
    gradients += torch.randn(blocks, 2 * size, 1, generator=random, dtype=torch.float64)
    whole = (gradients.mT @ gradients).to(dtype)
    return whole.double(), (whole[:, :half].contiguous(), whole[:, half:, half:].contiguous())


def inverted(
    parts: tuple[Tensor, Tensor], slots: Tensor, alive: Tensor, scale: float, damp: float
) -> tuple[Tensor, Tensor]:
    blocks, left = slots.shape
    inverse = torch.full((blocks, left, left), torch.nan, dtype=torch.float64)
    sound = torch.zeros(blocks, dtype=torch.bool)
    arrays = [part.numpy() for part in parts], [one.numpy() for one in (slots, alive, inverse, sound)]
    kernels.inverse.invert(*arrays[0], scale, damp, *arrays[1])
    return inverse, sound


def by_lapack(whole: Tensor, slots: Tensor, alive: Tensor, scale: float, damp: float) -> Tensor:
    inverses = []
    for matrix, positions, living in zip(whole, slots, alive, strict=True):
        both = living.unsqueeze(0) & living.unsqueeze(1)
        chosen = torch.where(both, scale * matrix[positions][:, positions], 0.0)
        inverses.append(torch.linalg.inv(chosen + damp * torch.eye(len(positions), dtype=torch.float64)))
    return torch.stack(inverses)


def all_slots(blocks: int, size: int) -> tuple[Tensor, Tensor]:
    return torch.arange(size).repeat(blocks, 1), torch.ones(blocks, size, dtype=torch.bool)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 31, 63, 64, 65, 190, 192, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels__inverses_of_all_sizes(size: int, dtype: torch.dtype) -> None:
    whole, parts = sums_of(size, 2, size, size // 2 if size >= 64 else size, dtype)
    slots, alive = all_slots(2, size)
    inverses, sound = inverted(parts, slots, alive, 0.01, 1e-3)
    assert sound.all()
    expected = by_lapack(whole, slots, alive, 0.01, 1e-3)
    torch.testing.assert_close(inverses, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(inverses, inverses.mT)


@given(
    seed=st.integers(0, 999),
    size=st.integers(2, 40),
    half=st.floats(0, 1),
    chosen=st.floats(0, 1),
    dead=st.sampled_from([0.0, 0.3, 1.0]),
)
@quick(60)
def test_kernels__some_slots_some_of_them_dead(
    seed: int, size: int, half: float, chosen: float, dead: float
) -> None:
    whole, parts = sums_of(seed, 3, size, round(half * size), torch.float64)
    random = torch.Generator().manual_seed(seed)
    left = max(round(chosen * size), 1)
    slots = torch.stack([torch.randperm(size, generator=random)[:left].sort().values for _ in range(3)])
    alive = torch.rand(3, left, generator=random) >= dead
    inverses, sound = inverted(parts, slots, alive, 0.1, 0.02)
    assert sound.all()
    torch.testing.assert_close(inverses, by_lapack(whole, slots, alive, 0.1, 0.02), rtol=1e-9, atol=1e-9)
    for matrix, living in zip(inverses, alive, strict=True):  # the dead stand alone
        for slot in (~living).nonzero().reshape(-1).tolist():
            row = matrix[slot].clone()
            assert float(row[slot]) == pytest.approx(50)
            row[slot] = 0
            assert not row.any()


@pytest.mark.parametrize("size", [6, 64])
def test_kernels__what_is_not_positive_definite_is_said_of_its_block_alone(size: int) -> None:
    """As LAPACK says it: indefinite, a zero on the diagonal, NaN, infinite."""
    half = size // 2 if size >= 64 else size
    damp = 2.0**-40
    whole = sums_of(0, 7, size, half, torch.float64)[0]
    whole[1] -= 1e6 * torch.eye(size, dtype=torch.float64)
    whole[2, 3] = whole[2, :, 3] = 0.0
    whole[2, 3, 3] = -damp
    whole[3, 0, 1] = whole[3, 1, 0] = torch.nan
    whole[4, size - 1, size - 1] = torch.inf
    whole[5, 2, 2] = torch.nan
    parts = whole[:, :half].contiguous(), whole[:, half:, half:].contiguous()
    slots, alive = all_slots(7, size)
    expected = [True, False, False, False, False, False, True]
    inverses, sound = inverted(parts, slots, alive, 1.0, damp)
    assert sound.tolist() == expected
    inverse, sound = invert(whole + damp * torch.eye(size, dtype=torch.float64))
    assert sound.tolist() == expected
    for block in (0, 6):
        torch.testing.assert_close(inverses[block], torch.linalg.inv(whole[block]), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(inverse[block], inverses[block], rtol=1e-9, atol=1e-9)
    whole[2, 3, 3] = 0.0  # dead, and λ holds it
    parts = whole[:, :half].contiguous(), whole[:, half:, half:].contiguous()
    assert inverted(parts, slots, alive, 1.0, damp)[1].tolist()[2]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 17])
@pytest.mark.parametrize("at_once", [1, 2])
def test_kernels__every_part_is_worked_on_once(count: int, at_once: int) -> None:
    taken: list[int] = []
    names: set[str] = set()

    def work(part: slice) -> None:
        taken.extend(range(part.start, part.stop))
        names.add(threading.current_thread().name)

    with threads(at_once):
        kernels.threads.on_threads(work, count)
    assert sorted(taken) == list(range(count))
    if at_once == 2 and count > 1:
        assert all(name.startswith("espalier-kernel") for name in names)


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("bad", [0, 3])
def test_kernels__an_error_on_a_thread_is_passed_on_and_the_next_call_works(at_once: int, bad: int) -> None:
    def work(part: slice) -> None:
        if part.start <= bad < part.stop:
            raise ArithmeticError(f"boom at {bad}")

    with threads(at_once):
        with pytest.raises(ArithmeticError, match=f"boom at {bad}"):
            kernels.threads.on_threads(work, 4)
        test_kernels__every_part_is_worked_on_once(4, at_once)


FORKED = """
import os, sys, torch
from pruners.elimination import kernels

def counted():
    taken = []
    kernels.threads.on_threads(lambda part: taken.extend(range(part.start, part.stop)), 8)
    return sorted(taken) == list(range(8))

torch.set_num_threads(2)
assert counted()
child = os.fork()
if not child:
    os._exit(0 if counted() else 1)
_, status = os.waitpid(child, 0)
assert counted()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_kernels__threads_work_in_a_forked_process_and_in_its_parent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


@given(
    blocks=st.integers(1, 3),
    count=st.integers(1, 9),
    half=st.integers(kernels.sums.LEAST_HALF, 3 * kernels.sums.LEAST_HALF),
    more=st.integers(0, kernels.sums.LEAST_HALF),
)
@quick(40)
def test_kernels__sums_of_outer_products(blocks: int, count: int, half: int, more: int) -> None:
    """Added twice to what is there, in tiles that fit and that do not, and symmetric to the bit."""
    size = 2 * half + more
    random = torch.Generator().manual_seed(size)
    first = torch.full((blocks, half, size), torch.nan)
    last = torch.full((blocks, size - half, size - half), torch.nan)
    twice = [torch.randn(count, blocks + 1, size, generator=random) for _ in range(2)]
    for gradients in twice:  # of a block before them too
        fresh = gradients is twice[0]
        kernels.sums.accumulate(first.numpy(), last.numpy(), gradients.numpy(), 1, fresh)
        kernels.sums.complete(first.numpy(), last.numpy())
    rows = torch.cat(twice)[:, 1:].transpose(0, 1).double()
    whole = rows.mT @ rows
    torch.testing.assert_close(first.double(), whole[:, :half], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.double(), whole[:, half:, half:], rtol=1e-5, atol=1e-5)
    assert torch.equal(last, last.mT)
    assert torch.equal(first[:, :, :half], first[:, :, :half].mT)
