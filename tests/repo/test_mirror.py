"""Tests mirror the packages: their folders are packages, their names begin with the unit that they test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pruners", "trainers", "orchestration")
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def snake_case(name: str) -> str:
    """``MaskEnforcer`` as ``mask_enforcer``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")


@cache
def units() -> frozenset[str]:
    """Names of the packages, modules, classes and functions that tests can be about."""
    names = set(PACKAGES)
    for package in (*PACKAGES, "experiments"):
        for path in (ROOT / package).rglob("*.py"):
            names |= {path.stem, path.parent.name}
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    names.add(node.name)
    return frozenset(map(snake_case, names)) - {""}


def without_a_unit(stem: str, source: str) -> Iterator[str]:
    """Names of tests in ``test_STEM.py`` that are not ``test_UNIT__what``, of its unit or a known one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            unit, _, what = node.name.removeprefix("test_").partition("__")
            if not what or (unit != stem and unit not in units()):
                yield node.name


def test_mirror__names_begin_with_their_unit() -> None:
    assert TESTS
    assert [
        f"{path.relative_to(ROOT)}: {name}"
        for path in TESTS
        for name in without_a_unit(path.stem.removeprefix("test_"), path.read_text(encoding="utf-8"))
    ] == []


def test_mirror__folders_are_packages() -> None:
    for package in PACKAGES:
        tests = ROOT / "tests" / f"{package}_tests"
        folders = {path.relative_to(tests) for path in tests.rglob("*") if path.is_dir()}
        named = {folder for folder in folders if "__pycache__" not in folder.parts}
        assert named
        assert [folder for folder in named if not (ROOT / package / folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    "name", ["test_what_it_does", "test_", "test_order__", "test_nothing_of_ours__is_tested", "test___a"]
)
def test_mirror__a_name_without_a_unit_is_seen(name: str) -> None:
    assert list(without_a_unit("order", f"def {name}(): pass")) == [name]


@pytest.mark.parametrize("name", ["test_order__a", "test_mask_enforcer__a", "test_prune__a", "test_sweep__a"])
def test_mirror__a_name_with_a_unit_is_not_refused(name: str) -> None:
    assert list(without_a_unit("order", f"class C:\n    def {name}(self): pass")) == []
