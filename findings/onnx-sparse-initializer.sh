#!/usr/bin/env bash
# ONNX 1.23.2 has a field for sparse weights, graph.sparse_initializer, and its checker accepts a model with one. Of
# three readers only ONNX Runtime 1.31.1 runs that model; and what ONNX Runtime saves of it (optimized_model_filepath,
# itself runnable there) is no ONNX any more: the positions become INT16, where the format asks for INT64.
#
# Expected: a pruned model in the format's own sparse form is read by what reads the format. Seen, for one MatMul:
#
#     onnx checker                         accepts
#     onnx checker, with shape inference   refuses: wrong rank (0)
#     onnx reference evaluator             refuses: no "data_location" field
#     onnxruntime                          runs, right
#     openvino                             refuses: Input tensor isn't found
#     onnxruntime's own saved model        positions INT16; runs in onnxruntime, right; onnx checker refuses
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    onnx==1.23.2 onnxruntime==1.31.1 openvino==2026.4.1 numpy==2.4.6
cd "$folder"
venv/bin/python - 2>/dev/null <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

random = np.random.default_rng(0)
weight = random.standard_normal((64, 32), np.float32) * (random.random((64, 32)) < 0.1)
images = random.standard_normal((3, 64), np.float32)
positions = np.flatnonzero(weight)
values = numpy_helper.from_array(weight.reshape(-1)[positions], "w")
sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(positions.astype(np.int64)), [64, 32])
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"])],
    "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 64])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 32])],
    sparse_initializer=[sparse],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
onnx.save(model, "sparse.onnx")


def outcome(what, work, words=""):
    try:
        answer = work()
    except Exception as error:
        assert words and words in str(error), f"changed: {what}: {error}"
        print(f"{what:<37}refuses: {words}")
        return
    assert not words, f"changed: {what} takes it"
    if answer is None:
        print(f"{what:<37}accepts")
    else:
        assert np.allclose(answer, images @ weight, atol=1e-5), f"changed: {what}"
        print(f"{what:<37}runs, right")


def in_onnxruntime(path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"saved-{path}"
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": images})[0]


print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, openvino {openvino.__version__}")
outcome("onnx checker", lambda: onnx.checker.check_model(model))
outcome(
    "onnx checker, with shape inference",
    lambda: onnx.checker.check_model(model, full_check=True),
    "wrong rank (0)",
)
outcome(
    "onnx reference evaluator",
    lambda: ReferenceEvaluator(model).run(None, {"x": images})[0],
    'no "data_location" field',
)
outcome("onnxruntime", lambda: in_onnxruntime("sparse.onnx"))
outcome(
    "openvino",
    lambda: openvino.Core().compile_model("sparse.onnx", "CPU")([images])[0],
    "Input tensor isn't found",
)
saved = onnx.load("saved-sparse.onnx")
kind = saved.graph.sparse_initializer[0].indices.data_type
assert kind == TensorProto.INT16, "changed"
print("onnxruntime's own saved model         positions INT16")
outcome("  in onnxruntime", lambda: in_onnxruntime("saved-sparse.onnx"))
outcome("  onnx checker", lambda: onnx.checker.check_model(saved), "must have INT64 type")
PYTHON
