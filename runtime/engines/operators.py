"""The operators of exported graphs whose kernels are chosen where they run.

Importing this file needs PyTorch and registers `torch.ops.wanexport`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.cached_kernels import CACHED, to_prefix
from wanexport.runtime.engines.flash_attention import FlashAttention
from wanexport.runtime.engines.kernels import KERNELS, check_kind
from wanexport.runtime.errors import BadRequest, BundleError, installing

# q [B, S, H, D], k and v [B, T, H, D]; of kind `cache` also how many of the keys count.
Kernel = Callable[..., Tensor]

# An operator has no other way to learn which engine calls it.
_kernels: ContextVar[Mapping[str, Kernel]] = ContextVar("attention kernels")
_IMAGE_KEYS = (257, 514)  # CLIP tokens of one image, and of two


# Defined by hand: torch.library.custom_op imports the compiler's front end when it is first called.
_library = torch.library.Library("wanexport", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_library.define(
    "attention.kind(Tensor q, Tensor k, Tensor v, str kind) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor keys, str kind) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


def attention(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v as [B, S, H, D]; there is no mask.

    q is [B, S, H, D], k and v are [B, T, H, D], and all three have one dtype. kind is one of
    `ATTENTION_KINDS`. The kernel is that of `attention_kernels` for the kind; where none are set,
    it is PyTorch's choice.
    Raises BadRequest for an unknown kind, and when kernels are set, but none for this one.
    """
    out: Tensor = torch.ops.wanexport.attention.kind(q, k, v, kind)
    return out


def cached_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, kind: str) -> Tensor:
    """Attention to the first `keys` [1] int64 of the T keys, from 1 on, as [1, S, H, D].

    q is [1, S, H, D], k and v are [1, T, H, D]; what lies behind the first keys is not read, or
    weighs nothing and must be finite. The kernel is chosen as that of `attention` is; raises alike.
    """
    out: Tensor = torch.ops.wanexport.cached_attention(q, k, v, keys, kind)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh(x [L, in] weight^T + bias) as [L, out], in one kernel on CUDA.

    cuBLASLt applies its epilogue, which is the tanh form, to the fp32 sums: one rounding less than
    a product and a GELU after it, and the wide activation is not read and written again.
    """
    out: Tensor = torch.ops.wanexport.linear_gelu(x, weight, bias)
    return out


def _attention(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    return _chosen(kind, sdpa)(q, k, v)


def _cached_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, kind: str) -> Tensor:
    return _chosen(kind, to_prefix(sdpa))(q, k, v, keys)


def _chosen(kind: str, default: Kernel) -> Kernel:
    check_kind(kind)
    kernels = _kernels.get({})
    if kernels and kind not in kernels:
        raise BadRequest(
            f"no kernel is chosen for attention of kind {kind}, only for {', '.join(kernels)}: "
            f"run wanexport build again"
        )
    return kernels[kind] if kernels else default


def _attention_of_schema_1(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Packages of bundles of schema 1 do not say the kind: it follows from the number of keys."""
    keys = k.shape[1]
    if keys == q.shape[1]:
        return _attention(q, k, v, "self")
    return _attention(q, k, v, "image" if keys in _IMAGE_KEYS else "text")


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.is_cuda and x.dtype != torch.float32:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


for _device in ("CPU", "CUDA"):
    _library.impl("attention.kind", _attention, _device)
    _library.impl("cached_attention", _cached_attention, _device)
    _library.impl("attention", _attention_of_schema_1, _device)
    _library.impl("linear_gelu", _linear_gelu, _device)


@torch.library.register_fake("wanexport::attention", lib=_library)  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("wanexport::attention.kind", lib=_library)  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    check_kind(kind)
    return q.new_empty(q.shape)


@torch.library.register_fake("wanexport::cached_attention", lib=_library)  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, kind: str) -> Tensor:
    check_kind(kind)
    return q.new_empty(q.shape)


@torch.library.register_fake("wanexport::linear_gelu", lib=_library)  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@contextmanager
def attention_kernels(kernels: Mapping[str, Kernel]) -> Iterator[None]:
    """Choose the kernel of each kind of attention, within the block and its thread.

    No kernels at all leave the choice to PyTorch.
    """
    token = _kernels.set(kernels)
    try:
        yield
    finally:
        _kernels.reset(token)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel that PyTorch chooses."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's kernel, for fp16 and bf16 on CUDA."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    return out.transpose(1, 2).contiguous()


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products and a softmax, one batch entry at a time.

    For heads of more than 256 channels, of which PyTorch's fused kernels on CUDA are slow.
    """
    out = torch.empty_like(q)
    scale = q.shape[-1] ** -0.5
    for i in range(q.shape[0]):
        a, b, c = (x[i].transpose(0, 1) for x in (q, k, v))  # [H, S or T, D]
        scores = torch.baddbmm(a.new_zeros(()), a, b.transpose(1, 2), beta=0, alpha=scale)
        out[i] = (scores.softmax(-1) @ c).transpose(0, 1)
    return out


_OF_PYTORCH: Mapping[str, Kernel] = {"cudnn": cudnn, "sdpa": sdpa, "products": products}


def open_kernel(name: str, flash_library: Path | PinnedFile | None, kind: str = "self") -> Kernel:
    """The kernel `fa4`, `cudnn` or `sdpa`; flash_library is the bundle's compiled FlashAttention-4.

    For kind `cache` there are those of `CACHED` too, and the others attend to a view. Raises
    BadRequest for an unknown kernel, BundleError when it cannot be had.
    """
    if kind == "cache":
        return CACHED[name] if name in CACHED else to_prefix(open_kernel(name, flash_library))
    if name in _OF_PYTORCH:
        return _OF_PYTORCH[name]
    if name not in KERNELS:
        raise BadRequest(f"unknown attention kernel {name!r}: expected one of {', '.join(KERNELS)}")
    if flash_library is None:
        raise BundleError(
            f"this bundle has no FlashAttention-4 kernel: {installing('flash-attn-4')} and run "
            f"wanexport build again, or choose cudnn"
        )
    return FlashAttention(flash_library)
