"""Whether the parts of an axis that are written make up all of it, and how they are put together.

Numbers only: programs and ONNX graphs both ask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_WHOLE = 2**63 - 1  # what a slice without an end says


@dataclass(frozen=True)
class Part:
    """The indices start, start + step, ... below stop, of an axis."""

    start: int
    stop: int
    step: int

    def __str__(self) -> str:
        """As Python writes a slice."""
        return f"{self.start}:{self.stop}" + (f":{self.step}" if self.step != 1 else "")

    @property
    def indices(self) -> range:
        """The indices themselves."""
        return range(self.start, self.stop, self.step)


@dataclass(frozen=True)
class Arrangement:
    """The parts in order: to be stacked on a new axis behind theirs, or joined along it."""

    order: tuple[int, ...]
    is_stack: bool


def part_of(size: int, start: int | None, stop: int | None, step: int) -> Part:
    """A slice of an axis, with its bounds counted from the front and inside the axis."""
    bounds = slice(start, None if stop is not None and stop >= _WHOLE else stop, step)
    return Part(*bounds.indices(size))


def part_of_indices(indices: Sequence[int]) -> Part | None:
    """The slice that has these indices in their order; None when none has."""
    if not indices:
        return None
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    found = Part(indices[0], indices[-1] + 1, step)
    return found if step > 0 and list(found.indices) == list(indices) else None


def arrange(size: int, parts: Sequence[Part]) -> Arrangement | str:
    """How the parts of an axis of this size are put together, or why they cannot be."""
    shown = ", ".join(map(str, parts))
    counted = [i for part in parts for i in part.indices]
    if len(set(counted)) < len(counted):
        return f"the writes {shown} overlap on an axis of {size}"
    if len(counted) != size:
        return f"the writes {shown} leave {size - len(counted)} of an axis of {size}"
    order = tuple(sorted(range(len(parts)), key=lambda i: parts[i].start))
    if all(part.step == 1 or len(part.indices) == 1 for part in parts):
        return Arrangement(order, is_stack=False)
    if {part.step for part in parts} == {len(parts)} and size % len(parts) == 0:
        return Arrangement(order, is_stack=True)
    return f"the writes {shown} are neither of one stride nor contiguous"
