"""Our safetensors reader and writer against the safetensors library."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.tensorfile import (
    load_arrays,
    make_header,
    read_header,
    save_arrays,
)


def test_the_library_reads_what_we_write(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {"b": rng.standard_normal((3, 5)), "a": rng.standard_normal(7), "s": np.float64(2.0)}
    save_arrays(tmp_path / "x.safetensors", {k: np.asarray(v) for k, v in arrays.items()})
    read = load_file(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name].numpy(), np.asarray(array, np.float32))
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_we_read_what_the_library_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.randn(4, 6) * 100).to(dtype)
    save_file(
        {"x": tensor, "y": tensor[:1].clone()}, tmp_path / "x.safetensors", {"some": "metadata"}
    )
    arrays = load_arrays(tmp_path / "x.safetensors")
    wide = tensor.float() if dtype == torch.bfloat16 else tensor
    np.testing.assert_array_equal(arrays["x"], wide.numpy())
    assert arrays["y"].shape == (1, 6)


def test_headers_depend_on_names_dtypes_and_shapes_alone() -> None:
    tensors = {"z": ("BF16", (3, 1)), "a": ("BF16", (2, 2)), "m": ("F32", (5,))}
    header, entries = make_header(tensors)
    again, _ = make_header(dict(reversed(tensors.items())))
    assert header == again
    assert len(header) % 64 == 0
    fields = json.loads(header[8:])
    assert list(fields) == sorted(tensors)
    assert all(entry.offset % 4 == 0 for entry in entries.values() if entry.dtype == "F32")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.randn(64)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WanExportError, match="download it again"):
        read_header(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
        {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "X9", "shape": [2**62], "data_offsets": [0, 8]},
        {"dtype": [], "shape": [2], "data_offsets": [0, 8]},
        [],
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, fields: object) -> None:
    text = json.dumps({"x": fields}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(WanExportError, match="damaged"):
        read_header(path)


def test_a_header_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    text = b"[" * 100_000
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(WanExportError, match="damaged"):
        read_header(path)


def test_a_tensor_of_too_many_dimensions_is_refused(tmp_path: Path) -> None:
    header, _ = make_header({"x": ("F32", (1,) * 40)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(4))
    with pytest.raises(WanExportError, match="40 dimensions"):
        load_arrays(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WanExportError, match=r"cannot read .*No such file"):
        read_header(tmp_path / "x.safetensors")


def test_a_write_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    with pytest.raises(ValueError, match="could not convert"):
        save_arrays(path, {"x": np.array(["no number"])})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
