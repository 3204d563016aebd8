"""Print each command's options as a markdown table, in the order of its help.

    python -m tests.tables.options [COMMAND ...]        of every command by default
    python -m tests.tables.options --write              writes them into README and docs/

There a command's table stands between `<!-- options: COMMAND -->` and `<!-- end of options -->`.
"""

import re
import sys

import click

from tests.documents import ROOT, documents
from wanexport.exporter.cli.main import cli

HEAD = "| option | value | default | what it does |\n|---|---|---|---|"
_TABLE = re.compile(r"(<!-- options: (\w+) -->\n).*?(<!-- end of options -->)", re.DOTALL)
_DEFAULT = re.compile(r"\s*\bDefault: (.+?)\.?$", re.DOTALL)


def table(name: str) -> str:
    """The table of one of wanexport's commands."""
    return table_of(cli.commands[name])


def table_of(command: click.Command) -> str:
    """A command's options: names, value, default and what the help says of each."""
    context = click.Context(command)
    options = [p for p in command.get_params(context) if isinstance(p, click.Option)]
    rows = [_row(option, context) for option in options if "--help" not in option.opts]
    return "\n".join([HEAD, *rows])


def _row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    text, default = _said(option)
    cells = (names, _value(option, context), default, text)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _said(option: click.Option) -> tuple[str, str]:
    """What the help says without the default, and the default."""
    text, default = (option.help or "").strip(), option.default
    if option.required:
        return text, "required"
    if found := _DEFAULT.search(text):
        return text[: found.start()], found[1]
    if option.is_flag:
        return text, "" if default is None else "off"
    shown = f"{default:g}" if isinstance(default, int | float) else str(default)
    return text, shown if option.show_default else ""


def _value(option: click.Option, context: click.Context) -> str:
    kind = option.type
    if option.is_flag:
        return ""
    if isinstance(kind, click.IntRange | click.FloatRange):
        name = option.metavar or ("NUMBER" if isinstance(kind, click.FloatRange) else "INTEGER")
        return ", ".join(filter(None, [f"`{name}`", _bounds(kind)]))
    shown = option.make_metavar(context)
    if shown.startswith("["):  # as click writes a choice
        shown = shown[1:-1]
    return ", ".join(f"`{choice}`" for choice in shown.split("|"))


def _bounds(kind: click.IntRange | click.FloatRange) -> str:
    if kind.min is None or kind.max is None:
        least = "" if kind.min is None else f"{'over' if kind.min_open else 'from'} {kind.min:g}"
        return least or ("" if kind.max is None else f"to {kind.max:g}")
    return f"{kind.min:g} to {kind.max:g}"


def filled(text: str) -> str:
    """A document with every table in it as it should be."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", text)


def tables_of(text: str) -> list[str]:
    """The commands whose tables a document holds."""
    return [found[2] for found in _TABLE.finditer(text)]


def main(arguments: list[str]) -> None:
    """Print tables, or write them."""
    if arguments == ["--write"]:
        for document in documents():
            (ROOT / document.name).write_text(filled(document.text))
        return
    for name in arguments or cli.commands:
        print(f"{name}\n\n{table(name)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
