"""Mask sets: what they do to a model, and the file of one bit a weight."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import quick, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pruners import InputError, MaskSet, find_layers

shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)


@st.composite
def mask_sets(draw: st.DrawFn) -> MaskSet:
    """Masks of odd shapes, empty ones too, under odd names."""
    names = draw(st.lists(st.text("ab.0é/", min_size=1, max_size=6), max_size=4, unique=True))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return MaskSet({name: torch.rand(draw(shapes), generator=random) < share for name in names})


def same(masks: MaskSet, other: MaskSet) -> bool:
    return set(masks) == set(other) and all(torch.equal(masks[name], other[name]) for name in masks)


def example() -> MaskSet:
    random = torch.Generator().manual_seed(0)
    return MaskSet({name: torch.rand(9, 11, generator=random) < 0.5 for name in ("a.weight", "b.weight")})


@given(masks=mask_sets())
@quick(60)
def test_masks__a_saved_file_reads_back_the_same(
    masks: MaskSet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    masks.save(path)
    loaded = MaskSet.load(path)
    assert same(loaded, masks)
    assert all(mask.dtype == torch.bool for mask in loaded.values())
    assert loaded.fingerprint() == masks.fingerprint()
    assert loaded.pruned() == masks.pruned()


def test_masks__the_file_holds_one_bit_a_weight(tmp_path: Path) -> None:
    MaskSet({"a.weight": torch.ones(1000, 1001, dtype=torch.bool)}).save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < 1000 * 1001 / 8 + 1000


@given(cut=st.integers(0, 10**6))
@quick(60)
def test_masks__a_truncated_file_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    example().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(InputError, match=r"masks\.safetensors"):
        MaskSet.load(path)


def foreign(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def ours(**shapes: object) -> dict[str, str]:
    return {"espalier-masks-2": json.dumps(shapes)}


BITS = torch.tensor([255], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a": torch.ones(3)}, None),  # any checkpoint
        ({"a": BITS}, {"a": "8"}),  # no format
        ({"a": BITS}, {"espalier-masks-3": '{"a": [8]}'}),  # a later format
        ({"a": BITS}, {"espalier-masks-2": "8"}),
        ({"a": BITS}, ours()),  # no shape
        ({"a": BITS}, ours(a=[8], b=[8])),  # a layer without bits
        ({"a": BITS}, ours(a=[8, "x"])),  # a shape of no numbers
        ({"a": BITS}, ours(a=8)),
        ({"a": BITS}, ours(a=[])),
        ({"a": BITS}, ours(a=[9])),  # fewer bits than weights
        ({"a": BITS}, ours(a=[-8])),
        ({"a": BITS}, ours(a=[0])),  # more bits than weights
        ({"a": torch.ones(1)}, ours(a=[8])),  # no bits
    ],
)
def test_masks__a_foreign_file_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    with pytest.raises(InputError, match="mask file"):
        MaskSet.load(foreign(tmp_path / "m", tensors, metadata))


def test_masks__what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a mask file, but long enough to hold a header length")
    for path in (tmp_path / "text", tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="masks"):
            MaskSet.load(path)


@given(masks=mask_sets(), other=mask_sets())
@quick(150)
def test_masks__fingerprints_are_equal_iff_the_masks_are(masks: MaskSet, other: MaskSet) -> None:
    assert (masks.fingerprint() == other.fingerprint()) == same(masks, other)
    backwards = MaskSet({name: masks[name].clone() for name in reversed(list(masks))})
    assert backwards.fingerprint() == masks.fingerprint()


def test_masks__fingerprints_tell_bits_shapes_and_names_apart() -> None:
    bits = torch.tensor([True, False, True, False, False, False])
    flipped = bits.clone()
    flipped[5] = True
    sets = [
        MaskSet({"a": bits}),
        MaskSet({"a": flipped}),
        MaskSet({"b": bits}),
        MaskSet({"a": bits.reshape(2, 3)}),
        MaskSet({"a": bits.reshape(3, 2)}),
        MaskSet({"a": bits[:5]}),  # packs to the same byte
        MaskSet({"a": bits, "b": bits}),
        MaskSet({}),
    ]
    assert len({masks.fingerprint() for masks in sets}) == len(sets)


def test_masks__counts() -> None:
    masks = MaskSet({"a": torch.tensor([[True, False], [False, False]]), "b": torch.ones(4).bool()})
    assert masks.pruned() == {"a": 3, "b": 0}
    assert masks.numel == 8
    assert masks.sparsity == pytest.approx(3 / 8)
    assert MaskSet({}).sparsity == 0.0


def test_masks__dense_and_zeros_of_a_model() -> None:
    model = tiny_vit()
    layers = find_layers(model)
    assert MaskSet.dense(model, layers).sparsity == 0.0
    weight = dict(model.named_parameters())[layers[1].name]
    with torch.no_grad():
        weight[0, :3] = torch.tensor([0.0, -0.0, 1e-45])  # a denormal number is no zero
    assert MaskSet.from_zeros(model, layers).pruned() == {
        layer.name: 2 if layer is layers[1] else 0 for layer in layers
    }


def test_masks__masks_are_applied_in_place_and_elsewhere_nothing_changes() -> None:
    model = tiny_vit()
    layers = find_layers(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.Generator().manual_seed(0)
    masks = MaskSet({layer.name: torch.rand(layer.shape, generator=random) < 0.5 for layer in layers})
    with torch.no_grad():
        masks.mask_(dict(model.named_parameters()))
    for name, tensor in model.state_dict().items():
        expected = torch.where(masks[name], before[name], 0.0) if name in masks else before[name]
        assert torch.equal(tensor, expected)
    assert math.prod(layers[0].shape) == masks[layers[0].name].numel()


def test_masks__other_tensors_of_the_same_names_are_masked() -> None:
    masks = MaskSet({"a": torch.tensor([True, False]), "b": torch.tensor([False])})
    moments = {"a": torch.tensor([2.0, torch.nan]), "c": torch.tensor([3.0])}
    masks.mask_(moments)
    assert moments["a"].tolist() == [2.0, 0.0]
    assert moments["c"].tolist() == [3.0]
