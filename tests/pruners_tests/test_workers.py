"""Pruning steps on two and on four workers, by real collectives, against the same steps in one process."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_swin
from safetensors.torch import load_file
from torch import Tensor
from worker_cases import CASES, OVIT, work
from workers import start_workers

from pruners import METHODS, find_layers
from pruners.elimination.fisher import BlockFisher
from pruners.elimination.memory import layer_groups

Results = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def alone() -> Results:
    return {name: case.run(0, 1) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def on_workers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Results]]:
    """What each worker of two ended with, and each of four."""
    folder = tmp_path_factory.mktemp("workers")
    by_world: dict[int, list[Results]] = {}
    for world in (2, 4):
        start_workers(work, (world, str(folder)), world)
        by_world[world] = []
        for rank in range(world):
            results: Results = {name: {} for name in CASES}
            for key, value in load_file(folder / f"{world}-{rank}.safetensors").items():
                case, name = key.split("|")
                results[case][name] = value
            by_world[world].append(results)
    return by_world


def test_workers__the_cases_are_of_all_methods_and_of_several_groups() -> None:
    assert set(METHODS) <= set(CASES)
    layers = find_layers(tiny_swin())
    fisher = BlockFisher(layers, block_size=16)
    sizes = {layer.name: fisher.block_size(layer.name) for layer in layers}
    memory = CASES["several passes"].memory
    assert memory is not None
    assert len(layer_groups(layers, sizes, memory)) > 1
    assert OVIT.block_size == 16


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_workers__workers_end_with_one_processs_masks_and_nearly_its_weights(
    name: str, world: int, alone: Results, on_workers: dict[int, list[Results]]
) -> None:
    expected, (first, *others) = alone[name], [results[name] for results in on_workers[world]]
    assert set(first) == set(expected)
    for key, value in first.items():
        for other in others:
            assert torch.equal(value, other[key]), f"{key} differs between the workers"
        if key.startswith(("m:", "chosen:")):
            assert torch.equal(value, expected[key]), f"{key} differs from one process"
        else:
            # solving for the weights amplifies what sums in another order round differently
            rtol, atol = (1e-3, 1e-5) if CASES[name].reconstruct else (1e-4, 1e-6)
            torch.testing.assert_close(value, expected[key], rtol=rtol, atol=atol)
    masks = {key: value for key, value in first.items() if key.startswith("m:")}
    numel = sum(mask.numel() for mask in masks.values())
    wanted = round(CASES[name].steps[-1] * numel / 4) * 4
    assert sum(int((~mask).sum()) for mask in masks.values()) == wanted
    for key, mask in masks.items():
        assert not first[f"w:{key[2:]}"][~mask].any()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.auto])
def test_workers__all_choose_the_same_damp_by_the_whole_curve(
    name: str, world: int, alone: Results, on_workers: dict[int, list[Results]]
) -> None:
    results = [alone] if world == 1 else on_workers[world]
    for result in results:
        for step in range(len(CASES[name].steps)):
            curve = result[name][f"damp:{step}"]
            ladder = [10.0**-power for power in range(4, 10)]
            assert len(curve) == len(ladder)
            failed = [damp for damp, loss in zip(ladder, curve.tolist(), strict=True) if loss == torch.inf]
            assert failed == pytest.approx([1e-6] if "fails" in name else [])
            chosen = float(result[name][f"chosen:{step}"])
            assert chosen == pytest.approx(ladder[int(curve.argmin())])
            assert len(set(curve.tolist())) > 3
