"""Models cut in width: plain timm's, the same as the uncut model without those channels, and checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_tables import SWIN, VIT, VIT_ARGS, images, tiny
from torch import Tensor, nn

from pruners import MaskSet, find_layers
from pruners.elimination.gradients import Batch
from pruners.structured.channels import Channels, Member
from pruners.structured.dependency import ChannelDependencies
from trainers.checkpoint.folder import load_checkpoint
from trainers.config.structured import StructuredSettings
from trainers.models import factory
from trainers.structured import verify
from trainers.structured.cut import Plan, cut_model, plan_cut, save_cut
from trainers.structured.shapes import Shape

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit mlp": (VIT, {"mlp": 0.75}),
    "vit embed": (VIT, {"embed": 0.5}),
    "vit heads with embed": (VIT, {"embed": 0.5, "heads": 1}),
    "vit all": (VIT, {"embed": 6, "heads": 2, "mlp": 0.3}),
    "swin mlp": (SWIN, {"mlp": 0.75}),
    "swin mlp by stages": (SWIN, {"mlp": [0.5, 1.0]}),
    "swin heads": (SWIN, {"heads": [1, 2]}),
    "swin head channels": (SWIN, {"head_dim": [3, 7]}),
    "swin embed": (SWIN, {"embed": 5}),
    "swin all": (SWIN, {"embed": 0.5, "heads": 0.5, "head_dim": 3, "mlp": 0.6}),
}


def lively(architecture: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model whose weights are large enough for any of them to be heard."""
    model, arguments = tiny(architecture)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=random))
    return model, arguments


def some_batches() -> list[Batch]:
    return [(images(6), torch.tensor([0, 1, 2, 0, 1, 2]))]


def cut(architecture: str, widths: dict[str, Any], importance: str = "magnitude") -> tuple[nn.Module, Plan]:
    model, arguments = lively(architecture)
    settings = StructuredSettings.model_validate({**widths, "importance": importance})
    plan = plan_cut(model, arguments, settings)
    return cut_model(model, plan, settings, some_batches()), plan


@pytest.mark.parametrize("name", KINDS)
def test_cut__plain_timm_loads_what_was_cut(name: str, tmp_path: Path) -> None:
    made, plan = cut(*KINDS[name], importance="fisher")
    save_cut(tmp_path / "cut", made, plan, {}, sparse=False)
    plain = timm.create_model(f"local-dir:{tmp_path / 'cut'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(plain(images(4)), made(images(4)))
    assert Shape.of(plain) == plan.after != plan.before
    assert plain.pretrained_cfg["input_size"] == (3, 16, 16)
    assert plain.num_classes == 3
    costs = json.loads((tmp_path / "cut" / "pruning.json").read_text())["costs"]
    assert costs["parameters"] == sum(weight.numel() for weight in plain.parameters())
    assert costs["macs"] == plan.costs.macs < plan.dense.macs


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "fisher"])
@pytest.mark.parametrize("architecture", [VIT, SWIN])
def test_cut__the_same_channels_are_chosen_again(architecture: str, importance: str) -> None:
    item, other = (cut(architecture, {"mlp": 0.5, "embed": 0.5}, importance)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(item.parameters(), other.parameters(), strict=True))


def test_cut__hidden_units_that_went_were_the_least() -> None:
    """By hand: the uncut model with the activations of those units silenced says the same."""
    model, _ = lively(VIT)
    made, _ = cut(VIT, {"mlp": 0.5})
    for number in range(2):
        mlp: Any = model.get_submodule(f"blocks.{number}.mlp")
        rows, columns = mlp.fc1.weight.square().sum(1), mlp.fc2.weight.square().sum(0)
        worth = rows + columns + mlp.fc1.bias.square()
        heard = torch.zeros(64).index_fill_(0, worth.topk(32).indices, 1.0)
        mlp.act.register_forward_hook(lambda _, __, result, heard=heard: result * heard)
    with torch.no_grad():
        assert torch.allclose(made(images(4)), model(images(4)), atol=1e-4)


def test_cut__a_head_goes_with_its_column_of_positions() -> None:
    model, _ = lively(SWIN)
    made, _ = cut(SWIN, {"heads": [1, 2]})
    name = "layers.0.blocks.0.attn"
    attention: Any = model.get_submodule(name)
    qkv, proj = attention.qkv, attention.proj
    per_row = qkv.weight.square().sum(1) + qkv.bias.square()
    worth = per_row.reshape(3, 2, 4).sum((0, 2)) + proj.weight.square().sum(0).reshape(2, 4).sum(1)
    head = int(worth.argmax())
    column = attention.relative_position_bias_table[:, head : head + 1]
    assert torch.equal(made.get_parameter(f"{name}.relative_position_bias_table"), column)
    kept = made.get_parameter(f"{name}.proj.weight")
    assert torch.equal(kept, proj.weight[:, 4 * head : 4 * head + 4])


def test_cut__queries_make_up_for_the_scale_of_smaller_heads() -> None:
    model, _ = lively(SWIN)
    made, _ = cut(SWIN, {"head_dim": [0.25, 1.0]})
    name = "layers.0.blocks.0.attn.qkv.weight"
    before, after = (
        model.get_parameter(name).reshape(3, 2, 4, 8),
        made.get_parameter(name).reshape(3, 2, 1, 8),
    )
    for part, factor in ((0, 0.5), (1, 1.0), (2, 1.0)):  # queries, keys, values; of 4 channels 1 is left
        for head in range(2):
            near = (after[part, head] / factor - before[part, head]).abs().amax(1)
            assert float(near.min()) < 1e-6


def test_cut__a_distilled_model_with_scaled_layers(tmp_path: Path) -> None:
    arguments = {**VIT_ARGS, "init_values": 0.5}
    size = {"input_size": (3, 16, 16)}
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=3, pretrained_cfg_overlay=size, **arguments
    ).eval()
    settings = StructuredSettings(embed=0.75, mlp=0.5, importance="taylor")
    plan = plan_cut(model, arguments, settings)
    made = cut_model(model, plan, settings, some_batches())
    save_cut(tmp_path / "cut", made, plan, {}, sparse=False)
    assert load_checkpoint(str(tmp_path / "cut")).model.get_parameter("dist_token").shape == (1, 1, 12)


def test_cut__zeros_of_before_stay(tmp_path: Path) -> None:
    model, arguments = lively(VIT)
    for layer in find_layers(model):
        weight = model.get_parameter(layer.name)
        with torch.no_grad():
            weight[torch.arange(weight.numel()).reshape(weight.shape) % 3 == 0] = 0.0
    settings = StructuredSettings(mlp=0.5, importance="magnitude")
    plan = plan_cut(model, arguments, settings)
    made = cut_model(model, plan, settings, [])
    save_cut(tmp_path / "cut", made, plan, {}, sparse=True)
    masks = MaskSet.load(tmp_path / "cut" / "masks.safetensors")
    zeros = sum(int((made.get_parameter(name) == 0).sum()) for name in masks)
    assert sum(masks.pruned().values()) == zeros > 1000
    record = json.loads((tmp_path / "cut" / "pruning.json").read_text())
    assert record["sparsity"] == pytest.approx(masks.sparsity)


def test_cut__the_model_is_left_as_it_was() -> None:
    model, arguments = lively(SWIN)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = StructuredSettings(embed=0.5, importance="fisher")
    cut_model(model, plan_cut(model, arguments, settings), settings, some_batches())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


# what the library gets wrong, or a careless change would: each must be noticed


def _no_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.structured.cut._keep_scale", lambda state, plan: None)


def _stale_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-pruning leaves ``scale`` as it was: seen only where attention is not fused."""
    build = factory.build_like

    def stale(model: nn.Module, arguments: Any) -> nn.Module:
        made = build(model, arguments)
        for name, part in made.named_modules():
            if hasattr(part, "scale") and hasattr(part, "qkv"):
                part.scale = model.get_submodule(name).scale
        return made

    monkeypatch.setattr(factory, "build_like", stale)


def _merging_as_counted_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four channels of one patch in place of one channel of four patches."""
    original = ChannelDependencies.of

    def wrong(self: ChannelDependencies, layer: str) -> Channels:
        result = original(self, layer)
        members = [
            Member(item.name, item.dim, torch.arange(item.positions.numel()).reshape(item.positions.shape))
            if "downsample" in item.name and item.positions.shape[1] == 4
            else item
            for item in result.members
        ]
        return Channels(result.name, tuple(members))

    monkeypatch.setattr(ChannelDependencies, "of", wrong)


def _queries_and_keys_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other channels of the keys than of the queries."""
    original = ChannelDependencies.of

    def wrong(self: ChannelDependencies, layer: str) -> Channels:
        result = original(self, layer)
        members = []
        for item in result.members:
            positions = item.positions.clone()
            if positions.shape[1] == 3:
                positions[:, 1] = positions[:, 1].flip(0)
            members.append(Member(item.name, item.dim, positions))
        return Channels(result.name, tuple(members))

    monkeypatch.setattr(ChannelDependencies, "of", wrong)


def _norms_that_see_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that takes the channels which went for part of its mean."""
    monkeypatch.setattr(verify, "_NormOfKept", lambda norm, kept: norm)


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        (_no_scale, "vit embed", "beside the uncut model without those channels"),
        (_no_scale, "swin head channels", "beside the uncut model without those channels"),
        (_stale_scale, "vit embed", "attention computed the other way"),
        (_stale_scale, "swin head channels", "without those channels|computed the other way"),
        (_merging_as_counted_by_the_library, "swin embed", "beside the uncut model"),
        (_queries_and_keys_apart, "swin head channels", "beside the uncut model"),
        (_norms_that_see_all, "vit embed", "beside the uncut model"),
    ],
)
def test_cut__what_is_wrong_is_noticed(
    wrong: Callable[[pytest.MonkeyPatch], None], kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(*KINDS[kind])
    wrong(monkeypatch)
    with pytest.raises(RuntimeError, match=says):
        cut(*KINDS[kind])


def test_cut__another_number_of_parameters_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "trainers.structured.cut.cost_model",
        lambda model, size: type("Wrong", (), {"parameters": 7, "macs": 1}),
    )
    with pytest.raises(RuntimeError, match="parameters are left, and 7 were planned"):
        cut(VIT, {"mlp": 0.5})


def test_cut__another_model_in_the_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plan = cut(SWIN, {"mlp": 0.5})
    original = load_checkpoint

    def altered(uri: str) -> Any:
        loaded = original(uri)
        with torch.no_grad():
            loaded.model.get_parameter("norm.weight")[0] *= 1 + 1e-5
        return loaded

    monkeypatch.setattr("trainers.structured.cut.load_checkpoint", altered)
    with pytest.raises(RuntimeError, match="reloaded, timm's model differs"):
        save_cut(tmp_path / "cut", made, plan, {}, sparse=False)


def test_cut__other_weights_than_timm_takes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(state: dict[str, Tensor], plan: Plan) -> None:
        del state["norm.bias"]

    monkeypatch.setattr("trainers.structured.cut._keep_scale", lose)
    with pytest.raises(RuntimeError, match="takes other weights"):
        cut(VIT, {"mlp": 0.5})
