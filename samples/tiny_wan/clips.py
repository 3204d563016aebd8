"""Captions, and the clips that they describe: one coloured shape moves over a dark background.

A caption fixes shape, colour and direction; size, place and speed are drawn at random, such that
the shape stays in the picture and its motion is plain to see.
"""

from itertools import product

import torch
from torch import Tensor

SIDE, FRAMES = 96, 17  # pixels, frames: 12 x 12 x 5 for Wan's strides
BACKGROUND = (0.08, 0.08, 0.12)  # RGB in [0, 1]
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.80, 0.25),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y; y is down
# What a shape of size 1 reaches from its centre of mass, along x and y: left, right, up, down.
_REACH = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (0.9, 0.9, 0.9, 0.9),
    "triangle": (1.2124, 1.2124, 1.4, 0.7),  # equilateral, of circumradius 1.4
}
SHAPES = tuple(_REACH)
SIZE = (14.0, 20.0)  # pixels
TRAVEL = (26.0, 36.0)  # pixels from the first frame to the last
_MARGIN = 2.0  # pixels that stay free at the picture's edge
CAPTIONS = tuple(
    f"a {colour} {shape} moves {direction}"
    for shape, colour, direction in product(SHAPES, COLOURS, DIRECTIONS)
)

TWELVE = tuple(  # for a contact sheet: every shape in every colour, with all directions
    f"a {colour} {shape} moves {list(DIRECTIONS)[(row + column) % len(DIRECTIONS)]}"
    for row, shape in enumerate(SHAPES)
    for column, colour in enumerate(COLOURS)
)


def meaning(caption: str) -> tuple[str, str, str]:
    """Shape, colour and direction of a caption."""
    _, colour, shape, _, direction = caption.split()
    return shape, colour, direction


def draw(captions: Tensor, generator: torch.Generator) -> Tensor:
    """Clips [B, 3, F, H, W] in [-1, 1] for indices [B] into CAPTIONS, on the generator's device."""
    device = generator.device
    captions = captions.to(device)
    shapes = captions // (len(COLOURS) * len(DIRECTIONS))
    colours = captions // len(DIRECTIONS) % len(COLOURS)
    directions = captions % len(DIRECTIONS)

    def uniform(low: float | Tensor, high: float | Tensor) -> Tensor:
        return low + (high - low) * torch.rand(len(captions), generator=generator, device=device)

    size, travel = uniform(*SIZE), uniform(*TRAVEL)
    step = torch.tensor(list(DIRECTIONS.values()), device=device)[directions]  # [B, 2]
    reach = size[:, None] * torch.tensor(list(_REACH.values()), device=device)[shapes] + _MARGIN
    moved = travel[:, None] * step  # [B, 2], the whole path
    start = [
        uniform(
            reach[:, 2 * axis] + (-moved[:, axis]).clamp(min=0),
            SIDE - reach[:, 2 * axis + 1] - moved[:, axis].clamp(min=0),
        )
        for axis in (0, 1)
    ]
    time = torch.linspace(0, 1, FRAMES, device=device)
    centre = torch.stack(start, 1)[:, None] + time[:, None] * moved[:, None]  # [B, F, 2]
    covered = _coverage(shapes, size, centre)[:, None]  # [B, 1, F, H, W]
    ground, paint = torch.tensor(BACKGROUND), torch.tensor(list(COLOURS.values()))
    ground = ground.to(device).view(1, 3, 1, 1, 1)
    paint = paint.to(device)[colours].view(-1, 3, 1, 1, 1)
    return (ground + covered * (paint - ground)) * 2 - 1


def _coverage(shapes: Tensor, size: Tensor, centre: Tensor) -> Tensor:
    """Share [B, F, H, W] of each pixel that is covered, from the distance to the shape's edge."""
    pixel = torch.arange(SIDE, device=size.device) + 0.5
    x = pixel[None, None, None, :] - centre[..., 0, None, None]  # [B, F, 1, W]
    y = pixel[None, None, :, None] - centre[..., 1, None, None]  # [B, F, H, 1]
    size = size[:, None, None, None]
    circle = (x.square() + y.square()).sqrt() - _REACH["circle"][0] * size
    square = torch.maximum(x.abs(), y.abs()) - _REACH["square"][0] * size
    # Half planes: below, and to the upper left and right, at the inradius from the centre.
    slanted = x.abs() * (3**0.5 / 2) - y / 2
    triangle = torch.maximum(y, slanted) - _REACH["triangle"][3] * size
    edge = torch.where(shapes.view(-1, 1, 1, 1) == 0, circle, square)
    edge = torch.where(shapes.view(-1, 1, 1, 1) == 2, triangle, edge)
    return (0.5 - edge).clamp(0, 1)
