"""The table of methods: light to import, and true of the classes that it names."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pruners import METHODS, create_pruner
from pruners.methods.registry import SECOND_ORDER, MethodSpec


@pytest.mark.parametrize("module", ["pruners.methods.registry", "trainers.config.pruning"])
def test_registry__the_table_is_read_without_torch(module: str) -> None:
    code = f"import sys, {module}\nassert not {{'torch', 'numpy', 'numba'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", METHODS)
def test_registry__an_entry_is_true_of_its_class(name: str) -> None:
    spec: MethodSpec = METHODS[name]
    made: Any = create_pruner(name)
    assert (spec.name, made.name) == (name, name)
    assert type(made) is spec.load()
    assert type(made).__module__ == f"pruners.methods.{spec.module}"
    assert spec.second_order is (name in SECOND_ORDER) is (made.gradients > 0)
    assert spec.summary.endswith(".")


def test_registry__no_class_stands_in_the_table_twice() -> None:
    assert len({(spec.module, spec.class_name) for spec in METHODS.values()}) == len(METHODS)
