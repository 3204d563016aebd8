"""The operator of a VAE's convolutions: channels last in and out, whoever compiles the graph.

Inside, cuDNN is told its layout, whether TF32 may be used and that results repeat: none of it is
left to settings of the process. It convolves channels last, but for fp32 without TF32. Importing
this file registers `torch.ops.wanexport.convolution`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST = 2**31 - 1  # elements of a tensor, beyond which cuDNN's kernels are fewer, or none

# A fragment of the library that `operators.py` defines, which need not be imported first.
_library = torch.library.Library("wanexport", "FRAGMENT")
_library.define(
    "convolution(Tensor x, Tensor weight, int[] stride, int padding, bool tf32) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def convolution(
    x: Tensor, weight: Tensor, *, stride: Sequence[int] = (1, 1), padding: int = 0, tf32: bool
) -> Tensor:
    """Convolve x [T, H, W, in] with weight [out, kt, kh, kw, in] to [T', H', W', out].

    stride is that of time and that of height and width; zeros pad height and width alone. tf32
    lets fp32 factors be rounded to TF32 on a GPU that has it. There is no bias.
    """
    out: Tensor = torch.ops.wanexport.convolution(x, weight, stride, padding, tf32)
    return out


def _shape(x: Tensor, weight: Tensor, stride: Sequence[int], padding: int) -> list[int]:
    _, kt, kh, kw, _ = weight.shape
    frames, height, width, _ = x.shape
    return [
        (frames - kt) // stride[0] + 1,
        (height + 2 * padding - kh) // stride[1] + 1,
        (width + 2 * padding - kw) // stride[1] + 1,
        weight.shape[0],
    ]


def _on_cpu(x: Tensor, weight: Tensor, stride: Sequence[int], padding: int, tf32: bool) -> Tensor:
    out = F.conv3d(
        x.permute(3, 0, 1, 2)[None],
        weight.permute(0, 4, 1, 2, 3),
        stride=(stride[0], stride[1], stride[1]),
        padding=(0, padding, padding),
    )
    return out[0].permute(1, 2, 3, 0).contiguous()


def _on_gpu(x: Tensor, weight: Tensor, stride: Sequence[int], padding: int, tf32: bool) -> Tensor:
    shape = _shape(x, weight, stride, padding)
    pieces = -(-max(x.numel(), torch.Size(shape).numel()) // _MOST)
    if pieces == 1:
        return _by_cudnn(x, weight, stride, padding, tf32)
    size, step, kept = -(-shape[0] // pieces), stride[0], weight.shape[1] - stride[0]
    out = x.new_empty(shape)
    for begin in range(0, shape[0], size):
        end = min(begin + size, shape[0])
        part = x[begin * step : end * step + kept]
        out[begin:end] = _by_cudnn(part, weight, stride, padding, tf32)
    return out


def _by_cudnn(x: Tensor, weight: Tensor, stride: Sequence[int], padding: int, tf32: bool) -> Tensor:
    """One call of cuDNN: in two dimensions, for which it has more kernels, where time has one."""
    over_time = weight.shape[1] > 1
    if over_time:
        given, kernel = x.permute(3, 0, 1, 2)[None], weight.permute(0, 4, 1, 2, 3)
        strides, padded = [stride[0], stride[1], stride[1]], [0, padding, padding]
    else:
        given, kernel = x.permute(0, 3, 1, 2), weight[:, 0].permute(0, 3, 1, 2)
        strides, padded = [stride[1]] * 2, [padding] * 2
    if x.dtype == torch.float32 and not tf32:  # for which cuDNN's kernels want channels first
        given, kernel = given.contiguous(), kernel.contiguous()
    ones = [1] * len(strides)
    out = torch.ops.aten.cudnn_convolution(
        given, kernel, padded, strides, ones, 1, False, True, tf32
    )
    return (out[0].permute(1, 2, 3, 0) if over_time else out.permute(0, 2, 3, 1)).contiguous()


_library.impl("convolution", _on_cpu, "CPU")
_library.impl("convolution", _on_gpu, "CUDA")


@torch.library.register_fake("wanexport::convolution", lib=_library)  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, stride: Sequence[int], padding: int, tf32: bool) -> Tensor:
    return x.new_empty(_shape(x, weight, stride, padding))
