"""Where the tensors of a weights file lie in memory when layers are streamed: each in one piece.

A part holds the parameters of one layer of the call that repeats, or all others. A copy of a layer
is then one copy, which a GPU does at the full rate of its bus.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.program import LAYER, Call, Program

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

    def layer_of(self, names: Iterable[str]) -> int | None:
        """The number of the layer that has one of these tensors, None where none has."""
        has = (i for n in names for i, part in enumerate(self.layers) if n in part.offsets)
        return next(has, None)

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
    repeats most, with what any call reads as that layer's own. What a call reads without a layer's
    number, or as two layers', is no part of one."""
    call = _repeated(program)
    if call is None:
        return Parts("", (), part_of(entries))
    stems = {name.partition(LAYER)[0] for name in call.parameters if LAYER in name}
    owners = dict[str, set[int | None]]()
    for other in program.calls:
        for number, (names, _) in zip(other.numbers, other.layers(), strict=True):
            for template, name in zip(other.parameters, names, strict=True):
                stem, layer, _ = template.partition(LAYER)
                owners.setdefault(name, set()).add(number if layer and stem in stems else None)
    layers: list[dict[str, TensorEntry]] = [{} for _ in range(call.numbers.stop)]
    rest = dict[str, TensorEntry]()
    for name, entry in entries.items():
        numbers = owners.get(name, set())
        of_layer = [n for n in numbers if n is not None and n < len(layers) and len(numbers) == 1]
        (layers[of_layer[0]] if of_layer else rest)[name] = entry
    return Parts(call.name, tuple(map(part_of, layers)), part_of(rest))


def _repeated(program: Program) -> Call | None:
    calls = [call for call in program.calls if call.when == "step" and call.repeat > 1]
    return max(calls, key=lambda call: call.repeat, default=None)
