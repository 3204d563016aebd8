"""Lines of Python in a trace: of marks that name them, or of the functions that a profiler saw."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from wanexport.exporter.trace.event import FRAME, MARK, Called, Event, Line

_MARK = re.compile(r"wanexport line (\d+)")
_FRAME = re.compile(r"(.+\.py)\((\d+)\): (.+)")
_WRITTEN = re.compile(r"(.+):(\d+)\t(.*)")
_OURS = Path(__file__).parents[2]
_TORCH = re.compile(r"(^|/)(torch|<frozen [^>]*>)/")


def mark_name(index: int) -> str:
    """The name of a mark around one call; index is its place in a list of them."""
    return f"wanexport line {index}"


def called(event: Event, calls: Sequence[Called]) -> Called | None:
    """What a mark says was called there; None of any other event."""
    found = _MARK.fullmatch(event.name) if event.kind == MARK else None
    return calls[int(found[1])] if found and int(found[1]) < len(calls) else None


def frame_line(event: Event) -> Line | None:
    """The function of a profiler's frame; None of PyTorch's own and of any other event."""
    found = _FRAME.fullmatch(event.name) if event.kind == FRAME else None
    if found is None or _TORCH.search(found[1]):
        return None
    return Line(shown(found[1]), int(found[2]), found[3], is_call=False)


@lru_cache(maxsize=4096)
def shown(file: str) -> str:
    """A file's path from the working directory or from its library, else as it is."""
    path = Path(file)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    elif any(path.is_relative_to(_OURS / room) for room in ("exporter", "graphs", "runtime")):
        path = "wanexport" / path.relative_to(_OURS)  # of a clone, whose folder has any name
    _, found, inner = path.as_posix().rpartition("/site-packages/")
    return inner if found else path.as_posix()


def written(called: Called) -> list[str]:
    """A call as text, to be kept in a trace: its name, then each line with its function."""
    return [called.name, *(f"{line}\t{line.function}" for line in called.lines)]


def read_back(texts: object) -> Called | None:
    """The call that such texts are of; None of anything else."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return None
    found = [_WRITTEN.fullmatch(text) for text in texts[1:]]
    lines = tuple(Line(own[1], int(own[2]), own[3]) for own in found if own)
    return Called(texts[0], lines) if texts else None
