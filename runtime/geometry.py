"""Video geometry: which resolutions and frame counts Wan accepts, and what they become."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral

from wanexport.runtime.decode import SPARSE
from wanexport.runtime.errors import BadRequest

PATCH = 2  # the patch embedding's stride along height and width
MAX_PIXELS = 16384  # of a side, and frames: over ten times what any Wan was trained for
TEMPORAL_STRIDE = 4  # pixel frames per latent frame, after the first

Resolution = str | tuple[int, int] | list[int]  # what `parse_resolution` understands


@dataclass(frozen=True)
class Geometry:
    """A video of height x width pixels and `frames` frames, seen through a VAE.

    `spatial_stride` is the VAE's pixels per latent pixel: 8 for Wan2.1, 16 for Wan2.2's 5B.
    With `chunk`, a call computes so many latent frames of the video, whose sizes `latent`, `grid`
    and `num_tokens` then are, and `cache` is how many it may attend to, its own among them.
    Raises BadRequest, naming the nearest legal values, when Wan has no such geometry.
    """

    height: int
    width: int
    frames: int
    spatial_stride: int = 8
    chunk: int = field(default=0, metadata=SPARSE)
    cache: int = field(default=0, metadata=SPARSE)

    def __post_init__(self) -> None:
        video = (self.height, self.width, self.frames, self.spatial_stride)
        numbers = (*video, self.chunk, self.cache)
        if any(type(n) is not int for n in numbers) or self.spatial_stride < 1:
            raise BadRequest(f"{numbers} is no video: expected whole height, width and frames")
        if max(numbers) > MAX_PIXELS:
            raise BadRequest(
                f"{self.name} (height x width x frames) is beyond any Wan: "
                f"expected at most {MAX_PIXELS} of each"
            )
        side = PATCH * self.spatial_stride
        if self.height < side or self.width < side or self.height % side or self.width % side:
            near = " or ".join(
                f"{h}x{w}"
                for h, w in self._nearest_sides(side)
                if (h, w) != (self.height, self.width)
            )
            raise BadRequest(
                f"resolution {self.height}x{self.width} (height x width) is not legal: "
                f"both sides must be multiples of {side}; nearest: {near}"
            )
        if self.frames < 1 or (self.frames - 1) % TEMPORAL_STRIDE:
            near = " or ".join(map(str, nearest_frames(self.frames)))
            raise BadRequest(f"{self.frames} frames are not legal: expected 4k+1; nearest: {near}")
        if (self.chunk or self.cache) and not 1 <= self.chunk <= self.cache:
            raise BadRequest(
                f"a chunk of {self.chunk} latent frames and a cache of {self.cache}: expected a "
                f"chunk from 1, and a cache of at least as many"
            )

    def _nearest_sides(self, side: int) -> list[tuple[int, int]]:
        lower = tuple(max(side, n // side * side) for n in (self.height, self.width))
        upper = tuple(max(side, -(-n // side) * side) for n in (self.height, self.width))
        return [(lower[0], lower[1])] + ([(upper[0], upper[1])] if upper != lower else [])

    @property
    def name(self) -> str:
        """The folder name of this geometry: heightxwidthxframes, and chunk and cache if any."""
        chunks = f"-chunk{self.chunk}-cache{self.cache}" if self.chunk else ""
        return f"{self.height}x{self.width}x{self.frames}{chunks}"

    @property
    def options(self) -> str:
        """The options of a build that ask for it."""
        chunks = f" --chunk {self.chunk} --cache {self.cache}" if self.chunk else ""
        return f"--resolution {self.height}x{self.width} --frames {self.frames}{chunks}"

    @property
    def clip_frames(self) -> int:
        """Latent frames of the whole video."""
        return latent_count(self.frames)

    @property
    def latent(self) -> tuple[int, int, int]:
        """Latent frames, height and width of a call."""
        frames = self.chunk or self.clip_frames
        return frames, self.height // self.spatial_stride, self.width // self.spatial_stride

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along frames, rows and columns."""
        frames, height, width = self.latent
        return frames, height // PATCH, width // PATCH

    @property
    def num_tokens(self) -> int:
        """The DiT's sequence length L."""
        return self.grid[0] * self.frame_tokens

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        _, rows, columns = self.grid
        return rows * columns

    @property
    def slots(self) -> int:
        """Latent frames that the cache has room for; the last is for what fills a chunk up.

        Without such room when a chunk is one frame, which is never filled up.
        """
        return self.cache + (self.chunk > 1)

    def reduced(self, max_tokens: int) -> "Geometry":
        """A geometry of at most max_tokens: the longest token axis is halved until it fits.

        That of chunks has a cache of few frames.
        """
        grid = list(self.grid)
        while grid[0] * grid[1] * grid[2] > max_tokens:
            # What a chunk is, a proof at another size keeps as long as it can.
            first = int(self.chunk > 0 and max(grid[1:]) > 1)
            grid[grid.index(max(grid[first:]), first)] //= 2
        side = PATCH * self.spatial_stride
        sides = {"height": grid[1] * side, "width": grid[2] * side}
        if self.chunk:
            cache = min(self.cache, 2 * self.chunk + 1)
            return replace(self, **sides, chunk=grid[0], cache=max(grid[0], cache))
        return replace(self, **sides, frames=(grid[0] - 1) * TEMPORAL_STRIDE + 1)


def latent_count(frames: int) -> int:
    """The latent frames of 4k+1 pixel frames: the first alone, then one for each four."""
    return (frames - 1) // TEMPORAL_STRIDE + 1


def nearest_frames(frames: int) -> tuple[int, int]:
    """The legal numbers of frames, 4k+1, below and above one that is not."""
    low = max(1, (frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
    return low, low + TEMPORAL_STRIDE


def parse_resolution(resolution: Resolution) -> tuple[int, int]:
    """The height and width that a resolution names, in pixels.

    It is `480x832` (height x width), Wan's own `832*480` (width * height), or a tuple or list of
    two whole numbers, (height, width). Raises BadRequest for anything else.
    """
    if isinstance(resolution, tuple | list):
        return _sides(resolution)
    match = re.fullmatch(r"(\d{1,9})([xX*])(\d{1,9})", str(resolution).strip())
    if match is None:
        raise _not_understood(str(resolution)[:40])
    first, second = int(match[1]), int(match[3])
    return (second, first) if match[2] == "*" else (first, second)


def _sides(sides: Sequence[object]) -> tuple[int, int]:
    whole = [int(n) for n in sides if isinstance(n, Integral) and not isinstance(n, bool)]
    if len(whole) != len(sides) or len(whole) != 2 or min(whole) < 0:
        raise _not_understood(sides)
    return whole[0], whole[1]


def _not_understood(resolution: object) -> BadRequest:
    return BadRequest(
        f"resolution {resolution!r:.60} is not understood: write HEIGHTxWIDTH as in 480x832, Wan's "
        f"WIDTH*HEIGHT as in 832*480, or (height, width) in Python"
    )
