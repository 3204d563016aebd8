"""Names of tensors in the checkpoints that people have: translated by a table, and required."""

import re
from collections.abc import Callable, Mapping

from wanexport.runtime.errors import WanExportError

_WILD = {r"\{\}": "([0-9]+)", r"\*": "(?P<last>weight|bias|gamma)"}


def key_table(rows: Mapping[str, str]) -> Callable[[str], str]:
    """A function that translates a tensor's name by rows of one layout's names and another's.

    In a row {} stands for a number, of which the other name has the first or all, and * at the end
    for weight, bias or gamma. A name that no row fits is returned as it is: who fills a model with
    the tensors refuses it as unexpected.
    """
    patterns = [(_pattern(row), target.replace("*", "{last}")) for row, target in rows.items()]

    def translate(name: str) -> str:
        for pattern, target in patterns:
            if match := pattern.fullmatch(name):
                return target.format(*match.groups(), **match.groupdict())
        return name

    return translate


def _pattern(row: str) -> re.Pattern[str]:
    text = re.escape(row)
    for wild, pattern in _WILD.items():
        text = text.replace(wild, pattern)
    return re.compile(text)


def required(
    shapes: Mapping[str, tuple[int, ...]], what: str, expected: str, error: type[WanExportError]
) -> Callable[[str, int], tuple[int, ...]]:
    """A function that gives the shape of a tensor, of those in `shapes`, by its name and rank.

    Where there is no such tensor it raises the error: `what` says which file is not which model,
    `expected` what would be.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if len(found := shapes.get(name, ())) != rank:
            raise error(f"{what}: it has no {name} of rank {rank}; expected {expected}")
        return found

    return shape
