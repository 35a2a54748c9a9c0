"""Aliases by rule, on a registry of MLflow's own: SQLite, read back through its client."""

from __future__ import annotations

import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from results import ROW

from orchestration.cli import app
from orchestration.recipe.schema import Promotion
from orchestration.sweep.report import alias_lines
from orchestration.tracking import lineage
from orchestration.tracking.check import check_alias, check_name
from orchestration.tracking.promotion import choose, level_alias, promote, settle
from orchestration.tracking.registry import Registry, Version, open_registry
from pruners.errors import InputError

RULE = Promotion(sparsity=0.75)
DATA = "0123456789ab"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a sweep leaves it: a database, and no server."""
    folder = tmp_path_factory.mktemp("storage")
    (folder / "mlflow").mkdir()
    MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db").search_registered_models()
    return folder


@pytest.fixture
def client(storage: Path) -> Iterator[MlflowClient]:
    """An empty registry."""
    made = MlflowClient(f"sqlite:///{storage}/mlflow/mlflow.db")
    yield made
    for model in made.search_registered_models():
        made.delete_registered_model(model.name)


@pytest.fixture
def registry(client: MlflowClient) -> Registry:
    return Registry(client)


def made(client: MlflowClient, *accuracies: float, model: str = "m", **tags: str) -> list[Version]:
    """A version for each accuracy, at 75 % and on the same data unless tags say otherwise."""
    registry = Registry(client)
    if model not in registry.names():
        client.create_registered_model(model)
    for accuracy in accuracies:
        known = {"sparsity": "0.7500", "data": DATA, "validation_top1": f"{accuracy:.6f}"} | tags
        known = {key: value for key, value in known.items() if value}
        client.create_model_version(model, f"mlflow-artifacts:/0/{uuid.uuid4().hex}/x", tags=known)
    return list(reversed(registry.versions(model)))[-len(accuracies) :]


def carries(client: MlflowClient, alias: str = "champion") -> str | None:
    return aliases(client).get(alias)


def aliases(client: MlflowClient) -> dict[str, str]:
    aliases = dict(client.get_registered_model("m").aliases)
    return {alias: str(version) for alias, version in aliases.items()}


@pytest.mark.parametrize(
    ("accuracies", "rule", "winner"),
    [
        ((0.80, 0.81), RULE, "2"),
        ((0.81, 0.80), RULE, "1"),
        ((0.80, 0.80), RULE, "2"),  # not below
        ((0.80, 0.80), Promotion(tolerance=None), "1"),  # better was asked for
        ((0.81, 0.80), Promotion(tolerance=0.01), "2"),  # exactly at the tolerance
        ((0.81, 0.7999), Promotion(tolerance=0.01), "1"),
    ],
)
def test_promotion__a_champion_gives_way_to_what_is_not_below_it(
    client: MlflowClient, registry: Registry, accuracies: Sequence[float], rule: Promotion, winner: str
) -> None:
    for version in made(client, *accuracies):
        decision = promote(registry, version, "champion", rule)
        assert decision.refused == (carries(client) != version.version)
    assert carries(client) == winner


def test_promotion__equal_accuracies_are_told_apart_by_the_loss(
    client: MlflowClient, registry: Registry
) -> None:
    better = Promotion(tolerance=None)
    (first,) = made(client, 0.8, validation_loss="0.5")
    (worse,) = made(client, 0.8, validation_loss="0.6")
    (best,) = made(client, 0.8, validation_loss="0.4")
    assert not promote(registry, first, "champion", better).refused
    assert promote(registry, worse, "champion", better).refused
    assert not promote(registry, best, "champion", better).refused
    assert carries(client) == best.version


def test_promotion__an_old_version_within_the_tolerance_does_not_come_back(
    client: MlflowClient, registry: Registry
) -> None:
    rule = Promotion(tolerance=0.05)
    old, new = made(client, 0.80, 0.79)
    promote(registry, old, "champion", rule)
    promote(registry, new, "champion", rule)
    assert carries(client) == new.version
    assert promote(registry, old, "champion", Promotion(tolerance=None)).refused is False
    promote(registry, new, "champion", rule)
    refused = promote(registry, made(client, 0.70)[0], "champion", rule)
    assert refused.refused
    assert "70.00 % on validation, and it has 79.00 %" in refused.why
    assert carries(client) == new.version


@pytest.mark.parametrize("data", ["ba9876543210", ""])
def test_promotion__versions_of_other_data_are_not_compared(
    client: MlflowClient, registry: Registry, data: str
) -> None:
    for ours, theirs in ((data, DATA), (DATA, data)):
        (before,), (after,) = made(client, 0.5, data=theirs), made(client, 0.9, data=ours)
        promote(registry, before, "champion", RULE, force=True)
        decision = promote(registry, after, "champion", RULE)
        assert decision.refused
        assert "other images" in decision.why
        assert carries(client) == before.version
        forced = promote(registry, after, "champion", RULE, force=True)
        assert not forced.refused
        assert forced.why.endswith("by force")
        assert carries(client) == after.version


def test_promotion__a_champion_has_the_zeros_that_were_asked_for(
    client: MlflowClient, registry: Registry
) -> None:
    (thin,) = made(client, 0.99, sparsity="0.6000")
    refused = promote(registry, thin, "champion", RULE)
    assert refused.refused
    assert refused.why == "stays free: version 1 has 60 % zeros, and 75 % are asked for"
    assert carries(client) is None
    (rounded,) = made(client, 0.5, sparsity="0.7497")  # whole groups of weights
    assert not promote(registry, rounded, "champion", RULE).refused


def test_promotion__a_sweep_settles_champion_and_sparsities(client: MlflowClient, registry: Registry) -> None:
    kept = made(client, 0.97, 0.96, sparsity="0.6000")
    ends = made(client, 0.90, 0.91)
    settle(registry, [*kept, *ends], RULE)
    before = {"champion": "4", "sparsity-75": "4", "sparsity-60": "1"}
    assert aliases(client) == before

    again = settle(registry, [*kept, *ends], RULE)
    assert not any(decision.refused for decision in again)
    assert aliases(client) == before

    next_sweep = [*made(client, 0.91), *made(client, 0.98, sparsity="0.6000")]
    refused = {decision.alias for decision in settle(registry, next_sweep, RULE) if decision.refused}
    assert refused == {"sparsity-75"}, "equal is enough for a champion, not for a sparsity"
    assert aliases(client) == {"champion": "5", "sparsity-75": "4", "sparsity-60": "6"}


def test_promotion__a_sweep_without_enough_zeros_makes_no_champion(
    client: MlflowClient, registry: Registry
) -> None:
    decisions = settle(registry, made(client, 0.9, sparsity="0.5000"), RULE)
    assert [decision.alias for decision in decisions] == ["sparsity-50"]
    assert aliases(client) == {"sparsity-50": "1"}


@pytest.mark.parametrize(
    ("sparsity", "alias"),
    [(0.75, "sparsity-75"), (0.625, "sparsity-62_5"), (0.89996, "sparsity-90"), (1.0, "sparsity-100")],
)
def test_promotion__aliases_of_sparsities_are_such_as_mlflow_takes(sparsity: float, alias: str) -> None:
    assert level_alias(sparsity) == alias
    check_alias(alias, "--alias")


def test_promotion__the_choice_is_the_best_that_can_be_compared(
    client: MlflowClient, registry: Registry
) -> None:
    first, best, _ = made(client, 0.80, 0.85, 0.82)
    made(client, 0.99, data="ba9876543210")
    made(client, 0.98, sparsity="0.5000")
    promote(registry, first, "champion", RULE)
    assert choose(registry, "m", "champion", RULE).version == best.version
    with pytest.raises(InputError, match="no version with sparsity-90"):
        choose(registry, "m", "sparsity-90", RULE)


@pytest.mark.parametrize(
    "rule", [Promotion(), Promotion(sparsity=0.9, tolerance=0.01), Promotion(sparsity=0.0, tolerance=None)]
)
def test_promotion__the_rule_is_kept_with_the_model(
    client: MlflowClient, registry: Registry, rule: Promotion
) -> None:
    made(client, 0.8)
    assert registry.rule("m") == Promotion()
    registry.set_rule("m", Promotion(sparsity=0.1, tolerance=0.5))
    registry.set_rule("m", rule)
    assert registry.rule("m") == rule


def test_promotion__a_chain_leads_to_the_first_parent(client: MlflowClient, registry: Registry) -> None:
    made(client, 0.8, method="dimap", recipe="abc", git_commit="c0ffee", dense="d0")
    made(client, 0.7, method="ovit", dense="d1", parent="models:/m/1")
    made(client, 0.6, parent="models:/m/2")
    assert [version.version for version in lineage.chain(registry, "models:/m/3")] == ["3", "2", "1"]
    text = "\n".join(lineage.lines(registry, "models:/m/2"))
    assert text.startswith("models:/m/2\n")
    for fact in (
        "ovit",
        "75.00 %",
        "70.00 %",
        "dense       d1\n  parent      models:/m/1",
        "c0ffee",
        "abc",
        "not recorded",
    ):
        assert fact in text
    client.delete_model_version("m", "1")
    assert [version.version for version in lineage.chain(registry, "models:/m/3")] == ["3", "2"]


def test_promotion__a_sweep_ends_with_what_became_of_the_aliases(
    client: MlflowClient, registry: Registry
) -> None:
    def decided(made: Sequence[Version]) -> list[str]:
        rows = [replace(ROW, version=version.version, sparsity=version.sparsity) for version in made]
        return list(alias_lines("m", rows, settle(registry, made, RULE)))

    assert decided(made(client, 0.8)) == [
        "champion: ovit (version 1, models:/m@champion)",
        "load the champion: timm.create_model('local-dir:/runs/recovered', pretrained=True)",
        "aliases: @champion version 1, @sparsity-75 version 1",
    ]
    assert decided(made(client, 0.7)) == [
        "champion: stays with version 1: version 2 has 70.00 % on validation, and it has 80.00 %",
        "make it champion:  espalier promote m --version 2 --force",
        "sparsity-75: stays with version 1: version 2 has 70.00 % on validation, and it has 80.00 %",
    ]
    assert decided(made(client, 0.9, sparsity="0.5000")) == [
        "champion: none of these, as none is sparse enough (tracking.promotion.sparsity)",
        "aliases: @sparsity-50 version 3",
    ]


# by the command line


@pytest.fixture
def say(
    storage: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Status and words of a command, run in this process, over the database or an MLflow that is named."""

    def call(*arguments: str) -> tuple[int, str, str]:
        where = () if "--tracking" in arguments else ("--storage", str(storage))
        return _run(capsys, monkeypatch, *arguments, *where)

    return call


def _run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["espalier", *arguments])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]
    try:
        with pytest.raises(SystemExit) as end:
            app.main()
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
    output = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, output.out, output.err


def test_promotion__promotion_by_hand(
    client: MlflowClient, registry: Registry, storage: Path, say: Callable[..., tuple[int, str, str]]
) -> None:
    made(client, 0.80, 0.85, 0.70)
    registry.set_rule("m", RULE)
    status, out, err = say("promote")
    assert (status, out, err) == (
        0,
        "m@champion: version 2 (85.00 % on validation, 75 % zeros) takes it\n",
        "",
    )
    assert carries(client) == "2"
    status, out, _ = say("promote", "m", "--version", "3")
    assert status == 1
    assert out == (
        "m@champion: stays with version 2: version 3 has 70.00 % on validation, and it has 85.00 %\n"
    )
    assert carries(client) == "2"
    uri = f"sqlite:///{storage}/mlflow/mlflow.db"
    status, out, _ = say("promote", "--version", "3", "--force", "--tracking", uri)
    assert status == 0
    assert len(out.splitlines()) == 1
    assert carries(client) == "3"
    status, out, _ = say("promote", "--version", "3")
    assert (status, "carries it already" in out) == (0, True)
    status, out, _ = say("promote", "--version", "1", "--alias", "staging")
    assert (status, carries(client, "staging")) == (0, "1")
    status, out, _ = say("promote", "--version", "1", "--alias", "sparsity-90")
    assert (status, carries(client, "sparsity-90")) == (1, None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("promote", "m", "--version", "9"), ("--version = '9'", "m has 1, 2")),
        (("promote", "m", "--version", "one"), ("--version = 'one'", "number of a version")),
        (("promote", "mm"), ("'mm'", "no such registered model", "did you mean 'm'?")),
        (("promote", "a/b"), ("NAME = 'a/b'", "must be a name that MLflow takes")),
        (("promote", "m", "--alias", "a.b"), ("--alias = 'a.b'", "must be an alias that MLflow takes")),
        (("promote", "m", "--alias", "v3"), ("--alias = 'v3'", "reserved")),
        (("promote", "m", "--alias", "Latest"), ("--alias = 'Latest'", "reserved")),
        (("promote", "m", "--alias", "sparsity-90"), ("'m'", "no version with sparsity-90")),
        (("lineage", "models:/m/9"), ("models:/m/9", "no such version; there is 2, 1")),
        (("lineage", "models:/m@absent"), ("models:/m@absent", "no such version")),
        (("lineage", "m"), ("'m'", "must be models:/NAME@alias or models:/NAME/VERSION")),
    ],
)
def test_promotion__what_is_not_there_is_one_line(
    client: MlflowClient,
    arguments: Sequence[str],
    says: Sequence[str],
    say: Callable[..., tuple[int, str, str]],
) -> None:
    made(client, 0.8, 0.9)
    status, out, err = say(*arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert [text for text in says if text not in err] == []
    assert aliases(client) == {}


def test_promotion__of_several_models_one_is_to_be_named(
    client: MlflowClient, say: Callable[..., tuple[int, str, str]]
) -> None:
    assert say("promote")[0] == 2
    made(client, 0.8)
    made(client, 0.8, model="n")
    status, _, err = say("promote")
    assert (status, "must be one of m, n" in err) == (2, True)


@pytest.mark.parametrize("name", ["a/b", "a:b", " ", "..", "a@b"])
def test_promotion__names_that_cannot_be_registered(name: str) -> None:
    with pytest.raises(InputError):
        check_name(name, "tracking.registered_model")


def test_promotion__an_mlflow_that_goes_away_is_one_line_within_seconds() -> None:
    began = time.monotonic()
    with (
        pytest.raises(InputError, match=r"MLflow = 'http://127\.0\.0\.1:9'") as refused,
        open_registry("http://user:secret@127.0.0.1:9") as registry,
    ):
        registry.names()
    assert time.monotonic() - began < 60
    assert "secret" not in str(refused.value)
