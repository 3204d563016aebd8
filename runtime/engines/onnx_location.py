"""Rename the file that an ONNX graph's external tensors lie in, in the bytes of the graph.

ONNX Runtime opens external data only in the folder that it is told, links followed. In the hub's
cache the file there is called by its hash, so the graph must call it so; the onnx package, which
could say that, is not part of an installation that only runs engines.

The format: https://protobuf.dev/programming-guides/encoding/, field numbers of onnx.proto.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

_BYTES = 2  # the wire type of strings and messages, which follow their length
_MAX_DEPTH = 100  # protobuf's own limit on messages in messages
_ENTRY = "external data"
_MESSAGES = {  # message -> its fields that may hold external data, and the message that they are
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        **{5: "tensor", 10: "tensor", 6: "graph", 11: "graph"},
        **{22: "sparse tensor", 23: "sparse tensor"},
    },
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: _ENTRY},
}


class _Field(NamedTuple):
    """One field of a message: the bytes from `start` to `end`, its content from `content` on."""

    number: int
    wire: int
    start: int
    content: int
    end: int


def with_location(graph: bytes, location: str) -> bytes:
    """The graph with all its external data in the file of this name; it has to be in one file.

    Raises ValueError when the bytes are no graph, or name several files.
    """
    wanted, named = os.fsencode(location), set[bytes]()

    def rename(entry: memoryview) -> memoryview | bytes:
        fields = {field.number: field for field in _fields(entry)}
        values = {n: bytes(entry[f.content : f.end]) for n, f in fields.items()}
        if values.get(1) != b"location":
            return entry
        named.add(values.get(2, b""))
        return entry if values.get(2) == wanted else _encode(1, b"location") + _encode(2, wanted)

    try:
        renamed = _rewrite(memoryview(graph), "model", rename, 0)
    except (IndexError, ValueError) as error:
        raise ValueError(f"it is no ONNX graph ({error})") from error
    if len(named) > 1:
        names = ", ".join(repr(name)[1:50] for name in sorted(named)[:3])
        raise ValueError(f"its weights lie in {len(named)} files ({names}), expected one")
    return bytes(renamed)


def _rewrite(
    message: memoryview, kind: str, rename: Callable[[memoryview], memoryview | bytes], depth: int
) -> memoryview | bytes:
    """The message with every entry within it renamed; itself where none changed."""
    if kind == _ENTRY:
        return rename(message)
    if depth > _MAX_DEPTH:
        raise ValueError("messages are nested too deep")
    parts: list[memoryview | bytes] = []
    kept = 0  # of the message, what was written
    for field in _fields(message):
        inner = _MESSAGES[kind].get(field.number) if field.wire == _BYTES else None
        if inner is None:
            continue
        content = message[field.content : field.end]
        changed = _rewrite(content, inner, rename, depth + 1)
        if changed is not content:
            parts += [message[kept : field.start], _encode(field.number, changed)]
            kept = field.end
    return b"".join([*parts, message[kept:]]) if parts else message


def _fields(message: memoryview) -> Iterator[_Field]:
    """Every field in order. Raises IndexError or ValueError when the message is none."""
    position, size = 0, len(message)
    while position < size:
        start = position
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        content = position
        if wire == 0:
            _, end = _varint(message, position)
        elif wire == _BYTES:
            length, content = _varint(message, position)
            end = content + length
        elif wire in (1, 5):
            end = position + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire} is unknown")
        if end > size or not number:
            raise ValueError("a field ends beyond its message")
        yield _Field(number, wire, start, content, end)
        position = end


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number has more than 10 bytes")


def _encode(number: int, content: memoryview | bytes) -> bytes:
    """A field that holds these bytes."""
    return b"".join([_to_varint(number << 3 | _BYTES), _to_varint(len(content)), content])


def _to_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
