"""Which numbers of a graph may differ between two sizes of video: those of the token grid."""

from collections.abc import Sequence

import numpy as np

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry


class Grid:
    """The token grids of an engine's size and of its proof's, which holds one to the other."""

    def __init__(self, full: Geometry, small: Geometry) -> None:
        self.lengths = tuple(zip(_lengths(full), _lengths(small)))

    def count_differing(self, call: str, full: Sequence[int], small: Sequence[int]) -> int:
        """How many of these integers differ.

        Raises WanExportError unless those that do are the same multiple of a length of the grid at
        both sizes.
        """
        check_same(call, len(full), len(small))
        differing = [(a, b) for a, b in zip(full, small) if a != b]
        for one, two in differing:
            if not any(one % a == 0 and one // a * b == two for a, b in self.lengths):
                raise differs(call, f"the integer {one}", f"{two}, which is not of the token grid")
        return len(differing)

    def check_table(self, call: str, full: np.ndarray, small: np.ndarray) -> None:
        """Raise WanExportError unless constants are equal; one may be longer by rows of the grid.

        Such tables differ in the length of one axis, and agree in the rows that both have.
        """
        axes = [axis for axis, (a, b) in enumerate(zip(full.shape, small.shape)) if a != b]
        if full.ndim > 1 and full.ndim == small.ndim and len(axes) == 1:
            lengths = full.shape[axes[0]], small.shape[axes[0]]
            self.count_differing(call, lengths[:1], lengths[1:])
            full, small = (table.take(range(min(lengths)), axes[0]) for table in (full, small))
        check_same(call, (full.dtype, full.shape), (small.dtype, small.shape))
        if unlike := np.argwhere(full != small).tolist():
            place = tuple(unlike[0])
            raise differs(call, f"a constant of {full[place]}", f"one of {small[place]}")


def _lengths(geometry: Geometry) -> tuple[int, ...]:
    """What the token grid's sizes are made of: its sides, products of neighbours, and the cache."""
    frames, rows, columns = geometry.grid
    kept = (geometry.slots * rows * columns, geometry.slots) if geometry.chunk else ()
    return (frames * rows * columns, frames * rows, rows * columns, frames, rows, columns, *kept)


def check_same(call: str, full: object, small: object) -> None:
    """Raise WanExportError unless both are equal."""
    if full != small:
        raise differs(call, str(full), str(small))


def differs(call: str, full: str, small: str) -> WanExportError:
    """That a call is not the same at both sizes."""
    return WanExportError(
        f"{call} has {full:.120} at the engine's size and {small:.120} at the proof's: what the "
        f"proof runs is not this engine; please report this"
    )
