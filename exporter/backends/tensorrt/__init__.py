"""TensorRT engines, of both flavours."""
