"""The terminal: text on standard output, errors and progress on the other, all of it as it is.

Nothing that is shown is markup, and every text passes `printable`: manifests, headers, file names
and exceptions are strangers' words.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from wanexport.runtime.errors import printable


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `main`: rich would end the program with 1, which says that a check failed."""
        raise  # the BrokenPipeError that rich is handling


out = _Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
out.width = max(out.width, 120)  # a narrow terminal wraps a table; rich would cut its figures
err = _Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
_LONGEST_LINE = 20_000  # a command to copy holds whole paths
_LONGEST_VALUE = 200  # of what a manifest says


def write(console: Console, *parts: str | tuple[str, str]) -> None:
    """Print one line of texts, each by itself or with a style, as they are: none is markup."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    console.print(Text.assemble(*((printable(t, _LONGEST_LINE), style) for t, style in pairs)))


def short(value: object) -> str:
    """A value of a record in a line that has others."""
    return printable(value, _LONGEST_VALUE)


def new_table(title: str | None = None) -> Table:
    """An empty table; its cells are text, made printable by the caller."""
    shown = None if title is None else printable(title)
    return Table(title=shown, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def in_short(value: float | None) -> str:
    """A figure in scientific notation, or a dash where there is none."""
    return "-" if value is None else f"{value:.1e}"


def in_bytes(count: float) -> str:
    """A size in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


@contextmanager
def progress_display() -> Iterator[Callable[[str, int, int], None]]:
    """A live progress display on standard error: a line for each stage, silent when piped."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task("", total=None)
        current = ""

        def show(stage: str, done: int, total: int) -> None:
            nonlocal current
            name = stage.partition(",")[0]  # what follows the comma changes within a stage
            if name != current:
                current = name
                bars.reset(task)  # restarts the clock
            bars.update(task, description=short(stage), completed=done, total=total or None)

        yield show
