"""The table that a sweep ends with: counts against the dense model, also where it was cut in width before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from results import ROW
from rich.console import Console

from orchestration.sweep.report import _counts, table

COSTS = {"parameters": 600, "parameters_sparse": 150, "macs": 6000, "macs_sparse": 1500}


def printed(*rows: Any) -> str:
    console = Console(width=200, record=True)
    console.print(table(rows))
    return console.export_text()


def test_report__counts_are_held_against_the_dense_model_that_all_began_with() -> None:
    step = {"dense_parameters": 1000, "dense_macs": 9000, "cut": {"mlp": [4, 3]}}
    found = _counts({"costs": COSTS, "structured": step})
    assert found == {
        "parameters": 1000,
        "structured_parameters": 600,
        "parameters_sparse": 150,
        "macs": 9000,
        "structured_macs": 6000,
        "macs_sparse": 1500,
    }


@pytest.mark.parametrize("record", [{"costs": COSTS}, {"costs": COSTS, "structured": None}])
def test_report__without_a_structured_step_nothing_changes(record: dict[str, Any]) -> None:
    assert _counts(record) == COSTS


def test_report__the_structured_model_has_a_column_where_there_is_one() -> None:
    assert "structured" not in printed(ROW)
    cut = replace(
        ROW,
        structured=0.875,
        parameters=2_000_000,
        structured_parameters=1_500_000,
        parameters_sparse=400_000,
    )
    text = printed(cut)
    assert "structured" in text
    assert "87.50 %" in text
    assert "2.00 M → 1.50 M → 400.00 k" in text
