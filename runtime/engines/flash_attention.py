"""FlashAttention-4 as compiled into a bundle: loading the library and calling it.

It needs PyTorch and apache-tvm-ffi, and nothing that compiles.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.errors import BundleError, installing, needing_package

FUNCTION = "flash_attention_lse"  # the symbol in the library is __tvm_ffi_<FUNCTION>
_WITHOUT_LSE = "flash_attention"  # of libraries whose function takes no place for the sums
# How PyTorch gives tvm-ffi its tensors and its current stream: the name now, and that before.
EXCHANGES = ("__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__")
# What a division is predicted with, fitted to `tests/tables/causal_attention.py` on an H200.
_TILE, _HEAD_DIM = 128, 128  # queries of a thread block, and the head dimension that it is so for
_START = 830  # keys in whose time a block begins and ends
_JOIN = 1700  # keys in whose time a block's parts are started and joined
_MOST_PARTS, _GAIN = 8, 0.98


class Division(NamedTuple):
    """How a call is divided: the queries before `whole` see all keys at once, those after it the
    keys in so many parts, which are joined."""

    whole: int
    parts: int


class FlashAttention:
    """softmax(q k^T / sqrt(D)) v by a library's kernel, for the dtype and D of its compilation."""

    def __init__(self, library: Path | PinnedFile) -> None:
        """Load the library. Raises BundleError when it, or apache-tvm-ffi, cannot be loaded, and
        when it is not what was pinned."""
        # With neither, tvm-ffi would compile a C++ extension when it is imported.
        if not any(hasattr(Tensor, name) for name in EXCHANGES):
            raise BundleError(
                f"FlashAttention-4 cannot be called by PyTorch {torch.__version__}: "
                f"{installing('torch>=2.11')}"
            )
        with needing_package("apache-tvm-ffi", "calling FlashAttention-4"):
            import tvm_ffi
        library = pin(library)
        with library.opened():
            # By its own name: tvm-ffi goes by the suffix, which what a link leads to may lack.
            name = str(library.path.absolute())
            try:
                module = tvm_ffi.load_module(name)
                self._gives_sums = module.implements_function(FUNCTION)
                self._function = module[FUNCTION if self._gives_sums else _WITHOUT_LSE]
            except Exception as error:
                reason = " ".join(str(error).split())
                raise BundleError(
                    f"the attention kernel {name} cannot be loaded: build the bundle again here "
                    f"({reason})"
                ) from error

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention without a mask on the current stream, as a new tensor [B, S, H, D].

        The last queries, whose blocks would leave processors idle, see the keys in parts.

        q is [B, S, H, D], k and v are [B, T, H, D]: contiguous, on one CUDA device. The first call
        of a process loads the kernel into the GPU: make it before a CUDA graph is captured.
        Raises ValueError when a tensor is of another dtype or device.
        """
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if not self._gives_sums:
            self._function(q, k, v, out)
            return out
        whole, parts = _division_of(q, k)
        if whole:
            self._run(q[:, :whole], k, v, out[:, :whole])
        if parts > 1:
            self._join(q[:, whole:], k, v, parts, out[:, whole:])
        return out

    def _run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """Attention into `out`; returns the logarithms of the sums of exponentials [B, H, S]."""
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        self._function(q, k, v, out, lse)
        return lse

    def _join(self, q: Tensor, k: Tensor, v: Tensor, parts: int, out: Tensor) -> None:
        """Attention to so many equal parts of the keys, weighed by their sums of exponentials."""
        shape = (parts, k.shape[1] // parts, *k.shape[2:])
        q = q.expand(parts, *q.shape[1:]).contiguous()
        of_parts = torch.empty_like(q)
        lse = self._run(q, k.view(shape), v.view(shape), of_parts)
        weights = lse.softmax(0).transpose(1, 2)[..., None]  # [parts, S, H, 1] fp32
        out.copy_((weights * of_parts).sum(0, keepdim=True))


def _division_of(q: Tensor, k: Tensor) -> Division:
    """That of a call, whose tensors are [B, S, H, D] and [B, T, H, D]."""
    batch, queries, heads, head_dim = q.shape
    if batch > 1 or head_dim != _HEAD_DIM:
        return Division(queries, 1)
    return division(queries, heads, k.shape[1], _processors(q.device))


def _processors(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)


@cache
def division(queries: int, heads: int, keys: int, processors: int) -> Division:
    """How to divide a call of so many queries, heads and keys for a GPU of so many processors.

    A processor runs one thread block at a time, and a block has a tile of one head's queries. What
    does not fill all processors is as slow as what does: its keys are divided among more blocks,
    where that is predicted to take less time.
    """
    tiles = math.ceil(queries / _TILE)
    undivided = _waves(tiles * heads, processors) * (keys + _START)
    full = tiles * heads // processors * processors // heads  # tiles before the last blocks
    start = _waves(full * heads, processors) * (keys + _START) + _JOIN
    blocks = (tiles - full) * heads
    predicted = {
        parts: start + _waves(blocks * parts, processors) * (keys / parts + _START)
        for parts in range(2, _MOST_PARTS + 1)
        if blocks and keys % parts == 0
    }
    parts = min(predicted, key=predicted.__getitem__, default=1)
    if predicted.get(parts, undivided) > _GAIN * undivided:
        return Division(queries, 1)
    return Division(full * _TILE, parts)


def _waves(blocks: int, processors: int) -> int:
    return math.ceil(blocks / processors)
