"""Typed records of JSON that anybody may have written, each value within its bounds.

The bounds are annotations of the record's fields: `Annotated[int, Range(1, 9)]`. A field that a
record does not have is ignored, or kept in its `unknown`: a later version may have written it.
"""

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import cache
from math import isfinite
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

_MAX_DEPTH = 32  # of a manifest's 8 levels, and of what its free fields may hold
_MAX_ITEMS = 1000  # of a list or an object: ten times what any bundle has
_MAX_TEXT = 4096  # characters: Linux's longest path


_WORDS = {
    int: "a whole number from 0",
    float: "a number",
    bool: "true or false",
    str: f"a text of at most {_MAX_TEXT} characters",
    dict: f"an object of at most {_MAX_ITEMS} fields",
    tuple: f"a list of its length, or of at most {_MAX_ITEMS}",
}


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included."""

    least: float
    most: float


@dataclass(frozen=True)
class Text:
    """A pattern that a whole string has, None for any that can be printed; its longest length."""

    pattern: str | None
    at_most: int


@dataclass(frozen=True)
class Known:
    """The values of an object that are read, with their types; others may be anything."""

    hints: Mapping[str, Any]


# Of a field that is written only where it has another value than its default.
SPARSE: Mapping[str, Any] = {"sparse": True}

Size = Annotated[int, Range(0, 2**53 - 1)]  # what every reader of JSON holds exactly
Count = Annotated[int, Range(0, 2**100)]
Figure = Annotated[float, Range(0, 1e30)]
Name = Annotated[str, Text(r"[A-Za-z0-9][A-Za-z0-9._+-]*", 64)]
Line = Annotated[str, Text(None, 1000)]
Sha256 = Annotated[str, Text(r"[0-9a-f]{64}", 64)]


def parse_json(content: bytes) -> Any:
    """JSON of bounded depth, without NaN or Infinity, and without a name twice in an object.

    Raises ValueError for anything else.
    """
    try:
        data = json.loads(
            content.decode(), object_pairs_hook=_object, parse_constant=_refuse, parse_float=_float
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} deep") from None
    level = [data]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _items(outer)]
        if not level:
            return data
    raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")


def _items(outer: Any) -> list[Any]:
    values = outer.values() if isinstance(outer, dict) else outer
    if not isinstance(outer, dict | list):
        return []
    return [inner for inner in values if isinstance(inner, dict | list)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same name twice")
    return found


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _float(text: str) -> float:
    number = float(text)
    return number if isfinite(number) else _refuse(reprlib.repr(text))


def decode(hint: Any, data: Any, where: str) -> Any:
    """What the type hint says, of parsed JSON. Raises TypeError or ValueError, naming the place."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return data
    if origin is Annotated:
        decoded = decode(arguments[0], data, where)
        for bound in arguments[1:]:
            _check(bound, decoded, where)
        return decoded
    if origin in (UnionType, Union):  # X | None
        return None if data is None else decode(arguments[0], data, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return _decode_record(hint, data, where)
    if origin is dict and isinstance(data, dict) and len(data) <= _MAX_ITEMS:
        key, value = arguments
        return {decode(key, k, where): decode(value, v, f"{where}.{k}") for k, v in data.items()}
    if origin is tuple and isinstance(data, list) and len(data) <= _MAX_ITEMS:
        hints = arguments[:1] * len(data) if arguments[1:] == (...,) else arguments
        if len(hints) == len(data):
            items = enumerate(zip(hints, data))
            return tuple(decode(own, value, f"{where}[{i}]") for i, (own, value) in items)
    if hint is float and type(data) in (int, float) and abs(data) < 1e300:
        return float(data)
    if hint is int and type(data) is int and 0 <= data <= 2**100:
        return data
    if hint is bool and type(data) is bool:
        return data
    if hint is str and type(data) is str and len(data) <= _MAX_TEXT:
        return data
    raise TypeError(f"{where} is {reprlib.repr(data)}: expected {_WORDS[origin or hint]}")


def _decode_record(hint: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise TypeError(f"{where} is {reprlib.repr(data)}: expected what {hint.__name__} holds")
    hints, needed, keeps_unknown = _fields_of(hint)
    if missing := needed - data.keys():
        raise TypeError(f"{where} has no {', '.join(sorted(missing))}")
    known = {k: decode(own, data[k], f"{where}.{k}") for k, own in hints.items() if k in data}
    try:
        record = hint(**known)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return keeping_unknown(record, data) if keeps_unknown else record


def keeping_unknown(record: Any, data: Any) -> Any:
    """A record whose `unknown` is what of parsed JSON, however deep, it does not hold otherwise."""
    return replace(record, unknown=_left_over(data, encode(replace(record, unknown={}))))


def encode(value: Any) -> Any:
    """What `decode` reads, of records; what a record keeps as unknown is in its place."""
    if is_dataclass(value) and not isinstance(value, type):
        known = {
            f.name: encode(getattr(value, f.name)) for f in fields(value) if _is_said(f, value)
        }
        return _merged(known, known.pop("unknown", {}))
    if isinstance(value, dict):
        return {key: encode(inner) for key, inner in value.items()}
    return [encode(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_said(own: Field[Any], record: Any) -> bool:
    """Whether a record's field is written."""
    is_sparse = own.metadata.get("sparse", False)
    return not is_sparse or bool(getattr(record, own.name) != own.default)


def _left_over(data: Any, kept: Any) -> dict[str, Any]:
    """What `_merged` adds to kept to have all of data, by field or by place in a list."""
    if isinstance(data, list) and isinstance(kept, list) and len(data) == len(kept):
        data, kept = _by_place(data), _by_place(kept)
    if not isinstance(data, dict) or not isinstance(kept, dict):
        return {}
    inner = {k: _left_over(v, kept[k]) if k in kept else v for k, v in data.items()}
    return {k: v for k, v in inner.items() if v or k not in kept}


def _merged(kept: Any, left: Mapping[str, Any]) -> Any:
    """The same fields and items, with what was left over of them."""
    if isinstance(kept, dict):
        return kept | {k: _merged(kept[k], v) if k in kept else v for k, v in left.items()}
    if isinstance(kept, list):
        return [_merged(v, left[k]) if k in left else v for k, v in _by_place(kept).items()]
    return kept


def _by_place(items: list[Any]) -> dict[str, Any]:
    return {str(place): item for place, item in enumerate(items)}


@cache
def _fields_of(record: type) -> tuple[dict[str, Any], frozenset[str], bool]:
    """A dataclass's type hints, its fields without a default, and whether it keeps unknown ones."""
    own = fields(record)
    needed = (f.name for f in own if f.default is MISSING and f.default_factory is MISSING)
    hints = get_type_hints(record, include_extras=True)
    keeps_unknown = hints.pop("unknown", None) is not None
    return hints, frozenset(needed), keeps_unknown


def _check(bound: Any, value: Any, where: str) -> None:
    """Raise ValueError when a decoded value is outside its bound."""
    if isinstance(bound, Range) and not bound.least <= value <= bound.most:
        raise ValueError(f"{where} is {value}: expected {bound.least:g} to {bound.most:g}")
    if isinstance(bound, Text):
        is_fit = re.fullmatch(bound.pattern, value) if bound.pattern else value.isprintable()
        if not is_fit or len(value) > bound.at_most:
            raise ValueError(f"{where} is {reprlib.repr(value)}: expected another form")
    if isinstance(bound, Known):
        for name in bound.hints.keys() & value.keys():
            decode(bound.hints[name], value[name], f"{where}.{name}")
