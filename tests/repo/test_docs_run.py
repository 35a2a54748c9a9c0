"""The code of the documentation that runs by itself does what its pages say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestration.cli.app import cli
from pruners.model.masks import MaskSet

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name: str) -> dict[str, Any]:
    """Run a page's Python and its ``espalier`` commands, from top to bottom, here; returns its names."""
    names: dict[str, Any] = {}
    text = (DOCS / name).read_text(encoding="utf-8")
    for language, code in re.findall(r"^```(python|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(code, name, "exec"), names)
            continue
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "espalier"
            cli(words[1:], standalone_mode=False)
    return names


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_docs_run__the_first_pruned_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Both methods keep what they say, oViT more of it, and the folders are there."""
    threads = torch.get_num_threads()
    try:
        names = run_page("tutorials/first_prune.md")
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "sparsity 0.75, 0.75" in printed
    assert "\n0.50\n" in printed
    assert names["dense"] > 0.8
    assert names["dense"] - names["accuracy"](names["by_ovit"]) < 0.05
    assert names["accuracy"](names["by_ovit"]) > names["accuracy"](names["by_dimap"])
    pruned = MaskSet.from_zeros(names["again"], names["layers"])
    assert pruned.sparsity == pytest.approx(0.75, abs=1e-4)
    assert Path("small/model.safetensors.packed").is_file()


def test_docs_run__python_api(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("guides/python_api.md")
    assert names["report"].sparsity == 0.5
    assert "Costs(" in capsys.readouterr().out
