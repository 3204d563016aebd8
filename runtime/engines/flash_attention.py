"""FlashAttention-4 as compiled into a bundle: loading the library and calling it.

It needs PyTorch and apache-tvm-ffi, and nothing that compiles.
"""

from pathlib import Path

import torch
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.errors import BundleError, installing, needing_package

FUNCTION = "flash_attention"  # the symbol in the library is __tvm_ffi_<FUNCTION>
# How PyTorch gives tvm-ffi its tensors and its current stream: the name now, and that before.
EXCHANGES = ("__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__")


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
                self._function = tvm_ffi.load_module(name)[FUNCTION]
            except Exception as error:
                reason = " ".join(str(error).split())
                raise BundleError(
                    f"the attention kernel {name} cannot be loaded: build the bundle again here "
                    f"({reason})"
                ) from error

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention without a mask on the current stream, as a new tensor [B, S, H, D].

        q is [B, S, H, D], k and v are [B, T, H, D]: contiguous, on one CUDA device. The first call
        of a process loads the kernel into the GPU: make it before a CUDA graph is captured.
        Raises ValueError when a tensor is of another dtype or device.
        """
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        self._function(q, k, v, out)
        return out
