"""The first table of docs/published_optimisations.md, which is made of the other tables."""

from collections.abc import Mapping

from tests.tables.published.section import Section

NAME = "summary"
PICKED = {  # row -> section, and its row
    "RoPE as stack + flatten: by itself": ("rope", "strided / stack + flatten"),
    "RoPE as stack + flatten: compiled": ("rope", "the same, both compiled"),
    "RoPE as stack + flatten: ONNX Runtime": ("rope", "ONNX Runtime, strided / stack + flatten"),
    "RoPE as stack + flatten: a forward": ("rope", "forward, strided / stack + flatten"),
    "Helios, bf16: both forms": ("helios", "3: bf16, 2 x 16 x 8 x 64"),
    "host reads in two chunks, before": ("host_waits", "`aten::item`, before"),
    "host reads in two chunks, after": ("host_waits", "`aten::item`, pull request 51"),
    "two chunks, before / after": ("host_waits", "two chunks, before / pull request 51"),
    "first chunks of a process / later ones": (
        "host_waits",
        "the first two of the process / later ones",
    ),
    "one process for three requests": ("persistent", "three processes / one process"),
    "three functions compiled, a forward": ("compiled_norms", "eager / the three compiled"),
    "all of a block compiled, a forward": ("compiled_norms", "eager / blocks compiled"),
    "our engine, a forward": ("compiled_norms", "eager / our engine"),
    "rotation in place, by itself": (
        "inplace_rotary",
        "published size, two launches / in place",
    ),
    "rotation in place, a forward": ("inplace_rotary", "forward, stack + flatten / in place"),
}

Columns = dict[str, dict[str, str]]  # a column's cells by label


def section(sections: Mapping[str, Section]) -> Section:
    """The summary as a section: its rows have the published figures of theirs."""
    rows = {label: sections[name].rows[row] for label, (name, row) in PICKED.items()}
    return Section(NAME, rows, lambda place: ())


def cells(tables: Mapping[str, Columns]) -> Columns:
    """The cells of a summary by column, without their spread; `tables` are those of the page."""
    found: Columns = {}
    for label, (name, row) in PICKED.items():
        for column, there in tables.get(name, {}).items():
            if row in there:
                found.setdefault(column, {})[label] = there[row].partition(" (")[0]
    return found
