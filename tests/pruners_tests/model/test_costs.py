"""Parameters and multiply-accumulates: by hand for small models, by fvcore, the paper's columns for Swin."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from helpers import tiny_vit
from torch import Tensor, nn

from pruners import count_costs, find_layers
from pruners.allocation.projection import budget, project
from pruners.model.costs import cost_model


def test_costs__linear_and_convolution_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    costs = count_costs(model, (3, 4, 4), {"0.weight": 54, "2.weight": 128})
    assert costs.parameters == (3 * 8 * 9 + 8) + (128 * 5 + 5)
    assert costs.parameters_sparse == costs.parameters - 54 - 128
    convolution, linear = 16 * 3 * 8 * 9, 128 * 5
    assert costs.macs == convolution + linear
    assert costs.macs_sparse == convolution * 3 // 4 + linear * 4 // 5
    assert next(model.parameters()).device.type == "cpu"  # the model itself is left alone
    assert costs.as_dict() == {
        "parameters": costs.parameters,
        "parameters_sparse": costs.parameters_sparse,
        "macs": costs.macs,
        "macs_sparse": costs.macs_sparse,
    }


def test_costs__vit_by_hand_with_the_attention_products() -> None:
    model = tiny_vit()
    width, depth, tokens, classes = 8, 4, 17, 5
    block = tokens * 12 * width**2 + 2 * tokens**2 * width  # qkv, proj and MLP; q·k and attention·v
    patches = 16 * 3 * 64 * width
    costs = count_costs(model, (3, 32, 32), {})
    assert costs.macs == depth * block + patches + width * classes
    assert costs.macs_sparse == costs.macs
    everything = {layer.name: layer.numel for layer in find_layers(model)}
    costs = count_costs(model, (3, 32, 32), everything)
    assert costs.macs - costs.macs_sparse == depth * tokens * 12 * width**2
    assert costs.parameters - costs.parameters_sparse == depth * 12 * width**2


@pytest.mark.parametrize("training", [True, False])
def test_costs__the_mode_of_the_model_is_kept(training: bool) -> None:
    model = tiny_vit().train(training)
    count_costs(model, (3, 32, 32), {})
    assert model.training is training


class Attentive(nn.Module):
    """An attention of torch's own on 16 tokens of 8, and twice its width with keys and values of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.same = nn.MultiheadAttention(8, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.backends.mha.get_fastpath_enabled()
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = self.same(x, x, x, need_weights=False)[0]
        x = self.apart(x, x[..., :4], x[..., :4])[0]
        output: Tensor = self.layer(x)
        return output


@pytest.mark.parametrize("fast", [True, False])
def test_costs__the_attention_of_torch_by_hand(fast: bool) -> None:
    tokens, width = 16, 8
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        costs = cost_model(Attentive().eval(), (3, 32, 32))
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    expected = {
        "patches.weight": tokens * 3 * 64 * width,
        "same.in_proj_weight": tokens * 3 * width**2,
        "same.out_proj.weight": tokens * width**2,
        "apart.q_proj_weight": tokens * width**2,
        "apart.k_proj_weight": tokens * 4 * width,
        "apart.v_proj_weight": tokens * 4 * width,
        "apart.out_proj.weight": tokens * width**2,
        "layer.self_attn.in_proj_weight": tokens * 3 * width**2,
        "layer.self_attn.out_proj.weight": tokens * width**2,
        "layer.linear1.weight": tokens * width * 24,
        "layer.linear2.weight": tokens * width * 24,
    }
    assert {name: macs for name, macs in costs.weight_macs.items() if macs} == expected
    assert costs.macs == sum(expected.values()) + 3 * 2 * tokens**2 * width


class Functional(nn.Module):
    """Weights that no module multiplies by: in parts, another shape, copied, twice, and one that is added."""

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight) + self.bias

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Parameter(torch.randn(12, 4))
        self.shaped = nn.Parameter(torch.randn(2, 2, 12))
        self.copied = nn.Parameter(torch.randn(12, 4))
        self.scaled = self.Scaled(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.scaled.weight
        self.added = nn.Parameter(torch.randn(6, 4))

    def forward(self, images: Tensor) -> Tensor:
        x = images[0, 0]  # 6 rows of 4
        first, second = self.parts.chunk(2)
        x = torch.cat([x @ first.T, torch.einsum("nd,kd->nk", x, second)], 1)  # 6 × 12
        x = x @ self.shaped.reshape(4, 12).T
        x = x @ self.copied.T.contiguous().double().float()  # 6 × 12
        return torch.addmm(self.added, self.tied(self.scaled(x[:, :4])), x[:4, :4])


def test_costs__a_product_counts_for_the_weight_in_it_however_it_is_called() -> None:
    costs = cost_model(Functional(), (1, 6, 4))
    expected = {
        "parts": 6 * 4 * 12,
        "shaped": 6 * 12 * 4,
        "copied": 6 * 4 * 12,
        "scaled.weight": 2 * 6 * 4 * 4,
        "scaled.bias": 0,
        "added": 0,
    }
    assert costs.weight_macs == expected
    assert costs.macs == sum(expected.values()) + 6 * 4 * 4
    assert costs.parameters == 3 * 48 + 16 + 4 + 24  # a tied weight is one


# What fvcore counts beside products, an operation or a few for an element: no prunable weight has a share in
# it, and in EfficientNet's small layers it is 3 %.
NOT_PRODUCTS = ("batch_norm", "layer_norm", "group_norm", "adaptive_avg_pool2d", "upsample_bilinear2d")


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "xcit_nano_12_p16_224",
        "efficientformer_l1",
        "efficientformerv2_s0",
        "convnext_atto",
        "convnextv2_atto",
        "resnet50d",
        "efficientnet_b0",
    ],
)
def test_costs__dense_figures_agree_with_fvcore(name: str, caplog: pytest.LogCaptureFixture) -> None:
    fused = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)  # fvcore knows no scaled_dot_product_attention: it would count nothing
    try:
        model = timm.create_model(name).eval()
    finally:
        timm.layers.set_fused_attn(fused)
    size = model.default_cfg["input_size"]
    costs = cost_model(model, size)
    with caplog.at_level(logging.ERROR):
        # a handle of None, meant to switch one off, leaves fvcore's own where it is
        nothing = {f"aten::{operation}": lambda inputs, outputs: Counter() for operation in NOT_PRODUCTS}
        other = FlopCountAnalysis(model, torch.zeros(1, *size)).set_op_handle(**nothing)
        assert costs.macs == pytest.approx(other.total(), rel=0.02)
        counts = other.by_module_and_operator()
    for layer in find_layers(model):
        module = layer.name.removesuffix(".weight")
        expected = sum(counts[module].values())
        if not expected:  # SwinV2's qkv is used by its attention as a function
            attention = module.rpartition(".")[0]
            parts = [f"{attention}.{part}" for part, _ in model.get_submodule(attention).named_children()]
            expected = counts[attention]["linear"] - sum(counts[part]["linear"] for part in parts)
        assert costs.weight_macs[layer.name] == expected > 0


# METHODS: dense parameters (M), MACs (G); parameters, MACs removed (%) at 15, 35 and 55 % of the modules
PAPER = {
    "swin_tiny_patch4_window7_224": (28.3, 4.5, (13.7, 32.0, 50.3), (13.9, 32.4, 50.8)),
    "swin_small_patch4_window7_224": (49.6, 8.7, (14.2, 33.2, 52.2), (14.3, 33.2, 52.3)),
    "swin_base_patch4_window7_224": (87.8, 15.4, (14.3, 33.4, 52.5), (14.4, 33.5, 52.7)),
}


@pytest.mark.parametrize("name", PAPER)
def test_costs__the_columns_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters, macs, parameters_removed, macs_removed = PAPER[name]
    layers = find_layers(model)
    model_costs = cost_model(model, (3, 224, 224))
    assert model_costs.parameters / 1e6 == pytest.approx(parameters, abs=0.05)
    assert model_costs.macs / 1e9 == pytest.approx(macs, abs=0.05)
    columns = zip((0.15, 0.35, 0.55), parameters_removed, macs_removed, strict=True)
    for ratio, expected_parameters, expected_macs in columns:
        # Every layer at the same ratio. The paper's trained weights may share it out a little otherwise; MACs
        # without the attention products in the dense count would be off by up to 1.8 points.
        sizes = [layer.numel for layer in layers]
        counts = project([ratio] * len(sizes), sizes, budget(layers, ratio))
        costs = model_costs.at({layer.name: count for layer, count in zip(layers, counts, strict=True)})
        removed = 100 * (1 - costs.parameters_sparse / costs.parameters)
        assert removed == pytest.approx(expected_parameters, abs=0.3)
        assert 100 * (1 - costs.macs_sparse / costs.macs) == pytest.approx(expected_macs, abs=0.3)
        assert costs.parameters - costs.parameters_sparse == budget(layers, ratio)
