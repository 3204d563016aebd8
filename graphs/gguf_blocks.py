"""GGML's types of tensors: which are read, their blocks, and the values that these hold.

Source: ggml-org/ggml, docs/gguf.md and src/ggml-common.h.
"""

import numpy as np

from wanexport.runtime.errors import needing_extra

TYPES = {  # GGML's number of a type -> its name, elements and bytes of a block
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_BLOCKS = {name: (elements, size) for name, elements, size in TYPES.values()}
UNREAD = {4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
           19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
           26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8",
           33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
           38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0"}  # fmt: skip
_PIECE = 1 << 18  # elements dequantised at a time, which stay in a CPU's cache


def block_of(dtype: str) -> tuple[int, int]:
    """The elements and the bytes of a block of one of GGML's types that are read, by its name."""
    return _BLOCKS[dtype]


def dequantize(data: np.ndarray, dtype: str) -> np.ndarray:
    """The fp32 values, 1-D, of whole blocks given as bytes (uint8, 1-D).

    Raises BundleError when the package gguf is missing.
    """
    with needing_extra("build", "a GGUF file"):
        from gguf import GGMLQuantizationType, quants
    kind = GGMLQuantizationType[dtype]
    elements, size = block_of(dtype)
    assert len(data) % size == 0, "part of a block"
    values = np.empty(len(data) // size * elements, np.float32)
    # A scale that is not finite gives values that are not: whoever takes them checks that.
    with np.errstate(invalid="ignore"):
        for begin in range(0, len(values), _PIECE):
            piece = data[begin // elements * size : (begin + _PIECE) // elements * size]
            values[begin : begin + _PIECE] = quants.dequantize(piece, kind)
    return values
