"""The table of dtypes against the libraries whose names and sizes it states."""

import numpy as np
import onnx
import onnx_ir
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from wanexport.runtime.dtypes import DTYPES, PRECISIONS, STORED, Dtype

ROWS = tuple(DTYPES.values())


def named(library: str) -> list[Dtype]:
    """The rows that have a name for a library."""
    return [row for row in ROWS if getattr(row, library)]


def test_pytorch_names_each_dtype_as_safetensors_reads_it() -> None:
    for stored, dtype in safetensors.torch._TYPES.items():
        assert getattr(torch, STORED[stored].torch) is dtype, stored


def test_numpy_names_each_dtype_as_safetensors_reads_it() -> None:
    stored = {row.stored: np.dtype(row.numpy) for row in named("numpy")}
    assert stored == {name: np.dtype(kind) for name, kind in safetensors.numpy._TYPES.items()}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_sizes_are_those_of_the_libraries(row: Dtype) -> None:
    if row.torch:
        assert row.itemsize == getattr(torch, row.torch).itemsize == row.bits / 8
    if row.numpy:
        assert row.itemsize == np.dtype(row.numpy).itemsize
    if row.onnx:
        assert row.itemsize == getattr(onnx_ir.DataType, row.onnx).itemsize
    assert row.torch or (row.bits < 8 and row.itemsize == 0)


def test_onnx_names_the_dtype_that_pytorch_does() -> None:
    for row in named("onnx"):
        number = getattr(onnx.TensorProto, row.onnx)
        assert number == getattr(onnx_ir.DataType, row.onnx)
        assert np.dtype(row.torch) == onnx.helper.tensor_dtype_to_np_dtype(number)  # by ml_dtypes


def test_every_precision_has_a_name_everywhere_and_none_twice() -> None:
    assert PRECISIONS == ("fp32", "bf16", "fp16")
    for name in PRECISIONS:
        row = DTYPES[name]
        assert row.torch and row.onnx and row.tensorrt
    for field in ("name", "stored", "torch", "numpy", "onnx", "tensorrt"):
        names = [getattr(row, field) for row in named(field)]
        assert len(set(names)) == len(names), field
