"""ONNX engines."""
