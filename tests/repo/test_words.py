"""Words that are no names, and docstrings that begin with a sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pruners", "trainers", "orchestration")
OTHERS = ("tests", "experiments", "docs")

BANNED = {"found", "one", "told", "said", "place", "places", "some", "there", "mine", "unsaid", "telling"}
"""They say nothing of what a variable holds or a function does. Comprehensions may use them."""

# Optuna's ask and tell, and a key of stored logs: Event and TrialRecord say when a trial was asked and told;
# a key of the stored state.json
EXEMPT = {"orchestration/state/trial_log.py": {"told"}, "orchestration/state/heartbeat.py": {"said"}}

NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)

OTHER_SPELLINGS = ("quantis", "artefact")
"""Parts of words that names spell as the libraries do: quantize, artifact."""

FIRST_WORDS = ("Whether ", "Of ", "Those ")
"""Docstrings that begin so are no sentences, and a reader must guess what they continue."""

# these know what the user typed; a layer below names its parameter or the recipe's key
KNOW_OPTIONS = tuple(
    f"orchestration/{name}"
    for name in ("cli/", "commands/", "benchmark/", "export/", "cluster/", "launch.py", "common/network.py")
)

SECTIONS = ("Args:", "Attributes:", "Returns:", "Yields:", "Raises:", "Example:")


def outside_comprehensions(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below a node but the targets of comprehensions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.comprehension):
            for part in (child.iter, *child.ifs):
                yield part
                yield from outside_comprehensions(part)
            continue
        yield child
        yield from outside_comprehensions(child)


def names_defined(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of all variables, parameters, attributes, functions and classes that a module defines."""
    for node in outside_comprehensions(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, NAMED) and node.name:
            yield node.lineno, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def banned(source: str) -> list[tuple[int, str]]:
    """Line and name of all banned names; a leading or trailing underscore does not help."""
    return [(line, name) for line, name in names_defined(source) if name.strip("_") in BANNED]


def misspelled(source: str) -> list[tuple[int, str]]:
    """Line and name of all names with the other spelling of a word."""
    return [
        (line, name)
        for line, name in names_defined(source)
        if any(part in name.lower() for part in OTHER_SPELLINGS)
    ]


def begins_without_a_subject(source: str) -> list[int]:
    """Lines of the docstrings, of attributes too, that begin with one of :data:`FIRST_WORDS`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and str(node.value.value).startswith(FIRST_WORDS)
    ]


def options_blamed(source: str) -> list[str]:
    """Options of the command line that errors name as their key."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        argument.value
        for call in calls
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
        if isinstance(argument, ast.Constant) and re.match("--[a-z]", str(argument.value))
    ]


def begins_with_a_section(source: str) -> list[str]:
    """Functions, classes and the module, where the docstring has no sentence before its first section."""
    documented = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        getattr(node, "name", "module")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and (ast.get_docstring(node) or "").startswith(SECTIONS)
    ]


def sources(folders: Iterable[str] = PACKAGES) -> Iterator[tuple[str, str]]:
    for package in folders:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_words__names_are_nouns_and_verbs() -> None:
    assert [
        f"{path}:{line}: {name}"
        for path, source in sources((*PACKAGES, *OTHERS))
        for line, name in banned(source)
        if name not in EXEMPT.get(path, set())
    ] == []


def test_words__names_have_one_spelling() -> None:
    assert [
        f"{path}:{line}: {name}"
        for path, source in sources((*PACKAGES, *OTHERS))
        for line, name in misspelled(source)
    ] == []


def test_words__docstrings_begin_with_a_sentence() -> None:
    assert [
        f"{path}: {name}"
        for path, source in sources((*PACKAGES, *OTHERS))
        for name in begins_with_a_section(source)
    ] == []


def test_words__docstrings_have_a_subject() -> None:
    assert [f"{path}:{line}" for path, source in sources() for line in begins_without_a_subject(source)] == []


def test_words__errors_name_options_in_the_command_line_alone() -> None:
    below = [(path, source) for path, source in sources() if not path.startswith(KNOW_OPTIONS)]
    assert [f"{path}: {option}" for path, source in below for option in options_blamed(source)] == []


def test_words__an_option_that_an_error_names_is_seen() -> None:
    source = 'raise InputError("--out", out, "is there")\ncheck(out, key="--out")\ncheck("out --", key="out")'
    assert options_blamed(source) == ["--out", "--out"]


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "self._mine = 1",
        "a, (one, b) = c",
        "for some in a: pass",
        "def f(told): pass",
        "def f(*said): pass",
        "lambda place: 0",
        "def there(): pass",
        "class C:\n    one: int",
        "with a as found: pass",
        "import a as one",
        "if (found := a): pass",
        "[a for a in b if (found := a)]",
        "[(found := a) for a in b]",
        "try: pass\nexcept E as one: pass",
        "match a:\n    case {'k': found}: pass",
    ],
)
def test_words__a_banned_name_is_seen(source: str) -> None:
    assert len(banned(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "[one for one in a]",
        "{one: 1 for one, b in a}",
        "any(found for found in a)",
        "print(one)",
        "founded = 1",
    ],
)
def test_words__what_is_allowed_is_not_refused(source: str) -> None:
    assert banned(source) == []


@pytest.mark.parametrize("source", ["def requantise(): pass", "ARTEFACT = 1", "def f(quantisation): pass"])
def test_words__another_spelling_is_seen(source: str) -> None:
    assert len(misspelled(source)) == 1


@pytest.mark.parametrize(
    "source",
    ['def f():\n    """Whether it is."""', 'a = 1\n"""Of b."""', 'class C:\n    """Those that are."""'],
)
def test_words__a_docstring_without_a_subject_is_seen(source: str) -> None:
    assert len(begins_without_a_subject(source)) == 1


def test_words__a_docstring_with_a_subject_is_not_refused() -> None:
    assert begins_without_a_subject('"""Offers of a cluster, of which some are dense."""') == []


def test_words__a_docstring_without_a_sentence_is_seen() -> None:
    source = (
        '"""Module."""\nclass C:\n    """Attributes:\n    a: b"""\n    def f(self):\n        """Raises: E"""'
    )
    assert begins_with_a_section(source) == ["C", "f"]
