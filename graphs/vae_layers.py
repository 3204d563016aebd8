"""The layers of Wan's VAEs on tensors [frames, height, width, channels].

Every convolution is a call of one operator, whose layout, channels last, is fixed; a bias is added
by what follows it, in fp32. Norms and SiLU are computed in fp32 too, and rounded once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanexport.runtime.engines.convolution import convolution
from wanexport.runtime.engines.operators import attention
from wanexport.runtime.wan_vae import Layer

_ALIGNED = 8  # channels: what half-precision kernels take without padding of their own


class Kernel(nn.Module):
    """Weight and bias of a convolution, or of a product where the weight is a matrix."""

    def __init__(self, shape: tuple[int, ...], *, tf32: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0]))
        self.tf32 = tf32

    def product(self, x: Tensor) -> Tensor:
        """x [.., in] times the matrix, without the bias."""
        return F.linear(x, self.weight)

    def of_frames(self, x: Tensor, *, stride: int = 1, padding: int = 1) -> Tensor:
        """Each frame by itself, without the bias."""
        return convolution(x, self.weight, stride=(1, stride), padding=padding, tf32=self.tf32)

    def over_time(self, x: Tensor, state: Tensor, *, stride: int = 1) -> Tensor:
        """Frames x after those in state, which becomes the last of all; without the bias.

        What makes x writes it behind the kept frames, where the convolution reads both: beside a
        buffer of each convolution's own, whose head is the state, this copies the kept frames twice
        and not once, and needs the memory of one buffer.
        """
        history = torch.cat([state, x])
        state.copy_(history[-len(state) :])
        padding = self.weight.shape[2] // 2
        weight = self._aligned()
        out = convolution(history, weight, stride=(stride, 1), padding=padding, tf32=self.tf32)
        return out[..., : len(self.weight)]

    def _aligned(self) -> Tensor:
        """The weight with channels of zeros behind it, where half precision needs a multiple."""
        missing = -len(self.weight) % _ALIGNED
        if self.weight.dtype == torch.float32 or not missing:
            return self.weight
        return F.pad(self.weight, (0, 0) * 4 + (0, missing))


class Norm(nn.Module):
    """Each pixel's channels divided by their length, times gamma and the root of their number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """The norm in fp32."""
        wide = x.float()
        length = wide.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
        return wide / length * len(self.gamma) ** 0.5 * self.gamma


@dataclass(frozen=True)
class Place:
    """A layer with its modules and state, by the names that follow its own."""

    layer: Layer
    modules: Callable[[str], nn.Module]
    states: Mapping[str, Tensor]
    is_first: bool  # the first frame, alone

    def kernel(self, name: str = "") -> Kernel:
        """A convolution or product of the layer."""
        found = self.modules(self._full(name))
        assert isinstance(found, Kernel)
        return found

    def activated(self, name: str, x: Tensor) -> Tensor:
        """SiLU of a norm of the layer, rounded to x's dtype."""
        return F.silu(self.normed(name, x)).to(x.dtype)

    def normed(self, name: str, x: Tensor) -> Tensor:
        """A norm of the layer, in fp32."""
        norm: Tensor = self.modules(self._full(name))(x)
        return norm

    def over_time(self, x: Tensor, name: str = "", *, stride: int = 1) -> Tensor:
        """A convolution over time, without its bias."""
        return self.kernel(name).over_time(x, self.state(name), stride=stride)

    def state(self, name: str) -> Tensor:
        """The frames that a convolution keeps."""
        return self.states[self._full(name)]

    def _full(self, name: str) -> str:
        return ".".join(part for part in (self.layer.name, name) if part)


def biased(x: Tensor, *others: Tensor) -> Tensor:
    """The sum with biases and residuals in fp32, rounded to x's dtype."""
    total = x.float()
    for other in others:
        total = total + other.float()
    return total.to(x.dtype)


def conv(place: Place, x: Tensor) -> Tensor:
    """A convolution over time and space."""
    return biased(place.over_time(x), place.kernel().bias)


def resnet(place: Place, x: Tensor) -> Tensor:
    """Two convolutions, each after a norm and SiLU, beside the input or a product of it."""
    y = place.over_time(place.activated("norm1", x), "conv1")
    y = biased(y, place.kernel("conv1").bias)
    y = place.over_time(place.activated("norm2", y), "conv2")
    if place.layer.inner == place.layer.outer:
        return biased(y, place.kernel("conv2").bias, x)
    beside = place.kernel("conv_shortcut")
    return biased(y, place.kernel("conv2").bias, beside.product(x), beside.bias)


def frame_attention(place: Place, x: Tensor) -> Tensor:
    """Attention of the pixels of each frame to one another, with one head."""
    frames, height, width, channels = x.shape
    qkv, proj = place.kernel("to_qkv"), place.kernel("proj")
    y = qkv.product(place.normed("norm", x).to(x.dtype))
    rows = biased(y, qkv.bias).view(frames, height * width, 1, 3, channels)
    q, k, v = (rows[:, :, :, i].contiguous() for i in range(3))
    out = attention(q, k, v, "frame")
    return biased(proj.product(out.view(x.shape)), proj.bias, x)


def up(place: Place, x: Tensor) -> Tensor:
    """Twice the height and width, of twice the frames where the layer is temporal.

    Not of the first frame: it stays one, and no convolution over time sees it.
    """
    if place.layer.temporal and not place.is_first:
        y = biased(place.over_time(x, "time_conv"), place.kernel("time_conv").bias)
        frames, height, width, channels = x.shape
        y = y.view(frames, height, width, 2, channels)  # both frames of each
        x = y.permute(0, 3, 1, 2, 4).reshape(2 * frames, height, width, channels)
    kernel = place.kernel("resample.1")
    return biased(kernel.of_frames(_doubled(x)), kernel.bias)


def _doubled(x: Tensor) -> Tensor:
    """Each pixel four times: the nearest of twice the height and width."""
    frames, height, width, channels = x.shape
    x = x[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    return x.reshape(frames, 2 * height, 2 * width, channels)


def down(place: Place, x: Tensor) -> Tensor:
    """Half the height and width, and where the layer is temporal half the frames.

    Not of the first frame, which the convolution over time keeps as it is.
    """
    kernel = place.kernel("resample.1")
    padded = F.pad(x, (0, 0, 0, 1, 0, 1))
    x = biased(kernel.of_frames(padded, stride=2, padding=0), kernel.bias)
    if not place.layer.temporal:
        return x
    if place.is_first:
        place.state("time_conv").copy_(x)
        return x
    return biased(place.over_time(x, "time_conv", stride=2), place.kernel("time_conv").bias)


def head(place: Place, x: Tensor) -> Tensor:
    """A norm, SiLU and a convolution over time and space, in fp32 from its bias on."""
    y = place.over_time(place.activated("norm_out", x), "conv_out")
    return y.float() + place.kernel("conv_out").bias


LAYERS: dict[str, Callable[[Place, Tensor], Tensor]] = {
    "conv": conv,
    "resnet": resnet,
    "attention": frame_attention,
    "up": up,
    "down": down,
    "head": head,
}


def averaged(x: Tensor, time: int, space: int, channels: int) -> Tensor:
    """The means of groups of what time x space x space values of each channel are in one place.

    A first frame, which is alone, has zeros before it.
    """
    missing = -len(x) % time
    x = F.pad(x, (0, 0, 0, 0, 0, 0, missing, 0)) if missing else x
    frames, height, width, inner = x.shape
    sizes = (frames // time, time, height // space, space, width // space, space, inner)
    x = x.float().view(sizes).permute(0, 2, 4, 6, 1, 3, 5)
    return x.reshape(sizes[0], sizes[2], sizes[4], channels, -1).mean(-1)


def repeated(x: Tensor, time: int, space: int, channels: int, *, is_first: bool) -> Tensor:
    """Each channel's value in time x space x space places; a first frame stays one."""
    frames, height, width, inner = x.shape
    copies = channels * time * space**2 // inner
    x = x[..., None].expand(-1, -1, -1, -1, copies)
    x = x.reshape(frames, height, width, channels, time, space, space)
    x = x.permute(0, 4, 1, 5, 2, 6, 3)
    x = x.reshape(frames * time, height * space, width * space, channels)
    return x[time - 1 :] if is_first else x
