"""Export of models to ONNX, OpenVINO and torch.export files."""

__all__ = [
    "onnx",
    "openvino",
    "torch_export",
]
