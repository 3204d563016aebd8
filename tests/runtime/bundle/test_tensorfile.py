"""Our safetensors reader and writer against the safetensors library."""

import errno
import gc
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanexport.runtime.bundle.durable import durable_file
from wanexport.runtime.bundle.tensorfile import (
    header_sha256,
    load_arrays,
    make_header,
    read_array,
    read_header,
    save_arrays,
)
from wanexport.runtime.errors import BundleError


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
    with pytest.raises(BundleError, match="download it again"):
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
        {"dtype": "F3[/bold]", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [10**400], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**400]},
        {"dtype": "F32", "shape": [2], "data_offsets": "08"},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]},
        {"dtype": "F32", "shape": [1] * 33, "data_offsets": [0, 4]},
        [],
        None,
        3,
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, fields: object) -> None:
    text = json.dumps({"x": fields}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(BundleError, match="damaged") as refused:
        read_header(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500 + len(str(path))


def write(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header, given as JSON or as the text itself."""
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ({"x": entry(0, 8), "y": entry(4, 12)}, 12),
        ({"x": entry(0, 8), "y": entry(0, 8)}, 8),
        ({"x": entry(0, 8), "y": entry(9, 12)}, 12),
        ({"x": entry(4, 8)}, 8),
        ({"x": entry(0, 8)}, 9),
        ({"x": entry(0, 8)}, 7),
        ({}, 1),
    ],
)
def test_tensors_lie_one_after_the_other_and_fill_the_file(
    entries: dict[str, object], size: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.safetensors", entries, bytes(size))
    with pytest.raises(BundleError, match="download it again"):
        read_header(path)
    write(path, {"y": entry(0, 0), "x": entry(0, 8), "z": entry(8, 8)}, bytes(8))
    assert set(read_header(path)) == {"x", "y", "z"}


LIBRARY = (
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint16, torch.uint32),
    *(torch.uint64, torch.int16, torch.complex64, torch.float8_e8m0fnu),
)


@pytest.mark.parametrize("dtype", LIBRARY)
def test_the_size_of_every_dtype_of_the_library_must_fit_its_shape(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(3, 4).to(dtype)}, path)
    found = read_header(path)["x"]
    assert (found.shape, found.size) == ((3, 4), 12 * dtype.itemsize)
    stored = json.loads(path.read_bytes()[8:].partition(b"}}")[0] + b"}}")
    stored["x"]["shape"] = [3, 5]
    write(path, stored, bytes(12 * dtype.itemsize))
    with pytest.raises(BundleError, match=r"do not hold x, .* \[3, 5\]"):
        read_header(path)


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_elements_under_a_byte_must_fill_bytes(dtype: str, bits: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"x": entry(0, bits, dtype) | {"shape": [2, 4]}}, bytes(bits))
    assert read_header(path)["x"].size == bits
    write(path, {"x": entry(0, bits, dtype) | {"shape": [7]}}, bytes(bits))
    with pytest.raises(BundleError, match="do not hold x"):
        read_header(path)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"x": entry(0, 8) | {"shape": [2**47] * 50_000}}),
        "{" + ",".join(f'"{i}":{{}}' for i in range(100_001)) + "}",
        '{"x":[' + ",".join(["[]"] * 300_000) + "]}",
        json.dumps({"x" * 100_000: entry(0, 8)}),
        '{"x":' + "[" * 500 + "]" * 500 + "}",
        '{"x": 1' + "0" * 5000 + "}",
        '{"x":{},"x":{}}',
        json.dumps({"x": entry(0, 8) | {"a": 1}}).replace('"a": 1', '"dtype": "U8"'),
        json.dumps({"__metadata__": [1], "x": entry(0, 8)}),
        "[]", "3", "null", '"x"', "", "{", "NaN", "\ud800",
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_a_hostile_header_is_refused_in_little_time(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    raw = text.encode(errors="surrogatepass")
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    gc.freeze()  # collecting what other tests of the process left is not the reader's time
    began = time.process_time()
    with pytest.raises(BundleError, match="damaged safetensors header") as refused:
        read_header(path)
    assert time.process_time() - began < 1
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500 + len(str(path))


def test_a_header_over_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((99_000_000).to_bytes(8, "little") + b"{")
        file.truncate(100_000_000)
    with pytest.raises(BundleError, match="a header of 99000000 bytes, more than the 16777216"):
        read_header(path)


def test_names_are_escaped_in_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a\nb", {"x\n\x1b[31m": entry(0, 8, "F32")}, bytes(8))
    with pytest.raises(BundleError) as refused:
        read_header(path)
    assert str(refused.value).isprintable()
    assert "a\\nb" in str(refused.value) and "x\\n\\x1b[31m" in str(refused.value)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = {"pipe": tmp_path / "pipe", "folder": tmp_path, "device": Path("/dev/zero")}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    for read in (read_header, header_sha256, load_arrays):
        with pytest.raises(BundleError, match=rf"{path} is no regular file"):
            read(path)


def test_an_open_file_is_read_though_another_took_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_arrays(path, {"x": np.ones(3)})
    entries, digest = read_header(path), header_sha256(path)
    with path.open("rb") as file:
        file.seek(5)
        save_arrays(tmp_path / "y", {"other": np.ones(7)})
        (tmp_path / "y").replace(path)
        assert read_header(file.fileno()) == entries != read_header(path)
        assert header_sha256(file.fileno()) == digest != header_sha256(path)
        np.testing.assert_array_equal(read_array(file.fileno(), entries["x"]), np.ones(3))
        assert file.tell() == 5


def test_a_header_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    text = b"[" * 100_000
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(BundleError, match="damaged"):
        read_header(path)


def test_a_tensor_of_too_many_dimensions_is_refused(tmp_path: Path) -> None:
    header, _ = make_header({"x": ("F32", (1,) * 40)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(4))
    with pytest.raises(BundleError, match="40 dimensions"):
        load_arrays(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot read .*No such file"):
        read_header(tmp_path / "x.safetensors")


def test_a_write_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    with pytest.raises(ValueError, match="could not convert"):
        save_arrays(path, {"x": np.array(["no number"])})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_read_error_names_the_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_arrays(tmp_path / "source", {"x": np.zeros(4, np.float32)})

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "I/O error")

    with durable_file(tmp_path / "output") as file:
        file.write(b"x")
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises((OSError, BundleError), match="source"):
            load_arrays(tmp_path / "source")
