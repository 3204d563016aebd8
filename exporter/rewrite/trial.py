"""Whether real arithmetic gives the bits of PyTorch's complex product, at given sizes, here."""

from functools import lru_cache

import torch
from torch import Tensor

_MOST = 1 << 22  # complex numbers of a trial; longer axes are cut, the last one never
_Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]


def product_is_exact(first: Tensor, second: Tensor) -> str | None:
    """Why a product of tensors of these sizes, strides and types is not exact; None if it is."""
    if first.device.type == "meta":
        return "its tensors have no data, so its rounding cannot be tried"
    product = torch.broadcast_shapes(first.shape, second.shape)
    layouts = [_layout(value.expand(product)) for value in (first, second)]
    if _try(layouts[0], layouts[1], first.device):
        return None
    return (
        f"PyTorch's {first.dtype} product of rows of {layouts[0][1][-1]} rounds otherwise than two "
        f"real products and a sum, on this {first.device.type}"
    )


def _layout(value: Tensor) -> _Layout:
    sizes = [n if isinstance(n, int) else int(n.node.hint) for n in value.shape]
    strides = [n if isinstance(n, int) else int(n.node.hint) for n in value.stride()]
    while len(sizes) > 1 and torch.Size(sizes).numel() > _MOST:
        longest = max(range(len(sizes) - 1), key=lambda i: sizes[i])
        if sizes[longest] < 2:
            break
        sizes[longest] //= 2
    return value.dtype, tuple(sizes), tuple(strides)


@lru_cache(maxsize=256)
def _try(first: _Layout, second: _Layout, device: torch.device) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    x, y = (_random(layout, generator, device) for layout in (first, second))
    product = torch.view_as_real(x * y)
    (a, b), (c, d) = (torch.view_as_real(value).unbind(-1) for value in (x, y))
    return torch.equal(product, torch.stack([a * c - b * d, a * d + b * c], dim=-1))


def _random(layout: _Layout, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random complex numbers in this layout, over many powers of two."""
    dtype, sizes, strides = layout
    length = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides))
    values = torch.randn(length, 2, dtype=dtype.to_real(), generator=generator, device=device)
    return torch.view_as_complex(values).as_strided(sizes, strides)
