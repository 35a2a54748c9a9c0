#!/usr/bin/env bash
# OpenVINO 2026.4.1, CPU plugin: the mean over the tokens of a norm that has a scale and no shift is wrong where it is
# quantized. So ends a transformer that pools its tokens, in INT8, when its last LayerNorm has no bias, or zeros for it:
#
#     x -> MVN over channels -> * scale -> ReduceMean over positions -> FakeQuantize -> MatMul with int8 weights
#
# Expected: what numpy gives, to the rounding of INT8. Seen on an AMD EPYC (AVX2), precision hint f32: the largest
# difference relative to the largest value, by positions x channels:
#
#                                    4x4x16   7x7x96   7x7x768   8x8x384
#     scale alone                     0.19     0.60     0.32      0.25     wrong
#     scale and shift                 0.00     0.00     0.00      0.00
#     scale, no FakeQuantize          0.00     0.00     0.00      0.00
#     scale, mean is an output too    0.00     0.00     0.00      0.00
#
# The runtime graph has the mean as one node "Reduce" with output u8, right after a node "RMS" into which norm and scale
# were fused. A model that was quantized well answers wrongly, and whoever looks at the mean sees it right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy as np
import openvino
from openvino import opset13 as op

LOW, HIGH, OUTPUTS, IMAGES = -0.77, 1.68, 3, 8
core = openvino.Core()


def difference(height, width, channels, *, shift=False, quantized=True, seen=False):
    """Largest difference from numpy, relative to the largest value."""
    draw = np.random.default_rng(0)
    scale = draw.uniform(0.5, 1.5, channels).astype(np.float32)
    added = draw.normal(size=channels).astype(np.float32)
    weight = draw.normal(size=(OUTPUTS, channels))
    step = (np.abs(weight).max(1, keepdims=True) / 63).astype(np.float32)
    whole = np.round(weight / step).astype(np.int8)
    images = draw.normal(size=(IMAGES, height, width, channels)) + draw.normal(size=channels)
    images = images.astype(np.float32)

    given = op.parameter([-1, height, width, channels], np.float32)
    norm = op.multiply(op.mvn(given, [-1], True, 1e-5, "inside_sqrt"), op.constant(scale))
    if shift:
        norm = op.add(norm, op.constant(added))
    mean = op.reduce_mean(norm, op.constant(np.array([1, 2])), False)
    pooled = op.fake_quantize(mean, *map(np.float32, (LOW, HIGH, LOW, HIGH)), 256) if quantized else mean
    weights = op.multiply(op.convert(op.constant(whole), np.float32), op.constant(step))
    outputs = [op.matmul(pooled, weights, False, True), *([mean] if seen else [])]
    model = openvino.Model(outputs, [given])
    answers = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]

    wide = images.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + (added if shift else 0)
    expected = expected.mean((1, 2))
    if quantized:
        level = (HIGH - LOW) / 255
        expected = np.clip(np.round((expected - LOW) / level), 0, 255) * level + LOW
    expected = expected @ (whole * step.astype(np.float64)).T
    return np.abs(answers - expected).max() / np.abs(expected).max()


print(f"openvino {openvino.__version__}")
for shape in ((4, 4, 16), (7, 7, 96), (7, 7, 768), (8, 8, 384)):
    scaled = difference(*shape)
    shifted = difference(*shape, shift=True)
    in_float = difference(*shape, quantized=False)
    seen = difference(*shape, seen=True)
    print(f"{shape}: scale {scaled:.4f}, shift too {shifted:.4f}, float {in_float:.4f}, mean seen {seen:.4f}")
    assert max(shifted, in_float, seen) < 0.02, "changed: other graphs are wrong as well"
    assert scaled > 0.1, "changed: the mean of a scaled norm is right"
PYTHON
