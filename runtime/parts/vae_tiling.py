"""A VAE over parts of a picture instead of the whole, where memory does not do for the whole.

Tiles overlap and are blended, which changes the result: at the edge of a tile the VAE sees zeros
where the picture goes on, and its attention sees one tile. This does the same for every version of
diffusers; the tiling of its AutoencoderKLWan does not fit Wan2.2's VAE in 0.35.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def run_tiled(
    function: Callable[[Tensor], Tensor],
    batch: Tensor,
    *,
    tile: int,
    overlap: int,
    scale_in: int,
    scale_out: int,
) -> Tensor:
    """Call function on overlapping tiles of batch [1, C, F, H, W]; the results' blend, on the CPU.

    tile and overlap are in units of which a side of batch has scale_in pixels and one of the result
    scale_out. Weights fall linearly to the edge of a tile, and the sum of weights is divided out.
    """
    height, width = (side // scale_in for side in batch.shape[3:])
    blend, total = None, torch.zeros(height * scale_out, width * scale_out)
    for rows in _spans(height, tile, overlap):
        for columns in _spans(width, tile, overlap):
            part = function(batch[..., _scaled(rows, scale_in), _scaled(columns, scale_in)]).cpu()
            if blend is None:
                blend = part.new_zeros(*part.shape[:3], *total.shape)
            weight = torch.outer(*(_ramp(n, overlap * scale_out) for n in part.shape[3:]))
            area = (..., _scaled(rows, scale_out), _scaled(columns, scale_out))
            blend[area] += part.mul_(weight)
            total[area] += weight
    assert blend is not None
    return blend.div_(total)


def _spans(length: int, tile: int, overlap: int) -> list[slice]:
    """Parts of `tile`, or less where length is, that overlap by `overlap` or more."""
    last = max(0, length - tile)
    starts = [*range(0, last, tile - overlap), last]
    return [slice(start, min(start + tile, length)) for start in starts]


def _scaled(span: slice, scale: int) -> slice:
    return slice(span.start * scale, span.stop * scale)


def _ramp(length: int, overlap: int) -> Tensor:
    """Weights of a tile's pixels along one side: 1 inside, less within `overlap` of an edge."""
    position = torch.arange(1, length + 1)
    return torch.minimum(position, position.flip(0)).div(overlap + 1).clamp(max=1)
