"""Figures such as `bench` and `profile` save, small enough to check by eye."""

from typing import Any

ARM = {
    "arm": "onnx", "engine": "64x96x9/onnx-fp32", "attention": "native",
    "median": 0.03, "min": 0.02, "max": 0.04, "percent_of_floor": 50.0,
    "gpu_busy": None, "device_bytes": None,
    "peak_bytes": 125_000_000, "cold_start": {"first_step": 0.464}, "difference": 7.5e-7,
}  # fmt: skip
BENCH: dict[str, Any] = {
    "engine": "64x96x9/onnx-fp32", "weights": None, "machine": "a <b>machine</b>",
    "torch": "2.13.0",
    "peak": 8.2e10, "product_dtype": "float32", "flops_per_forward": 1.2e9, "floor_seconds": 0.015,
    "rounds": 5, "failed": {"compile": "no compiler & no luck"},
    "arms": [
        {**ARM, "arm": "graph", "engine": None, "attention": None, "median": 0.06, "max": 0.08},
        ARM,
    ],
}  # fmt: skip


def kernel(name: str, seconds: float, floor: float | None, **changes: Any) -> dict[str, Any]:
    """A row of a profile's largest kernels."""
    row = {"name": name, "kind": "products", "count": 47.0, "seconds": seconds, "share": 0.5}
    return {**row, "flops": 1e9, "bytes": None, "floor_seconds": floor, **changes}


PROFILE: dict[str, Any] = {
    "target": "tiny", "arm": "graph", "engine": None, "weights": None, "size": "64x96x9",
    "dtype": "fp32", "machine": "a machine", "torch": "2.13.0", "steps": 3, "warmup": 2,
    "seconds_per_step": 0.044, "gpu": None, "notes": ["a note"],
    "rates": {"flops": 6e10, "bytes": 2e10, "dtype": "fp32"},
    "kinds": [{**kernel("", 0.03, 0.02), "kind": "products"}],
    "waits": {
        "for_gpu": 0.0, "reads": 2.0, "seconds": 0.0,
        "lines": [{"line": "model.py:12", "cause": "aten::item", "count": 2.0, "seconds": 1e-5}],
    },
    "largest": [
        kernel("void kernel<float, 4>", 1e-2, 1e-2),
        kernel("copy", 1e-3, 1e-4, flops=None, bytes=1e6),
        kernel("unknown", 1e-3, None, flops=None),
    ],
}  # fmt: skip
