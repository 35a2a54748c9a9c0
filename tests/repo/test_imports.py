"""The architecture, held by parsing the imports: orchestration → trainers → pruners → torch."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pruners", "trainers", "orchestration", "experiments")
LONGEST = 500  # about 400 is usual; a concept is not cut in pieces for a few lines more
MOST_FILES = 12

# package: what no module of it imports
FORBIDDEN = {
    "pruners": {"trainers", "orchestration", "experiments", "ray", "mlflow", "optuna", "timm", "pydantic"},
    "trainers": {"orchestration", "experiments"},
    "orchestration": {"experiments"},
    "experiments": set(PACKAGES),
    # programs that use the house as anybody would; that of the search times Ray and Optuna too
    "experiments/benchmarks": {"experiments", "mlflow"},
}
# Each floor imports only those before it; what shares one imports nothing of its neighbours.
FLOORS = (
    {"pruners.arithmetic", "pruners.redaction"},
    {"pruners.errors"},
    {"pruners.model"},
    {"pruners.allocation"},
    {"pruners.elimination"},
    {"pruners.methods", "pruners.structured", "pruners.reconstruction", "pruners.rounds"},
    {"pruners.order_builder"},
    {"pruners.one_shot"},
    {"pruners"},
    {
        "trainers.cache_folder",
        "trainers.host_memory",
        "trainers.distributed",
        "trainers.optional_imports",
        "trainers.process_pool",
        "trainers.remote_calls",
    },
    {"trainers.storage"},
    {"trainers.sources"},
    {"trainers.config"},
    {"trainers.models"},
    {"trainers.data"},
    {"trainers.checkpoint"},
    {"trainers.export"},
    {"trainers.sparse"},
    {"trainers.engines"},
    {"trainers.quantization"},
    {"trainers.deploy"},
    {"trainers.loop"},
    {"trainers.structured", "trainers.ray_worker"},
    {"orchestration.common"},
    {"orchestration.recipe"},
    {"orchestration.state"},
    {"orchestration.search", "orchestration.tracking"},
    {"orchestration.cluster"},
    {"orchestration.reporting"},
    {"orchestration.preflight"},
    {"orchestration.sweep", "orchestration.commands"},
    {"orchestration.client_driver", "orchestration.export"},
    {"orchestration.launch", "orchestration.benchmark"},
    {"orchestration.cli"},
)
# third-party package: the only modules that import it
CONFINED = {
    "ray": (
        "trainers/ray_worker.py",
        "orchestration/client_driver.py",
        "orchestration/cluster/*.py",
        "orchestration/search/*.py",
        "orchestration/state/*.py",
        "orchestration/sweep/*.py",
        "experiments/benchmarks/search_*.py",
    ),
    "mlflow": ("orchestration/tracking/*.py",),
    "optuna": (
        "orchestration/search/*.py",
        "orchestration/reporting/search_plots.py",
        "experiments/benchmarks/search_speed.py",
    ),
}


def imported(source: str, package: str) -> set[str]:
    """Top-level names that a module of ``package`` imports: at its head, in functions, for types only, or
    by ``importlib.import_module("…")``."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                names.add(str(node.args[0].value).split(".")[0])
    return names


def packages_imported(source: str) -> set[str]:
    """Sub-packages and top modules of ours that a module imports, ``trainers.loop`` or ``pruners.errors``."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {".".join(name.split(".")[:2]) for name in names if name.split(".")[0] in PACKAGES[:3]}
    return {name if name in FLOOR else name.split(".")[0] for name in ours}


FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def climbs(path: str, source: str) -> list[str]:
    """Imports of a module at ``path`` that run up, or along its floor."""
    parts = path.removesuffix(".py").split("/")
    home = parts[0] if parts[1] == "__init__" else ".".join(parts[:2])
    return [
        f"{path} imports {name}"
        for name in sorted(packages_imported(source) - {home})
        if FLOOR.get(name, len(FLOORS)) >= FLOOR[home]
    ]


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle, at any line or for types only; none if there is none.

    Args:
        sources: dotted names of modules, and their code.
    """
    arrows: dict[str, set[str]] = {}
    for home, source in sources.items():
        names = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        arrows[home] = names & sources.keys() - {home}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def violations(path: str, source: str) -> list[str]:
    """What a module at ``path`` (from the root) must not do, and does."""
    package = next(name for name in sorted(FORBIDDEN, reverse=True) if path.startswith(f"{name}/"))
    names = imported(source, package)
    wrong = [f"{path} imports {name}" for name in sorted(names & FORBIDDEN[package])]
    for name, homes in CONFINED.items():
        if name in names and not any(fnmatch(path, home) for home in homes):
            wrong.append(f"{path} imports {name}, which belongs in {', '.join(homes)}")
    lines = source.count("\n")
    if lines > LONGEST:
        wrong.append(f"{path} has {lines} lines")
    return wrong


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_imports__every_module_keeps_the_direction_of_imports() -> None:
    wrong = [
        problem
        for path in modules()
        for problem in violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert wrong == []
    assert {path.relative_to(ROOT).parts[0] for path in modules()} >= {"pruners", "trainers", "orchestration"}


def test_imports__no_arrow_between_packages_runs_up() -> None:
    ours = [path for path in modules() if path.relative_to(ROOT).parts[0] in PACKAGES[:3]]
    homes = {".".join(path.relative_to(ROOT).with_suffix("").parts[:2]) for path in ours}
    assert {home.removesuffix(".__init__") for home in homes} - {"trainers", "orchestration"} == set(FLOOR)
    assert [
        problem
        for path in ours
        if path.relative_to(ROOT).as_posix() not in {"trainers/__init__.py", "orchestration/__init__.py"}
        for problem in climbs(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ] == []


def test_imports__no_modules_import_each_other_in_a_circle() -> None:
    ours = [path for path in modules() if path.name != "__init__.py"]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ours}
    assert circle({name: path.read_text(encoding="utf-8") for name, path in names.items()}) == []


def test_imports__a_circle_is_seen() -> None:
    for_types = "if TYPE_CHECKING:\n    from trainers.a import A"
    assert set(circle({"trainers.a": "from trainers import b", "trainers.b": for_types})) == {
        "trainers.a",
        "trainers.b",
    }
    assert circle({"trainers.a": "from trainers import b", "trainers.b": "import torch"}) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trainers/data/a.py", "from trainers.loop import gradual"),
        ("trainers/data/a.py", "def f():\n    from trainers.checkpoint.folder import load_checkpoint"),
        ("trainers/loop/a.py", "import trainers.ray_worker"),
        ("pruners/model/a.py", "from pruners import prune"),
        ("orchestration/sweep/a.py", "from orchestration.commands import prune"),
        (
            "orchestration/state/a.py",
            "if TYPE_CHECKING:\n    from orchestration.reporting.display import Display",
        ),
    ],
)
def test_imports__an_arrow_that_runs_up_is_seen(path: str, source: str) -> None:
    assert len(climbs(path, source)) == 1


def test_imports__packages_hold_few_files_and_say_what_they_are_for() -> None:
    for package in {path.parent for path in modules()} - {ROOT / "experiments"}:
        if package.parent == ROOT / "experiments":
            continue
        module = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
        files = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
        assert len(files) <= MOST_FILES, package
        assert ast.get_docstring(module), package
        exported = next(
            (
                [str(ast.literal_eval(name)) for name in node.value.elts]
                for node in module.body
                if isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) == "__all__"
                and isinstance(node.value, ast.List)
            ),
            None,
        )
        assert exported, f"{package} says not what it offers"
        if package.name not in {"pruners", "cli"}:  # which offer names, the others their modules
            assert set(exported) == files | folders(package), package


def folders(package: Path) -> set[str]:
    return {path.parent.name for path in package.glob("*/__init__.py")}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pruners/a.py", "import trainers.loop"),
        ("pruners/a.py", "from orchestration import cli"),
        ("pruners/a.py", "def f():\n    import ray"),
        ("pruners/a.py", "if TYPE_CHECKING:\n    from timm.models import vit"),
        ("pruners/a.py", "import torch, pydantic as p"),
        ("pruners/a.py", "importlib.import_module('optuna.samplers')"),
        ("trainers/loop.py", "from orchestration.recipe.schema import Recipe"),
        ("trainers/loop.py", "from ray import train"),
        ("trainers/ray_worker.py", "import mlflow"),
        ("orchestration/cli/app.py", "import mlflow.pytorch"),
        ("orchestration/cli/app.py", "import optuna"),
        ("orchestration/tracking/tracker.py", "import optuna"),
        ("orchestration/commands/tracking.py", "import mlflow"),
        ("experiments/a.py", "import pruners"),
        ("experiments/benchmarks/a.py", "import ray.train"),
        ("pruners/a.py", "\n" * 501),
    ],
)
def test_imports__a_violation_is_seen(path: str, source: str) -> None:
    assert len(violations(path, source)) >= 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pruners/a.py", "from pruners.errors import InputError\nfrom . import masks\nimport torch"),
        ("trainers/ray_worker.py", "import ray\nfrom ray import train\nimport pruners"),
        ("trainers/models/factory.py", "import timm"),
        ("orchestration/cluster/connect.py", "import ray\nfrom trainers import loop\nimport pruners"),
        ("experiments/benchmarks/a.py", "import pruners, trainers, orchestration, timm"),
        ("orchestration/tracking/tracker.py", "import mlflow"),
        ("orchestration/tracking/registry_models.py", "from mlflow import MlflowClient"),
        ("orchestration/search/space.py", "import optuna"),
        ("orchestration/search/training_trial.py", "import optuna"),
        ("pruners/a.py", "\n" * 500),
    ],
)
def test_imports__what_is_allowed_is_not_refused(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_imports__tests_shadow_no_package() -> None:
    names = {path.name for path in Path(__file__).parents[1].iterdir()}
    assert not names & {*PACKAGES, "__init__.py"}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "experiments" / "benchmarks").glob("*.py")), ids=lambda file: file.name
)
def test_imports__a_benchmark_asks_for_what_there_is(file: Path) -> None:
    """Nobody runs them for weeks, and the type checker does not look at them."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES[:3]:
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                known = hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}") is not None
                assert known, f"{node.module} has no {alias.name}"
