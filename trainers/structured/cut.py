"""Cut a model in width: choose channels, slice the weights, build the smaller model by timm, and check it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruners.elimination.gradients import Batch, gradients
from pruners.model.costs import CostModel, cost_model
from pruners.model.layers import PrunableLayer, find_layers
from pruners.model.masks import MaskSet
from pruners.structured.channels import WITH_GRADIENTS, Channels, Cut, Member, most_important, saliencies
from pruners.structured.dependency import ChannelDependencies
from trainers.checkpoint.folder import load_checkpoint, save_checkpoint
from trainers.config.structured import StructuredSettings, format_cut
from trainers.models import factory
from trainers.structured.shapes import Shape, target_shape
from trainers.structured.verify import check_cut, check_reloaded, noise


@dataclass(frozen=True)
class Plan:
    """A planned cut, which timm can build.

    Attributes:
        before: widths of the model.
        after: widths of the smaller one.
        arguments: keyword arguments with which timm builds the smaller model.
        skeleton: the smaller model on the meta device.
        dense: what the model costs.
        costs: what the smaller one costs.
    """

    before: Shape
    after: Shape
    arguments: Mapping[str, Any]
    skeleton: nn.Module
    dense: CostModel
    costs: CostModel

    @property
    def cut(self) -> dict[str, list[Any]]:
        """The cut widths: kind -> [before, after]."""
        return self.after.differences(self.before)

    def facts(self, settings: StructuredSettings) -> dict[str, Any]:
        """The entry ``structured`` of the record."""
        return {
            "cut": self.cut,
            "importance": settings.importance,
            "images": settings.images if settings.importance in WITH_GRADIENTS else 0,
            "dense_parameters": self.dense.parameters,
            "dense_macs": self.dense.macs,
        }

    def __str__(self) -> str:
        return format_cut(self.cut)


def plan_cut(model: nn.Module, arguments: Mapping[str, Any], settings: StructuredSettings) -> Plan:
    """Plan the cut that a recipe asks for.

    Args:
        model: only its shapes are needed: it may be on the meta device.
        arguments: keyword arguments with which timm built it.
        settings: the widths.

    Returns:
        The plan.

    Raises:
        InputError: an unsupported architecture, or a shape that timm cannot build.
    """
    before = Shape.of(model)
    after = target_shape(before, settings)
    built = after.arguments(arguments)
    with torch.device("meta"):
        skeleton = factory.build_like(model, built)
    size = factory.input_size(model)
    return Plan(before, after, built, skeleton, cost_model(model, size), cost_model(skeleton, size))


def cut_model(
    model: nn.Module, plan: Plan, settings: StructuredSettings, batches: Iterable[Batch]
) -> nn.Module:
    """Cut a model.

    Args:
        model: left as it is.
        plan: as :func:`plan_cut` made it.
        settings: how channels are chosen.
        batches: (images (N, 3, H, W), labels (N,)) for the gradients; not read for ``magnitude``.

    Returns:
        The smaller model, in float32 on the CPU, in eval mode.

    Raises:
        RuntimeError: timm built another model than planned; says which check failed.
    """
    channels = _Channels(model, plan)
    cut = _choose(model, channels, plan, _saliency(model, channels.parameters, settings, batches))
    dense = copy.deepcopy(model).cpu().double().eval()
    made = factory.build_like(model, plan.arguments).double().eval()
    state = cut.sliced(dense.state_dict())
    _keep_scale(state, plan)
    try:
        made.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise RuntimeError(f"structured pruning: timm's model takes other weights ({error})") from None
    check_cut(made, dense, cut, planned=plan.costs.parameters)
    return made.float()


def save_cut(folder: Path, model: nn.Module, plan: Plan, record: Mapping[str, Any], *, sparse: bool) -> None:
    """Write the smaller model as a checkpoint folder, read it back and compare.

    Args:
        folder: made if need be.
        model: as :func:`cut_model` made it.
        plan: of the cut.
        record: content of ``pruning.json``; method, sparsity, allocation and costs are added.
        sparse: the model that was cut had pruned weights, which stay zero.

    Raises:
        RuntimeError: the model that is read back differs.
    """
    masks = MaskSet.from_zeros(model, find_layers(model)) if sparse else None
    pruned = masks.pruned() if masks is not None else {}
    content = {
        "method": "structured",
        "sparsity": masks.sparsity if masks is not None else 0.0,
        "allocation": pruned,
        "costs": plan.costs.at(pruned).as_dict(),
        **record,
    }
    save_checkpoint(folder, model, model_args=plan.arguments, masks=masks, record=content)
    check_reloaded(model, load_checkpoint(str(folder)).model, planned=plan.costs.parameters)


class _Channels:
    """The groups of coupled channels that a plan cuts.

    Attributes:
        hidden: of the MLPs, by block.
        inner: of the attentions, by block.
        embed: between blocks, by stage.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        before, after = plan.before, plan.after
        graph = ChannelDependencies(copy.deepcopy(model).cpu(), noise(model))
        self.hidden: dict[str, Channels] = {}
        self.inner: dict[str, Channels] = {}
        self.embed: list[Channels] = []
        for block, stage in before.blocks():
            if before.hidden[stage] != after.hidden[stage]:
                self.hidden[block] = graph.of(f"{block}.mlp.fc1")
            if before.inner[stage] != after.inner[stage]:
                self.inner[block] = graph.of(f"{block}.attn.qkv")
        if before.embed != after.embed:
            stages = range(1, len(before.depths))
            roots = ["patch_embed.proj", *(f"layers.{stage}.downsample.reduction" for stage in stages)]
            self.embed = [graph.of(root) for root in roots]

    @property
    def parameters(self) -> list[str]:
        groups = [*self.hidden.values(), *self.inner.values(), *self.embed]
        return sorted({member.name for group in groups for member in group.members})


def _saliency(
    model: nn.Module, names: Iterable[str], settings: StructuredSettings, batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """The saliency of each weight, by parameter."""
    weights = {name: model.get_parameter(name) for name in names}
    samples: Iterator[dict[str, Tensor]] = iter(())
    if settings.importance in WITH_GRADIENTS:
        layers = [PrunableLayer(name, "", 0, tuple(weight.shape)) for name, weight in weights.items()]
        samples = gradients(model, layers, {}, batches, functional.cross_entropy)
    return saliencies(settings.importance, weights, samples)


def _choose(model: nn.Module, channels: _Channels, plan: Plan, saliency: Mapping[str, Tensor]) -> Cut:
    """Choose the channels that stay, all by their saliency in the uncut model."""
    cut = Cut({name: weight.shape for name, weight in model.named_parameters()})
    for block, stage in plan.before.blocks():
        if block in channels.hidden:
            hidden = channels.hidden[block]
            cut.drop(hidden, most_important(hidden.importance(saliency), plan.after.hidden[stage]))
        if block in channels.inner:
            _cut_attention(cut, (block, stage), channels.inner[block], plan, saliency)
    for group, width in zip(channels.embed, plan.after.widths, strict=False):
        cut.drop(group, most_important(group.importance(saliency), width))
    return cut


def _cut_attention(
    cut: Cut, position: tuple[str, int], inner: Channels, plan: Plan, saliency: Mapping[str, Tensor]
) -> None:
    """Keep the most salient heads, and in each of them the most salient query-key pairs and values."""
    (block, stage), before, after = position, plan.before, plan.after
    heads, dim = before.heads[stage], before.head_dim[stage]
    stay = most_important(inner.importance(saliency).reshape(heads, dim).sum(1), after.heads[stage])
    # queries meet keys, and values the projection: the two have nothing else in common
    first = [member for member in inner.members if member.positions.shape[1] == 3]
    query_key = [Member(member.name, member.dim, member.positions[:, :2]) for member in first]
    values = [Member(member.name, member.dim, member.positions[:, 2:]) for member in first]
    values += [member for member in inner.members if member.positions.shape[1] == 1]
    assert len(first) + 1 <= len(inner.members), "the projection takes what the values give"
    for members in (query_key, values):
        group = Channels(block, tuple(members))
        kept = most_important(group.importance(saliency), after.head_dim[stage], groups=heads)
        cut.drop(group, kept & stay.repeat_interleave(dim))
    if before.family == "swin":
        table = Member(f"{block}.attn.relative_position_bias_table", 1, torch.arange(heads).unsqueeze(1))
        cut.drop(Channels(block, (table,)), stay)


def _keep_scale(state: dict[str, Tensor], plan: Plan) -> None:
    """Rescale the queries: timm divides attention by the root of a head's channels, which are fewer now."""
    for block, stage in plan.before.blocks():
        factor = math.sqrt(plan.after.head_dim[stage] / plan.before.head_dim[stage])
        queries = plan.after.inner[stage]
        for part in ("weight", "bias"):
            name = f"{block}.attn.qkv.{part}"
            if factor != 1 and name in state:
                state[name] = state[name].clone()
                state[name][:queries] *= factor
