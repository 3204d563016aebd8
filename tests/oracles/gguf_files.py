"""Small GGUF files: by gguf-py's writer, and byte by byte where a field is to be unusual or wrong.

The numbers are those of ggml's docs/gguf.md. The values of blocks come from diffusers' reader.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from diffusers.quantizers.gguf.utils import dequantize_functions

SCALES = {  # where in a block of a type its fp16 scales lie
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
UINT32, INT32, FLOAT32, STRING, ARRAY, INT64 = 4, 5, 6, 8, 9, 11
F32, Q8_0 = 0, 8


def block_size(dtype: str) -> tuple[int, int]:
    """Elements and bytes of a block, as gguf-py has them."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    return int(elements), int(size)


def random_rows(dtype: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of any bits whose scales are finite: uint8 [rows, bytes of a row]."""
    elements, size = block_size(dtype)
    count = rows * columns // elements
    if dtype not in SCALES:
        stored = {"F32": np.float32, "F16": np.float16, "BF16": np.float32}[dtype]
        values = rng.normal(size=count).astype(stored).view(np.uint8).reshape(count, -1)
        return values[:, -size:].reshape(rows, -1)  # bf16 is the upper half of fp32
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    for place in SCALES[dtype]:
        scale = rng.normal(size=(count, 1)).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)


def second_opinion(data: np.ndarray, dtype: str) -> np.ndarray:
    """The fp32 values of whole blocks, by PyTorch for plain types, and by diffusers: 1-D."""
    raw = torch.from_numpy(data.copy()).reshape(-1)
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if dtype in plain:
        return np.asarray(raw.view(plain[dtype]).float())
    elements, size = block_size(dtype)
    function = dequantize_functions[gguf.GGMLQuantizationType[dtype]]
    values = function(raw.reshape(-1, size), elements, size, dtype=torch.float32)
    return np.asarray(values.reshape(-1))


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, str]],
    *,
    architecture: str = "wan",
    more: Callable[[Any], None] = lambda writer: None,
) -> None:
    """By gguf-py's writer, tensors given as name -> (rows of bytes or plain values, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    more(writer)
    for name, (rows, dtype) in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text(content: str | bytes) -> bytes:
    """A string, after its length."""
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    """A key of the metadata, with the type and the bytes of its value."""
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    """The value of a key of the type ARRAY."""
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str | bytes, dims: Sequence[int], kind: int, offset: int) -> bytes:
    """What the header says of a tensor; dims are in GGML's order."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def assemble(
    keys: Sequence[bytes],
    tensors: Sequence[bytes],
    data: int,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these parts and so many bytes of data; counts are of tensors and of keys."""
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    header = head + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + bytes(data)
