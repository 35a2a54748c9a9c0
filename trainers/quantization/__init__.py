"""Quantization to INT8: calibration and fake quantization, the INT8 folder, its ONNX file."""

__all__ = [
    "checks",
    "fake_quant",
    "int8_folder",
    "int8_onnx",
]
