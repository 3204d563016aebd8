"""Every dtype that wanexport knows, and what each library calls it.

The names are data, so that no library is imported here: where PyTorch is, `getattr(torch,
DTYPES["bf16"].torch)` is its dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Dtype:
    """One dtype; a name is empty where the library lacks it, or nothing here asks it for it."""

    name: str  # ours, in manifests and options; safetensors' where no engine computes in it
    stored: str  # safetensors'
    bits: int  # of one element
    torch: str = ""  # attribute of torch
    numpy: str = ""  # for np.dtype; without ml_dtypes
    onnx: str = ""  # attribute of onnx.TensorProto and of onnx_ir.DataType
    tensorrt: str = ""  # attribute of tensorrt.DataType
    precision: bool = False  # whether an engine may compute in it

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 where several share a byte."""
        return self.bits // 8


def _plain(stored: str, bits: int, name: str) -> Dtype:
    """A dtype that is only read, and that PyTorch and numpy name alike."""
    return Dtype(stored, stored, bits, name, name)


# What an engine may compute in comes first; the rest is what else safetensors 0.8 writes.
_ROWS = (
    Dtype("fp32", "F32", 32, "float32", "float32", "FLOAT", "FLOAT", precision=True),
    Dtype("bf16", "BF16", 16, "bfloat16", "", "BFLOAT16", "BF16", precision=True),
    Dtype("fp16", "F16", 16, "float16", "float16", "FLOAT16", "HALF", precision=True),
    _plain("F64", 64, "float64"),
    _plain("C64", 64, "complex64"),
    Dtype("I64", "I64", 64, "int64", "int64", "INT64", "INT64"),
    _plain("I32", 32, "int32"),
    _plain("I16", 16, "int16"),
    _plain("I8", 8, "int8"),
    _plain("U64", 64, "uint64"),
    _plain("U32", 32, "uint32"),
    _plain("U16", 16, "uint16"),
    _plain("U8", 8, "uint8"),
    _plain("BOOL", 8, "bool"),
    Dtype("F8_E4M3", "F8_E4M3", 8, "float8_e4m3fn"),
    Dtype("F8_E5M2", "F8_E5M2", 8, "float8_e5m2"),
    Dtype("F8_E8M0", "F8_E8M0", 8, "float8_e8m0fnu"),
    Dtype("F8_E4M3FNUZ", "F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    Dtype("F8_E5M2FNUZ", "F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    Dtype("F6_E2M3", "F6_E2M3", 6),
    Dtype("F6_E3M2", "F6_E3M2", 6),
    Dtype("F4", "F4", 4),
)
DTYPES: Mapping[str, Dtype] = MappingProxyType({row.name: row for row in _ROWS})
STORED: Mapping[str, Dtype] = MappingProxyType({row.stored: row for row in _ROWS})
PRECISIONS = tuple(row.name for row in _ROWS if row.precision)
