"""What others write is printed as it stands, and the display shows the best by whatever trials are scored."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as AnyConsole
from rich.table import Table

from orchestration.commands.progress import Bars
from orchestration.common.terminal import Console, output_console
from orchestration.recipe.reference import as_table, recipe_keys
from orchestration.reporting.display import Display, leading
from orchestration.state.trial_log import TrialRecord

ROOT = Path(__file__).parents[3]
ODD = "[bold]x[/bold] [/x] :key: shape [3, 224] \\[y]"


def trial(state: str = "finished", score: float | None = None, top1: float = 0.5, **more: Any) -> TrialRecord:
    return TrialRecord(0, {}, state, score, {"val_top1": top1}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("console", [Console, AnyConsole])
def test_terminal__a_line_that_stays_is_text(console: Any) -> None:
    sink = io.StringIO()
    display = Display(console(file=sink, width=200))
    display.phase("search", trials=2)
    display.trial_started("a", 0, {})
    display.trial_ended("a", trial("failed", error=f"ValueError: {ODD}"))
    display.finished(ODD)
    assert sink.getvalue().splitlines() == [
        "[1/0] search",
        f"      trial 0 failed: ValueError: {ODD}",
        f"      {ODD}",
    ]


def test_terminal__tables_their_titles_and_a_status_are_text() -> None:
    sink = io.StringIO()
    console = Console(file=sink, width=200)
    table = Table(ODD, title=ODD)
    table.add_row(ODD)
    console.print(table)
    console.print(ODD)
    with console.status(ODD) as status:
        console.print(status.renderable)
    assert sink.getvalue().count(ODD) == 5


def test_output_console__has_a_width_of_its_own_in_a_pipe() -> None:
    assert output_console(150).width == 150


def test_terminal__the_live_line_is_text() -> None:
    sink = io.StringIO()
    with Display(Console(file=sink, width=200, force_terminal=True)) as display:
        display.phase(f"lamp {ODD}", trials=2)
        display.trial_ended("a", trial("failed", error=ODD))
    assert f"[1/0] lamp {ODD}" in sink.getvalue()
    sink = io.StringIO()
    with Bars(Console(file=sink, width=200, force_terminal=True)) as bars:
        bars("layers [/x]", 1, 2)
    assert "layers [/x]" in sink.getvalue()


def test_terminal__keys_are_shown_with_their_brackets() -> None:
    sink = io.StringIO()
    Console(file=sink, width=250).print(as_table(recipe_keys("pruning.methods")))
    assert "[dimap, ovit]" in sink.getvalue().replace("'", "").replace('"', "")
    assert "\\[" not in sink.getvalue()


def test_terminal__nothing_of_ours_is_printed_by_another_console() -> None:
    """rich reads markup in what it prints unless every place says otherwise: one console does."""
    wrong = []
    for path in sorted((ROOT / "orchestration").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != "terminal.py" and re.search(
            r"rich\.console import [^\n]*Console|rich import print", text
        ):
            wrong.append(f"{path.name}: rich's own Console")
        if re.search(r"rich\.markup|from_markup", text):
            wrong.append(f"{path.name}: markup")
        wrong += [
            f"{path.name}: {column}"
            for column in re.findall(r"TextColumn\([^\n]*\)", text)
            if "markup=False" not in column
        ]
    assert wrong == []


def shown(display: Display, sink: io.StringIO) -> str:
    display._spoke = -1e9
    display._show()
    return sink.getvalue().splitlines()[-1]


def test_terminal__the_best_of_a_search_by_loss_is_shown() -> None:
    sink = io.StringIO()
    display = Display(Console(file=sink, width=200))
    display.phase("search", trials=3)
    for loss, top1, complete in ((0.4, 0.91, True), (0.2, 0.9, True), (0.1, 0.99, False)):
        display.trial_started("a", 0, {})
        display.trial_reported("a", {"score": -loss, "val_top1": top1, "complete": complete})
    assert "best 90.0 %" in shown(display, sink)


def test_terminal__below_the_final_sparsity_no_gradual_run_is_the_best() -> None:
    sink = io.StringIO()
    display = Display(Console(file=sink, width=200))
    display.phase("gradual", trials=1, epochs=3)
    display.trial_started("a", 0, {})
    display.trial_reported("a", {"score": -1.0, "val_top1": 0.99, "epoch": 1})
    assert "best" not in shown(display, sink)
    display.trial_reported("a", {"score": 0.8, "val_top1": 0.8001, "epoch": 2})
    display.trial_reported("a", {"score": float("nan"), "val_top1": 0.9, "epoch": 3})
    assert "best 80.0 %" in shown(display, sink)


def test_terminal__a_resumed_search_begins_with_the_best_that_is_known() -> None:
    known = [
        trial(score=-0.3, top1=0.8),
        trial(score=-0.1, top1=0.7),
        trial("stopped", score=-0.05, top1=0.9),
    ]
    known += [trial("failed"), trial(score=float("nan"), top1=0.95)]
    assert leading(known) == (-0.1, 0.7)
    assert leading([]) is None
    sink = io.StringIO()
    display = Display(Console(file=sink, width=200))
    display.phase("search", trials=9, done=5, best=leading(known))
    display.trial_started("a", 5, {})
    display.trial_reported("a", {"score": -0.2, "val_top1": 0.99, "complete": True})
    assert "best 70.0 %" in shown(display, sink)
