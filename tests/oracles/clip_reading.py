"""Reads shape, colour and direction of a clip by image moments, which know nothing of how it arose.

Analytic values, for a shape of uniform density about its centre of mass (y points down): a circle
has E[x^2 y^2] / (E[x^2] E[y^2]) = 2/3 and a square 1; both have no skewness of y, and an
equilateral triangle that points up has -0.566: its mass lies low, its apex far.
"""

from collections.abc import Sequence

import numpy as np

from samples.tiny_wan.clips import COLOURS, meaning

Reading = tuple[str, str, str]  # shape, colour, direction
FAINTEST = 60  # distance from the background, of 255, below which nothing is a shape


def foreground(video: np.ndarray) -> np.ndarray:
    """Where uint8 [F, H, W, 3] differs from the background, which is the picture's median."""
    ground = np.median(video.reshape(-1, 3), axis=0)
    distance = np.linalg.norm(video.astype(np.float64) - ground, axis=-1)
    return distance > max(FAINTEST, np.quantile(distance, 0.995) / 2)


def read_colour(video: np.ndarray, mask: np.ndarray) -> str:
    """The colour nearest to the foreground's mean."""
    mean = video[mask].mean(axis=0) / 255
    return min(COLOURS, key=lambda name: float(np.linalg.norm(mean - COLOURS[name])))


def centroid(mask: np.ndarray) -> np.ndarray:
    """x and y of a frame's foreground, in pixels."""
    y, x = np.nonzero(mask)
    return np.array([x.mean(), y.mean()])


def read_direction(mask: np.ndarray) -> str:
    """Where the centroid goes from the first frame to the last."""
    x, y = centroid(mask[-1]) - centroid(mask[0])
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "up" if y < 0 else "down"


def moments(mask: np.ndarray) -> tuple[float, float]:
    """Skewness of y, and E[x^2 y^2] / (E[x^2] E[y^2]), of a frame's foreground."""
    y, x = np.nonzero(mask)
    x, y = x - x.mean(), y - y.mean()
    xx, yy = (x**2).mean(), (y**2).mean()
    return float((y**3).mean() / yy**1.5), float((x**2 * y**2).mean() / (xx * yy))


def read_shape(mask: np.ndarray) -> str:
    """The shape whose analytic moments are nearest to the median over the frames."""
    skewness, together = np.median([moments(frame) for frame in mask], axis=0)
    if skewness < -0.566 / 2:
        return "triangle"
    return "square" if together > (2 / 3 + 1) / 2 else "circle"


def read(video: np.ndarray) -> Reading | None:
    """What a clip shows, or None where a frame shows nothing."""
    mask = foreground(video)
    if (mask.sum(axis=(1, 2)) < 20).any():
        return None
    return read_shape(mask), read_colour(video, mask), read_direction(mask)


def share_read_right(videos: Sequence[np.ndarray], captions: Sequence[str]) -> float:
    """The share of clips in which shape, colour and direction are all the caption's."""
    right = [read(v) == meaning(c) for v, c in zip(videos, captions, strict=True)]
    return sum(right) / len(right)
