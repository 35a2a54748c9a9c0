#!/usr/bin/env bash
# ONNX Runtime 1.31.1, quantize_dynamic: the weight of a Gemm with transB=1 (every nn.Linear that an exporter writes as
# Gemm) is stored transposed, under the name it would have anyway; the weight of a MatMul is not.
#
# Expected: "w_quantized" has the shape of "w". Who compares pruned positions by name reads the wrong ones, without an
# error where the layer is square. Seen, for three outputs of two inputs:
#
#     Gemm    w (3, 2) -> w_quantized (2, 3)
#     MatMul  w (2, 3) -> w_quantized (2, 3)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$folder"
venv/bin/python - 2>/dev/null <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic


def stored(node, weight):
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(3, np.float32), "b")]
    used = [one for one in constants if one.name in node.input]
    graph = helper.make_graph([node], "g", [given], [answer], used)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, "float.onnx")
    quantize_dynamic("float.onnx", "int8.onnx", weight_type=QuantType.QInt8)
    made = {one.name: tuple(one.dims) for one in onnx.load("int8.onnx").graph.initializer}
    return made["w_quantized"]


weight = np.arange(6, dtype=np.float32).reshape(3, 2)
gemm = stored(helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1), weight)
matmul = stored(helper.make_node("MatMul", ["x", "w"], ["y"]), weight.T.copy())
print(f"onnxruntime {onnxruntime.__version__}")
print(f"Gemm    w (3, 2) -> w_quantized {gemm}")
print(f"MatMul  w (2, 3) -> w_quantized {matmul}")
assert gemm == (2, 3), "changed"
assert matmul == (2, 3), "changed"
PYTHON
