"""The phases of a sweep, and which of them a command runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pruners.errors import InputError

Phase = Literal["dense", "structured", "allocation", "schedule", "long_run", "quantize", "export"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class PhaseRange:
    """The phases that a command runs; the phases before the first must have their results already.

    Raises:
        InputError: the last comes before the first.
    """

    first: Phase = PHASES[0]
    last: Phase = PHASES[-1]

    def __post_init__(self) -> None:
        if PHASES.index(self.last) < PHASES.index(self.first):
            raise InputError("last", self.last, f"comes before first = {self.first}")

    def reaches(self, phase: Phase) -> bool:
        """Return whether a phase is in the range, or before it."""
        return PHASES.index(phase) <= PHASES.index(self.last)

    def starts_after(self, phase: Phase) -> bool:
        """Return whether a phase is before the range."""
        return PHASES.index(phase) < PHASES.index(self.first)

    @property
    def options(self) -> list[str]:
        """The range as options of the command line, ``["--from", "schedule"]``."""
        first = [] if self.first == PHASES[0] else ["--from", self.first]
        return first + ([] if self.last == PHASES[-1] else ["--until", self.last])


ALL_PHASES = PhaseRange()
