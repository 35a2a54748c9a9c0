"""The rounds of a one-shot pruning without a cluster: orders, models between them, the best one solved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import ray
import torch
from one_shot_inputs import actor
from training_runs import make_files

from orchestration.recipe.schema import Recipe
from orchestration.recipe.validation import validate
from orchestration.search.one_shot_trial import OneShotInputs
from orchestration.search.space import AllocationSpace
from orchestration.sweep import tasks
from orchestration.sweep.allocation.rounds import Round, Rounds
from orchestration.sweep.artifacts import Dense
from orchestration.sweep.context import Sweep
from orchestration.sweep.tasks import OrderFacts
from pruners import create_pruner, prune
from trainers.checkpoint.folder import load_checkpoint, weights_hash
from trainers.config.data import DataSettings
from trainers.data import datasets
from trainers.models import factory

FISHER = {"gradients": 6, "batch_size": 4, "block_size": 16, "damp": 1e-3}
LEVELS = (0.5, 0.7, 0.8)


@dataclass
class Direct:
    """A function that is called as a Ray task is, in this process."""

    function: Callable[..., Any]

    def remote(self, *arguments: Any) -> Any:
        return self.function(*arguments)


@dataclass
class Alone:
    """What rounds need of a sweep, without Ray; ``made`` are the artifacts that were made."""

    recipe: Recipe
    data: DataSettings
    storage: str
    data_hash: str = "d"
    lines: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    @property
    def display(self) -> Alone:
        return self

    def say(self, line: str) -> None:
        self.lines.append(line)

    def task(self, function: Callable[..., Any]) -> tuple[Direct, str]:
        return Direct(function), "cpu"

    @contextmanager
    def making(self, artifact: str, title: str) -> Iterator[None]:
        self.made.append(artifact)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(ray, "get", lambda value: value)
    yield
    torch.set_num_threads(threads)  # tasks take all processors


def sweep(files: dict[str, str], storage: Path, **changes: Any) -> Alone:
    content: dict[str, Any] = {
        "name": "tiny",
        "model": {"checkpoint": files["dense"], "classes": 3},
        "data": {"train": files["train"], "validation": files["validation"]},
        "pruning": {
            "methods": ["ovit"],
            "sparsity": LEVELS[-1],
            "fisher": {**FISHER, "rounds": LEVELS},
            "reconstruct": 12,
        },
        "allocation": {"sparsities": [0.6, 0.7, 0.85], "images": 8},
    }
    recipe = validate(content | changes)
    return Alone(recipe, DataSettings(train=files["train"], validation=files["validation"]), str(storage))


def rounds(given: Alone, files: dict[str, str]) -> Rounds:
    dense = Dense(files["dense"], 0.5, weights_hash(files["dense"]))
    return Rounds(cast(Sweep, given), "ovit", dense, given.recipe.allocated_sparsities)


def inputs(
    given: Alone, files: dict[str, str], sparsity: float, done: tuple[Round, OrderFacts]
) -> OneShotInputs:
    last, facts = done
    recipe = given.recipe
    space = AllocationSpace.of(
        recipe.allocation, recipe.pruning, facts.layers, facts.own[sparsity], facts.pruned
    )
    return OneShotInputs(
        last.checkpoint,
        given.data,
        recipe.seed,
        recipe.allocation,
        space,
        last.order,
        facts.costs,
        files["dense"],
        recipe.pruning.reconstruct,
    )


def test_rounds__each_is_made_once_and_found_again(files: dict[str, str], tmp_path: Path) -> None:
    first = sweep(files, tmp_path)
    chain = rounds(first, files)
    begun, facts = chain.leading_to(0.6)
    assert begun.checkpoint != files["dense"]  # of the second round, which goes from 50 to 70 %
    assert set(facts.own) == {0.6, 0.7}
    assert [artifact.split("/")[0] for artifact in first.made] == ["orders", "rounds", "orders"]
    ended, facts = chain.leading_to(0.8)
    assert set(facts.own) == {0.8, 0.85}  # the last round goes beyond its own sparsity too
    assert chain.leading_to(0.85)[0] == ended
    assert len(first.made) == len(set(first.made)) == 5
    orders = [name for name in first.made if name.startswith("orders")]
    assert len(set(orders)) == 3
    zeros = load_checkpoint(ended.checkpoint).masks
    assert zeros is not None
    assert zeros.sparsity == pytest.approx(0.7, abs=1e-3)
    assert facts.pruned == zeros.pruned()

    again = sweep(files, tmp_path)
    assert rounds(again, files).leading_to(0.8)[0] == ended
    assert again.made == []


def test_rounds__models_between_belong_to_how_they_were_made(files: dict[str, str], tmp_path: Path) -> None:
    given = sweep(files, tmp_path)
    rounds(given, files).leading_to(0.8)
    pruning = given.recipe.pruning.model_dump(mode="json")
    unsolved = sweep(files, tmp_path, pruning=pruning | {"reconstruct": 0})
    rounds(unsolved, files).leading_to(0.8)
    assert len(unsolved.made) == 4  # the order of the dense model is the same
    assert not set(unsolved.made) & set(given.made)


def test_rounds__the_ends_model_is_that_of_prune(files: dict[str, str], tmp_path: Path) -> None:
    given = sweep(files, tmp_path)
    done = rounds(given, files).leading_to(0.8)
    shared = inputs(given, files, 0.8, done)
    target = str(tmp_path / "one-shot")
    record = {"method": "ovit", "figures": {"val_top1": -1.0}}
    top1 = tasks.save_one_shot(shared, done[1].own[0.8], target, record, "cpu")
    saved = load_checkpoint(target)
    assert saved.record["figures"]["val_top1"] == top1 >= 0
    assert saved.record["reconstruction"] == {"images": 12}

    dense = load_checkpoint(files["dense"]).model.eval()
    transform = datasets.eval_transform(factory.data_config(dense))
    train = datasets.split(given.data, "train", transform, 0)
    batches = list(datasets.fixed_batches(train, 4, 0, 6, rank=0, world=1, seed=0))
    pruner = create_pruner("ovit", block_size=16, damp=1e-3, gradients=6)
    report = prune(dense, pruner, 0.8, batches=batches, rounds=LEVELS, reconstruct=12)
    assert saved.masks is not None
    expected = report.masks
    same = sum(int((saved.masks[name] == mask).sum()) for name, mask in expected.items())
    assert same / expected.numel > 0.99  # stored orders are rounded to 16 bits
    for name, weight in dense.state_dict().items():
        assert (weight - saved.model.state_dict()[name]).norm() <= 0.05 * weight.norm()


def test_rounds__trials_are_solved_where_that_is_asked_for(files: dict[str, str], tmp_path: Path) -> None:
    given = sweep(files, tmp_path, allocation={"images": 8, "reconstruct": 8})
    done = rounds(given, files).leading_to(0.8)
    shared = inputs(given, files, 0.8, done)
    trial = actor(shared)
    before = load_checkpoint(shared.checkpoint).model.state_dict()

    def tried() -> dict[str, torch.Tensor]:
        trial.reset_config(shared.space.own_values())
        assert trial.step()["sparsity"] == pytest.approx(0.8, abs=1e-3)
        return {name: value.clone() for name, value in trial._model.state_dict().items()}

    first = tried()
    second = tried()  # an actor goes from one trial to the next, and nothing of the last one stays
    assert all(torch.equal(first[name], second[name]) for name in first)
    biases = {f"{layer.name.removesuffix('.weight')}.bias" for layer in shared.space.layers}
    assert all(not torch.equal(first[name], before[name]) for name in biases)

    search = shared.search.model_copy(update={"reconstruct": 0})
    plain = actor(replace(shared, search=search))
    plain.step()
    unsolved = plain._model.state_dict()
    assert all(torch.equal(unsolved[name], before[name]) for name in biases)
    for layer in shared.space.layers:
        assert torch.equal(unsolved[layer.name] == 0, first[layer.name] == 0)


def test_rounds__a_number_of_them_leads_to_the_lower_end_of_a_range(
    files: dict[str, str], tmp_path: Path
) -> None:
    between = {"pareto": {"between": [0.75, 0.9], "tolerance": 0.1}}
    pruning = {"methods": ["ovit"], "sparsity": 0.8, "fisher": {**FISHER, "rounds": 2}}
    given = sweep(files, tmp_path, allocation=between, pruning=pruning)
    last, facts = rounds(given, files).leading_to(0.8)
    masks = load_checkpoint(last.checkpoint).masks
    assert masks is not None
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    assert set(facts.own) == {0.8}
    space = AllocationSpace.of(
        given.recipe.allocation, given.recipe.pruning, facts.layers, facts.own[0.8], facts.pruned
    )
    losses = last.order.open(updates=False).losses
    for sparsity in (0.75, 0.9):
        allocation = space.allocation(space.own_values() | {"sparsity": sparsity}, losses)
        assert sum(allocation.values()) / masks.numel == pytest.approx(sparsity, abs=1e-3)
