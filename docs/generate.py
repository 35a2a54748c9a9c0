"""Writes the generated reference: the recipe from its schema, the command line from click, the API's pages.

And the tables of results as CSV files.

    python docs/generate.py            # writes what has changed below docs/reference and experiments/results

``make docs`` runs it first; tests/repo/test_docs.py fails while a page is not what it would write.
"""

from __future__ import annotations

import ast
import csv
import importlib
import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import click

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

# package: title of its page
API = {
    "pruners": "pruners",
    "trainers.checkpoint": "trainers.checkpoint",
    "trainers.export": "trainers.export",
    "trainers.engines": "trainers.engines",
    "trainers.quantization": "trainers.quantization",
    "trainers.structured": "trainers.structured",
    "trainers.deploy": "trainers.deploy",
    "trainers.sparse": "trainers.sparse",
    "orchestration.recipe": "orchestration.recipe",
}
# of a package whose modules are mostly internal: what may be used
OFFERED = {
    "pruners": None,  # its __all__
    "trainers.sparse": (
        "runtime.load",
        "runtime.SparseModel",
        "runtime.Prediction",
        "modules.sparse_linear_modules",
        "modules.Swapped",
        "modules.SparseLinear",
        "packing.check",
        "packing.pack",
    ),
}
# page of results below experiments/: names for its tables, in their order
RESULTS = {
    "RESULTS.md": (
        "gradual_first_recipe",
        "gradual_second_recipe",
        "search_swin",
        "search_vit",
        "deploy_accuracy",
        "deploy_times",
        "deploy_gains",
        "zeros_alone_times",
        "sparse_engine",
        "sparse_random_masks",
    ),
    "benchmarks/RESULTS.md": ("benchmarks",),
    "benchmarks/one_shot.md": ("one_shot_vit", "one_shot_swin"),
}
BAR = "\\|"  # in a table
GENERATED = "<!-- Written by docs/generate.py from {}; do not edit it here. -->\n\n"


def pages() -> dict[str, str]:
    """Path from docs/ → text of every generated file."""
    return {
        "reference/recipe.md": recipe_page(),
        "reference/cli.md": cli_page(),
        **{f"reference/api/{name}.md": api_page(name, title) for name, title in API.items()},
        **{f"../experiments/results/{name}.csv": text for name, text in result_tables().items()},
    }


def result_tables() -> dict[str, str]:
    """Name → CSV of every table of results, cell by cell as on its page, without marks of emphasis."""
    texts = {}
    for page, names in RESULTS.items():
        lines = (DOCS.parent / "experiments" / page).read_text(encoding="utf-8").splitlines()
        blocks = [
            list(block) for is_row, block in itertools.groupby(lines, lambda line: line[:1] == "|") if is_row
        ]
        for name, (header, _, *rows) in zip(names, blocks, strict=True):
            file = io.StringIO()
            csv.writer(file, lineterminator="\n").writerows(map(cells, (header, *rows)))
            texts[name] = file.getvalue()
    return texts


def cells(row: str) -> list[str]:
    """The cells of a row of a table in Markdown."""
    return [cell.strip().replace("**", "").replace("`", "") for cell in row.strip().strip("|").split("|")]


def recipe_page() -> str:
    from orchestration.recipe.reference import as_markdown, recipe_keys

    return (
        GENERATED.format("the recipe's schema")
        + "# Keys of a recipe\n\n"
        + "`espalier keys` prints this list in a terminal, `espalier keys recovery.lr` the keys below one. "
        + "Any key can be changed on the command line: `espalier sweep my.yaml pruning.sparsity=0.9`. "
        + "A key that is not here is refused before anything starts.\n\n"
        + as_markdown(recipe_keys())
        + "\n"
    )


def cli_page() -> str:
    from orchestration.cli.app import cli

    parts = [
        GENERATED.format("the command line") + "# Command line\n",
        "`espalier COMMAND --help` says the same in a terminal. An input error is one line and status 2; "
        "Ctrl-C ends with status 130.\n",
    ]
    for path, command in commands(cli, "espalier"):
        parts.append(command_section(path, command))
    return "\n".join(parts)


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below a group, by its full name, in the order of the alphabet."""
    for name in sorted(group.commands):
        command = group.commands[name]
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def command_section(path: str, command: click.Command) -> str:
    """Usage, help and options of one command."""
    context = click.Context(command, info_name=path)
    usage = " ".join(command.collect_usage_pieces(context))
    rows = [option_row(option) for option in command.params if isinstance(option, click.Option)]
    text = "\n\n".join(paragraphs(command.help or ""))
    table = "\n".join(["| option | meaning |", "|---|---|", *rows, ""]) if rows else ""
    return f"## `{path}`\n\n```text\n{path} {usage}\n```\n\n{text}\n\n{table}"


def paragraphs(text: str) -> Iterator[str]:
    """Of a help text; one that click leaves as it is (``\\b``) becomes a block."""
    for paragraph in "\n".join(line.rstrip() for line in text.splitlines()).strip().split("\n\n"):
        if paragraph.lstrip().startswith("\b"):
            lines = paragraph.replace("\b", "").strip("\n")
            yield f"```text\n{lines}\n```"
        else:
            yield escaped(" ".join(paragraph.split()))


def option_row(option: click.Option) -> str:
    """A row of the table of options: its names, values, meaning, default and variable."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if not option.is_flag:
        value = option.make_metavar(click.Context(click.Command(""))).removesuffix(" RANGE")
        names += f" `{value}`"
    sentences = [escaped(" ".join((option.help or "").split()))]
    default = option.to_info_dict().get("default")
    if isinstance(option.show_default, str):
        sentences.append(f"Default: {option.show_default}.")
    elif option.show_default and default is not None:
        sentences.append(f"Default: `{default}`.")
    if option.required:
        sentences.append("Must be given.")
    if option.multiple:
        sentences.append("May be given several times.")
    if option.envvar:
        sentences.append(f"Variable: `{option.envvar}`.")
    return f"| {names.replace('|', BAR)} | {' '.join(filter(None, sentences))} |"


def escaped(text: str) -> str:
    """Text as Markdown that shows the same."""
    for sign in ("|", "*", "_", "<", "[", "`"):
        text = text.replace(sign, f"\\{sign}")
    return text


def api_page(package: str, title: str) -> str:
    """Docstrings of a package: of the names that it offers, or of each of its modules."""
    module = importlib.import_module(package)
    names = list(module.__all__)
    source = f"the docstrings of {package}" if OFFERED.get(package) else f"{package}.__all__"
    parts = [GENERATED.format(source) + f"# `{title}`\n", directive("automodule", package, [])]
    if package in OFFERED:
        parts += [of_name(f"{package}.{name}") for name in OFFERED[package] or names]
    else:
        for name in names:
            parts.append(f"## `{name}`\n")
            parts.append(directive("automodule", f"{package}.{name}", ["members"]))
    return "\n".join(parts)


def of_name(path: str) -> str:
    """The directive for a class, a function or a value."""
    package, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(package), name)
    if isinstance(thing, type):
        called = vars(thing).get("__call__")
        special = ["special-members: __call__"] if getattr(called, "__doc__", None) else []
        return directive("autoclass", path, ["members", *special])
    if hasattr(thing, "__code__"):
        return directive("autofunction", path, [])
    return directive("py:data", path, [], comment(package, name))


def comment(package: str, name: str) -> str:
    """What a value's own module says below it: its class has a docstring, but not the value."""
    home = importlib.import_module(package)._MODULE_OF[name]
    source = DOCS.parent.joinpath(*package.split("."), *home.split(".")).with_suffix(".py")
    statements = ast.parse(source.read_text(encoding="utf-8")).body
    for statement, after in itertools.pairwise(statements):
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else []
        targets = statement.targets if isinstance(statement, ast.Assign) else targets
        named = [target.id for target in targets if isinstance(target, ast.Name)]
        if named == [name] and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return str(after.value.value)
    return ""


def directive(name: str, argument: str, options: list[str], text: str = "") -> str:
    """A directive of reStructuredText in a page of Markdown."""
    lines = [
        f".. {name}:: {argument}",
        *(f"   :{option}" + ("" if ": " in option else ":") for option in options),
    ]
    lines += ["", *(f"   {line}" for line in text.splitlines())] if text else []
    return "\n".join(["```{eval-rst}", *lines, "```", ""])


def main() -> None:
    for path, text in pages().items():
        target = DOCS / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
