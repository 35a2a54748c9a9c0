"""Orders in files: what is written reads back; what is not ours, broken, or of something else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import PRUNERS, batches, quick, tiny_conv
from hypothesis import given
from hypothesis import strategies as st
from orders import assert_close_updates, assert_same, ordered
from patterns import layers_of
from safetensors.torch import save_file

from pruners import EliminationOrder, InputError, allocate, fingerprint, prune
from pruners.allocation.projection import budget
from pruners.elimination.order import ORDER, UPDATES

every_method = pytest.mark.parametrize("method", PRUNERS)


@every_method
def test_order_files__two_files_read_back_the_same(method: str, tmp_path: Path) -> None:
    known = ordered(method)
    known.order.save(tmp_path / "new" / "folder", "abc")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [ORDER, UPDATES]
    stored = EliminationOrder.load(tmp_path / "new" / "folder", "abc")
    assert_same(known.order, stored)
    allocation = allocate(known.order.losses, known.layers, budget(known.layers, 0.7), "global")
    assert allocate(stored.losses, known.layers, budget(known.layers, 0.7), "global") == allocation
    new, masks = known.order.weights_at(known.weights, allocation)
    again, masks_again = stored.weights_at(known.weights, allocation)
    assert masks.fingerprint() == masks_again.fingerprint()
    assert_close_updates(new, again, known.weights)
    stored.save(tmp_path / "again", "abc")
    assert_same(stored, EliminationOrder.load(tmp_path / "again", "abc"))


@every_method
def test_order_files__without_the_updates_there_are_the_masks(method: str, tmp_path: Path) -> None:
    known = ordered(method)
    known.order.save(tmp_path, "abc")
    (tmp_path / UPDATES).unlink()
    stored = EliminationOrder.load(tmp_path, "abc", updates=False)
    assert_same(known.order, stored, updates=False)
    allocation = allocate(stored.losses, known.layers, budget(known.layers, 0.8), "module")
    assert allocation == allocate(known.order.losses, known.layers, budget(known.layers, 0.8), "module")
    for name, order in stored.items():
        count = allocation[name]
        shape = known.weights[name].shape
        assert torch.equal(order.mask(shape, count), known.order[name].mask(shape, count))
    with pytest.raises(InputError, match=rf"order = .*{UPDATES}.*readable"):
        EliminationOrder.load(tmp_path, "abc")


@every_method
def test_order_files__the_first_file_holds_two_numbers_a_weight(method: str, tmp_path: Path) -> None:
    known = ordered(method)
    known.order.save(tmp_path, "abc")
    numel = sum(layer.numel for layer in known.layers)
    loss = next(iter(known.order.values())).losses.element_size()
    numbers = 4 + loss + (8 if method == "dimap+ovit" else 0)  # a place, a loss; prices of its own
    size = (tmp_path / ORDER).stat().st_size
    assert numbers * numel <= size < numbers * numel + 600 * len(known.layers)
    if known.fisher is None:
        assert (tmp_path / UPDATES).stat().st_size < 200


@pytest.mark.parametrize("pattern", ["2:4", "1x4"])
@pytest.mark.parametrize("method", ["dimap", "ovit", "woodfisher"])
def test_order_files__a_pattern_reads_back(method: str, pattern: str, tmp_path: Path) -> None:
    model = tiny_conv()
    weights = {layer.name: model.get_parameter(layer.name).detach().clone() for layer in layers_of(model)}
    report = prune(model, method, 0.5, batches=batches(3), layers=layers_of(model), pattern=pattern)
    report.order.save(tmp_path, "abc")
    stored = EliminationOrder.load(tmp_path, "abc")
    assert_same(report.order, stored)
    new, masks = stored.weights_at(weights, report.allocation)
    assert masks.fingerprint() == report.masks.fingerprint()
    pruned = {name: model.get_parameter(name).detach() for name in new}
    assert_close_updates(new, pruned, weights)


def test_order_files__one_of_something_else_is_refused(tmp_path: Path) -> None:
    ordered("ovit").order.save(tmp_path, "abc")
    for updates in (True, False):
        with pytest.raises(InputError, match=rf"order = .*{ORDER}.*belongs to another model, other data or"):
            EliminationOrder.load(tmp_path, "abd", updates=updates)
    other = tmp_path / "other"
    ordered("ovit").order.save(other, "abd")
    (other / UPDATES).replace(tmp_path / UPDATES)  # one file of each
    with pytest.raises(InputError, match=rf"{UPDATES}.*belongs to another model"):
        EliminationOrder.load(tmp_path, "abc")


@given(cut=st.integers(0, 10**9), name=st.sampled_from([ORDER, UPDATES]))
@quick(40)
def test_order_files__a_truncated_file_is_refused(
    cut: int, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("order")
    ordered("ovit-blocks-of-7").order.save(folder, "abc")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: cut % len(whole)])
    with pytest.raises(InputError, match=rf"order = .*{name}"):
        EliminationOrder.load(folder, "abc")


def test_order_files__what_is_not_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ORDER
    for content in (b"", b"not an order, but long enough to hold a header's length"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"order = .*{ORDER}.*must be a readable order"):
            EliminationOrder.load(tmp_path, "abc")
    for metadata in (None, {"fingerprint": "abc"}, {"format": "espalier-order-0", "fingerprint": "abc"}):
        save_file({"a.weight": torch.ones(3)}, path, metadata)
        with pytest.raises(InputError, match="must be an elimination order written by espalier"):
            EliminationOrder.load(tmp_path, "abc")
    path.unlink()
    path.mkdir()
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="must be a readable order"):
            EliminationOrder.load(folder, "abc")


def test_order_files__a_fingerprint_follows_every_bit_and_every_setting() -> None:
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    settings = {"method": "ovit", "damp": 1e-8, "data": ["x", 1]}
    first = fingerprint(weights, settings)
    assert first == fingerprint(dict(reversed(weights.items())), json.loads(json.dumps(settings)))
    assert first == fingerprint(weights, dict(reversed(settings.items())))
    bit = torch.nextafter(torch.tensor(2.0), torch.tensor(3.0))
    others = [
        ({"a": torch.stack([torch.tensor(1.0), bit]), "b": weights["b"]}, settings),
        ({"a": weights["a"], "c": weights["b"]}, settings),
        ({"a": weights["a"]}, settings),
        (weights, {**settings, "damp": 1e-7}),
        (weights, {**settings, "seed": 0}),
    ]
    assert len({first, *(fingerprint(*other) for other in others)}) == len(others) + 1
