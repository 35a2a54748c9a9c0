"""One pruning step on two workers, by real collectives, against the same step in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import batches, tiny_swin
from safetensors.torch import load_file, save_file

from pruners import MaskSet, create_pruner, find_layers
from pruners.layers import PrunableLayer
from trainers.prune_step import Share, owners, prune_step

METHODS: dict[str, dict[str, Any]] = {
    "dimap": {},
    "magnitude": {},
    "ovit": {"block_size": 16, "damp": 1e-4},
}
SCOPES = ("module", "global")
STEPS = (0.4, 0.7)


def pruned(rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights (``w:``) and masks (``m:``) of each method and scope after two steps."""
    found = {}
    for method, options in METHODS.items():
        for scope in SCOPES:
            model = tiny_swin()
            layers = find_layers(model)
            pruner = create_pruner(method, **options)
            masks = MaskSet.dense(model, layers)
            numel = sum(layer.numel for layer in layers)
            for sparsity in STEPS:
                share = Share(scope, 0.1, 0.95)  # type: ignore[arg-type]
                mine = iter(batches(6)[rank::world])
                total = round(sparsity * numel)
                masks = prune_step(model, layers, masks, pruner, mine, total=total, target=share)
            weights = {f"w:{name}": value.clone() for name, value in model.state_dict().items()}
            found[f"{method}/{scope}"] = weights | {f"m:{name}": mask for name, mask in masks.items()}
    return found


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        flat = {
            f"{case}|{name}": x for case, named in pruned(rank, world).items() for name, x in named.items()
        }
        save_file(flat, f"{folder}/{rank}.safetensors")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """One process alone, then the two workers."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, args=(2, str(folder)), nprocs=2)
    found = [pruned(0, 1)]
    for rank in range(2):
        cases: dict[str, dict[str, torch.Tensor]] = {case: {} for case in found[0]}
        for place, value in load_file(folder / f"{rank}.safetensors").items():
            case, name = place.split("|")
            cases[case][name] = value
        found.append(cases)
    return found


@pytest.mark.parametrize("case", [f"{method}/{scope}" for method in METHODS for scope in SCOPES])
def test_workers_and_one_process_agree(case: str, results: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    alone, first, second = (result[case] for result in results)
    assert set(alone) == set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between the workers"
        if name.startswith("m:"):
            assert torch.equal(value, alone[name]), f"{name} differs from one process"
        else:
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)
    masks = {name: value for name, value in first.items() if name.startswith("m:")}
    numel = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(STEPS[-1] * numel)
    for name, mask in masks.items():
        assert not first[f"w:{name[2:]}"][~mask].any()


def test_a_given_allocation_is_met_to_the_weight() -> None:
    model = tiny_swin()
    layers = find_layers(model)
    target = {layer.name: number * 7 for number, layer in enumerate(layers)}
    masks = MaskSet.dense(model, layers)
    total = sum(target.values())
    pruner = create_pruner("ovit", block_size=16, damp=1e-4)
    found = prune_step(model, layers, masks, pruner, batches(2), total=total, target=target)
    assert found.pruned() == target
    weights = dict(model.named_parameters())
    assert {name: int((weights[name] == 0).sum()) for name in target} == target


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_layers_are_shared_out_evenly(world: int) -> None:
    sizes = (900, 500, 400, 300, 100, 100, 50)
    layers = [PrunableLayer(f"{i}.weight", "MLP", 0, (size, 1)) for i, size in enumerate(sizes)]
    owner = owners(layers, world)
    assert set(owner) == {layer.name for layer in layers}
    load = [sum(layer.numel for layer in layers if owner[layer.name] == rank) for rank in range(world)]
    assert max(load) - min(load) <= max(sizes)
    assert owner == owners(layers[::-1], world)


def test_workers_that_disagree_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.distributed.agree", lambda text: False)
    model = tiny_swin()
    layers = find_layers(model)
    masks = MaskSet.dense(model, layers)
    with pytest.raises(RuntimeError, match="different masks"):
        prune_step(
            model,
            layers,
            masks,
            create_pruner("dimap"),
            [],
            total=100,
            target=Share("global", 0.0, 1.0),
        )
