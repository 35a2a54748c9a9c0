"""Kernels of the sparse engine against torch, over shapes, sparsities, token counts and what is not
finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_tiles import LANES, Array, attention, int8_linear, layer_norm, linear
from torch import from_numpy as tensor
from torch.nn import functional

from trainers.sparse import layout, weights
from trainers.sparse.kernels import host

SIZES = st.integers(1, 70)
TOKENS = st.integers(1, 5 * LANES)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matrix(seed: int, outputs: int, inputs: int, sparsity: float) -> Array:
    weight = normal(seed, outputs, inputs)
    weight[np.random.default_rng(seed + 1).random(weight.shape) < sparsity] = 0
    return weight


def close(result: Array, expected: torch.Tensor) -> None:
    scale = max(float(expected.abs().max()), 1e-3)
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-4, atol=1e-5 * scale)


@settings(max_examples=120, deadline=None)
@given(
    outputs=SIZES,
    inputs=SIZES,
    tokens=TOKENS,
    sparsity=st.sampled_from([0.0, 0.3, 0.75, 0.9, 0.98, 1.0]),
    sparse=st.booleans(),
    gelu=st.booleans(),
    residual=st.booleans(),
    widest=st.integers(2, 4),
    panel=st.sampled_from([None, 1, 7, 32]),
    seed=st.integers(0, 1000),
)
def test_linear__a_layer_is_torchs(
    *,
    outputs: int,
    inputs: int,
    tokens: int,
    sparsity: float,
    sparse: bool,
    gelu: bool,
    residual: bool,
    widest: int,
    panel: int | None,
    seed: int,
) -> None:
    x, bias, before = (
        normal(seed, tokens, inputs),
        normal(seed + 2, outputs),
        normal(seed + 3, tokens, outputs),
    )
    weight = matrix(seed, outputs, inputs, sparsity)
    result = linear(
        x,
        weight,
        bias,
        sparse=sparse,
        gelu=gelu,
        residual=before if residual else None,
        widest=widest,
        panel=panel,
    )
    expected = functional.linear(tensor(x), tensor(weight), tensor(bias))
    expected = expected + tensor(before) if residual else expected
    close(result, functional.gelu(expected) if gelu else expected)


def test_linear__empty_rows_and_columns() -> None:
    weight, x, bias = matrix(0, 40, 300, 0.9), normal(1, 30, 300), normal(2, 40)
    weight[[0, 7, 39]] = 0  # outputs that are their bias
    weight[:, 100:250] = 0  # panels without any nonzero
    for panel in (50, 300, 1000):
        result = linear(x, weight, bias, sparse=True, panel=panel)
        close(result, functional.linear(tensor(x), tensor(weight), tensor(bias)))
        np.testing.assert_array_equal(result[:, 7], np.full(30, bias[7]))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_linear__what_is_not_finite_reaches_the_outputs_that_read_it_and_its_token_alone(
    wrong: float,
) -> None:
    weight, x, bias = matrix(0, 24, 50, 0.6), normal(1, 40, 50), normal(2, 24)
    expected = functional.linear(tensor(x), tensor(weight), tensor(bias)).numpy()
    x[5, 20] = wrong
    reads = weight[:, 20] != 0
    result = linear(x, weight, bias, sparse=True)
    assert 0 < reads.sum() < len(reads)
    assert not np.isfinite(result[5, reads]).any()
    np.testing.assert_allclose(result[5, ~reads], expected[5, ~reads], rtol=1e-4, atol=1e-5)
    others = np.arange(40) != 5
    np.testing.assert_allclose(result[others], expected[others], rtol=1e-4, atol=1e-5)
    dense = linear(x, weight, bias, sparse=False)
    np.testing.assert_array_equal(
        np.isnan(dense), np.isnan(functional.linear(tensor(x), tensor(weight), tensor(bias)).numpy())
    )


def test_gelu__is_exact_and_keeps_nan() -> None:
    x = np.linspace(-9, 9, 4001, dtype=np.float32)[:, None].copy()
    x[0], x[-1] = math.nan, 1e30
    weight, bias = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    result = linear(x, weight, bias, sparse=True, gelu=True)[:, 0]
    exact = [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x[1:, 0].tolist()]
    assert math.isnan(result[0])
    np.testing.assert_allclose(result[1:], exact, rtol=2e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(features=SIZES, tokens=TOKENS, seed=st.integers(0, 1000), shift=st.sampled_from([0.0, 100.0]))
def test_layer_norm__is_torchs(features: int, tokens: int, seed: int, shift: float) -> None:
    x = normal(seed, tokens, features) * 3 + np.float32(shift)
    scale, offset = normal(seed + 1, features), normal(seed + 2, features)
    expected = functional.layer_norm(tensor(x), (features,), tensor(scale), tensor(offset), 1e-6)
    np.testing.assert_allclose(layer_norm(x, scale, offset, 1e-6), expected.numpy(), rtol=1e-3, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 5, 8, 16, 33]),
    tokens=TOKENS,
    seed=st.integers(0, 1000),
    strength=st.sampled_from([0.1, 1.0, 20.0]),
    widest=st.integers(2, 4),
)
def test_attention__is_torchs(
    *, heads: int, size: int, tokens: int, seed: int, strength: float, widest: int
) -> None:
    qkv = normal(seed, tokens, 3 * heads * size)
    qkv[:, : heads * size] *= np.float32(strength)
    query, key, value = tensor(qkv).double().reshape(tokens, 3, heads, size).permute(1, 2, 0, 3)
    scores = (query @ key.transpose(1, 2) * size**-0.5).softmax(dim=-1)
    expected = (scores @ value).transpose(0, 1).reshape(tokens, heads * size).float()
    np.testing.assert_allclose(
        attention(qkv, heads, size**-0.5, widest), expected.numpy(), rtol=1e-4, atol=1e-4
    )


def test_attention__a_query_that_is_nan_spoils_its_own_answer_alone() -> None:
    qkv = normal(0, 40, 3 * 16)
    right = attention(qkv, 2, 0.35)
    qkv[3, 0] = math.nan
    result = attention(qkv, 2, 0.35)
    assert np.isnan(result[3, :8]).all()
    result[3, :8] = right[3, :8]
    np.testing.assert_allclose(result, right, rtol=1e-6)


@given(vectors=st.integers(1, 200), widest=st.integers(1, 8))
def test_layout__tiles_cover_the_vectors_evenly(vectors: int, widest: int) -> None:
    widths = layout.tile_widths(vectors, widest)
    assert sum(widths) == vectors
    assert max(widths) <= widest
    assert max(widths) - min(widths) <= 1
    assert widths == sorted(widths, reverse=True)


def test_layout__tiles_of_197_tokens() -> None:
    assert layout.tile_widths(layout.vectors_of(197, 16)) == [4, 3, 3, 3]


def test_pack_sparse__nonzeros_are_those_of_the_matrix() -> None:
    weight = matrix(0, 30, 100, 0.8)
    packed = weights.pack_sparse(weight, 40)
    assert packed.panels == 3
    assert len(packed.values) == np.count_nonzero(weight)
    again, row, at = np.zeros_like(weight), 0, 0
    for first, each, rows, _ in packed.groups:
        for output in packed.rows[row : row + rows]:
            again[output, first + packed.columns[at : at + each].astype(int)] = packed.values[at : at + each]
            at += each
        row += rows
    np.testing.assert_array_equal(again, weight)


@pytest.mark.skipif(not host.has_vnni(), reason="needs AVX-512 VNNI")
@settings(max_examples=60, deadline=None)
@given(
    outputs=SIZES,
    blocks=st.integers(1, 20),
    tokens=TOKENS,
    sparsity=st.sampled_from([0.0, 0.75, 0.9, 1.0]),
    gelu=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_int8__a_layer_is_the_product_of_what_was_rounded(
    *, outputs: int, blocks: int, tokens: int, sparsity: float, gelu: bool, residual: bool, seed: int
) -> None:
    weight = normal(seed, outputs, 4 * blocks)
    weight[np.repeat(np.random.default_rng(seed).random((outputs, blocks)) < sparsity, 4, axis=1)] = 0
    x, bias, before = (
        normal(seed + 1, tokens, 4 * blocks),
        normal(seed + 2, outputs),
        normal(seed + 3, tokens, outputs),
    )
    whole, steps = weights.to_int8(weight)
    result = int8_linear(
        x, weights.pack_blocks(whole, steps), bias, gelu=gelu, residual=before if residual else None
    )
    low, high = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 0)
    step = np.maximum((high - low) / 255, 1e-30)[:, None]
    zero = np.rint(-low[:, None] / step)
    rounded = (np.clip(np.rint(x / step + zero), 0, 255) - zero) * step
    expected = rounded @ (whole * steps[:, None]).T + bias + (before if residual else 0)
    expected = functional.gelu(tensor(expected.astype(np.float32))).numpy() if gelu else expected
    # a number half way between two steps may be rounded to either
    tie = 1.01 * step * np.abs(weight).max(initial=0) * 2 + 1e-4
    assert (np.abs(result - expected) <= tie).all()
    assert np.median(np.abs(result - expected)) <= 1e-4


def test_pack_blocks__need_inputs_by_fours() -> None:
    with pytest.raises(ValueError, match="6 inputs"):
        weights.pack_blocks(np.ones((2, 6), np.int8), np.ones(2, np.float32))
