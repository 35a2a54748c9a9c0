"""The documentation: generated pages are fresh, commands and recipes in it are such, links lead somewhere."""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml

from orchestration.cli.app import cli
from orchestration.recipe.reference import recipe_keys
from orchestration.recipe.validation import validate

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README_LINES = 150
GENERATED = ("reference/recipe.md", "reference/cli.md", "reference/api/")
MINIMAL: dict[str, Any] = {
    "name": "x",
    "model": {"architecture": "vit_tiny_patch16_224", "pretrained": True, "classes": 10},
    "data": {"train": "train.parquet"},
    "pruning": {"sparsity": 0.75},
}


def pages() -> list[Path]:
    """Written by hand: these are read for commands, recipes and code."""
    names = {path: path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    written = [path for path, name in names.items() if not name.startswith((*GENERATED, "_build"))]
    return [ROOT / "README.md", *sorted(written)]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands(page: Path) -> Iterator[str]:
    """Every line of a page that calls ``espalier``, also for another command to run."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    text = page.read_text(encoding="utf-8")
    lines += re.findall(r"^    (espalier .*)$", text, re.MULTILINE)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["espalier"]:
            yield shlex.join(words[1:])
        for word in words[1:]:
            if word.startswith("espalier "):
                yield word.removeprefix("espalier ")


def parsed(line: str) -> click.Context:
    """The context that a command would be run in; what is wrong with the line is raised."""
    words = shlex.split(line)
    command: click.Command = cli
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    return command.make_context(command.name, words)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docs__generated_pages_are_what_would_be_generated(generator: ModuleType) -> None:
    """'python docs/generate.py' writes them; 'make docs' does so first."""
    fresh = generator.pages()
    stale = [name for name, text in fresh.items() if (DOCS / name).read_text(encoding="utf-8") != text]
    assert stale == []
    known = {path.relative_to(DOCS).as_posix() for path in (DOCS / "reference/api").glob("*.md")}
    assert known - {"reference/api/index.md"} == {name for name in fresh if "/api/" in name}
    tables = {f"../experiments/results/{path.name}" for path in (ROOT / "experiments/results").iterdir()}
    assert tables == {name for name in fresh if name.endswith(".csv")}


def test_docs__tables_of_results_are_read_cell_by_cell(generator: ModuleType) -> None:
    text = generator.result_tables()["gradual_second_recipe"]
    header, first, *_ = csv.reader(text.splitlines())
    assert header == [
        "method",
        "dense",
        "75 %: one shot",
        "75 %: recovered",
        "90 %: one shot",
        "90 %: recovered",
    ]
    assert first == ["oViT", "69.19", "69.33", "69.37", "68.84", "69.03"]
    for name, text in generator.result_tables().items():
        assert len({len(row) for row in csv.reader(text.splitlines())}) == 1, name


def test_docs__the_page_of_commands_has_all_of_them(generator: ModuleType) -> None:
    text = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## `espalier (.*)`$", text, re.MULTILINE)) == {
        path.removeprefix("espalier ") for path, _ in generator.commands(cli, "espalier")
    }
    assert "`--dry-run`" in text
    assert "data convert" in text


def test_docs__readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_docs__commands_recipes_code_and_links_of_a_page(page: Path) -> None:
    for line in commands(page):
        for override in parsed(line).params.get("overrides", ()):
            assert override.partition("=")[0] in keys(), line
    named = [block.partition("\n\n")[2] for block in blocks(page, "{code-block} yaml")]  # below their caption
    for recipe in (*blocks(page, "yaml"), *named):
        validate(merged(MINIMAL, yaml.safe_load(recipe)))
    for code in (*blocks(page, "python"), *blocks(page, "{code-block} python")):
        compile(code, str(page), "exec")
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target


@cache
def keys() -> set[str]:
    """All keys of a recipe, and those above them."""
    parts = {key.name.partition(".")[0] for key in recipe_keys()}
    names = {key.name for part in parts for key in recipe_keys(part)}
    return names | {name[: end.start()] for name in names for end in re.finditer(r"\.", name)}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A fragment in the smallest recipe; a model is one or the other."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if both and key != "model" else value
    return result


@pytest.mark.parametrize(
    "line",
    ["swep my.yaml", "sweep my.yaml --dryrun", "prune deit_small_patch16_224 --sparsity x", "inspect"],
)
def test_docs__a_command_that_is_none_is_seen(line: str) -> None:
    with pytest.raises((KeyError, click.UsageError)):
        parsed(line)


def test_docs__pages_have_commands_and_recipes() -> None:
    """What the test above reads is there to be read."""
    assert sum(len(list(commands(page))) for page in pages()) > 60
    assert sum(len(blocks(page, "yaml")) for page in pages()) > 25
