"""Where the tensors of a weights file lie in memory when layers are streamed: each in one piece.

A part holds the parameters of one layer of the call that repeats, or all others. A copy of a layer
is then one copy, which a GPU does at the full rate of its bus.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.program import Call, Program

ALIGNMENT = 256  # bytes: what compiled kernels expect, and the caching allocator gives


@dataclass(frozen=True)
class Part:
    """Tensors that lie one after the other: the offset of each, and the bytes of all."""

    offsets: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class Parts:
    """One part for each layer of a call, whose number it has, and one for all other tensors.

    `call` is the call's name, empty where none repeats: there are no layers then.
    """

    call: str
    layers: tuple[Part, ...]
    rest: Part

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest layer, which any layer's buffer has."""
        return max((part.size for part in self.layers), default=0)

    @property
    def size(self) -> int:
        """Bytes of all."""
        return self.rest.size + sum(part.size for part in self.layers)


def part_of(entries: Mapping[str, TensorEntry]) -> Part:
    """These tensors, one after the other."""
    offsets, end = {}, 0
    for name, entry in entries.items():
        offsets[name] = end
        end += -(-entry.size // ALIGNMENT) * ALIGNMENT
    return Part(offsets, end)


def parts_of(entries: Mapping[str, TensorEntry], program: Program) -> Parts:
    """The parts of a weights file for a Program: its layers are those of the step's call that
    repeats most. What another call reads too is no part of a layer."""
    call = _repeated(program)
    if call is None:
        return Parts("", (), part_of(entries))
    others = {name for c in program.calls if c is not call for own, _ in c.layers() for name in own}
    layers = [
        {name: entries[name] for name in names if name in entries and name not in others}
        for names, _ in call.layers()
    ]
    streamed = {name for layer in layers for name in layer}
    rest = {name: entry for name, entry in entries.items() if name not in streamed}
    return Parts(call.name, tuple(map(part_of, layers)), part_of(rest))


def _repeated(program: Program) -> Call | None:
    calls = [call for call in program.calls if call.when == "step" and call.repeat > 1]
    return max(calls, key=lambda call: call.repeat, default=None)
