"""How `exporter`, `graphs` and `runtime` keep their contracts, in figures.

python -m tests.tables.contracts [-v] [COMMIT ...]

Prints for each commit, and for the working tree, from the syntax tree:

branches   where code outside the backends' rooms does one thing for one backend and another for
           another: a comparison or another condition with a backend's name, a choice between names,
           a case, a table with names as keys, and an entry of a table by its name. A name is what
           `BACKENDS` lists, or one of the collections in `COLLECTIONS`. The table of what each
           backend's engines record is data, and does not count
lookups    a variable's entry in one of these collections: no branch, but a tie to the backends
inputs     files that name three inputs of the model or more together, by hand: in a signature, a
           call's keywords, a literal, the fields of a class, or as texts in one function; beside
           the definition of plain Wan, in its graph and its Program
places     how many such lists these files have
functions  how many there are, methods and inner ones too; how many are longer than 40 lines; the
           median and the ninth decile of their length, from `def` to the last line: with the
           docstring and without decorators

With -v each is listed as file:line. At 377b064, which had flat folders, these are 31 branches and 6
lookups, 10 files with inputs, 16 functions of more than 40 lines, median 8 and ninth decile 24.
"""

import ast
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.tables.rooms import sources_of

PACKAGES = ("exporter", "graphs", "runtime")
BACKENDS = frozenset({"onnx", "aoti", "tensorrt", "tensorrt-rtx"})
COLLECTIONS = frozenset({"FLAVOURS", "_TENSORRT", "BACKENDS"})
INPUTS = frozenset({"latent", "timestep", "text", "condition", "image"})
LONGEST = 40
_ENOUGH = 3  # inputs named together are a list of them
# What a backend's engines record, and plain Wan's own definition, are data that names them.
_RECORDS = "runtime/bundle/details.py"
_DEFINITIONS = ("graphs/wan.py", "runtime/plain_wan.py")
_ROOMS = re.compile(r"exporter/backends/|runtime/engines/")
_FLAT_ROOMS = re.compile(  # before there were folders
    r"exporter/(\w+_backend|to_\w+|proof\w*)\.py|runtime/(\w+_engine|onnx_\w+|tensorrt_\w+|choose)\.py"
)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Place:
    """Where something is, and what."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.what}"


@dataclass(frozen=True)
class Contracts:
    """What was found in the sources of one commit."""

    branches: tuple[Place, ...]
    lookups: tuple[Place, ...]
    lists: tuple[Place, ...]
    long_functions: tuple[Place, ...]
    lengths: tuple[int, ...]

    @property
    def files_with_lists(self) -> int:
        return len({place.file for place in self.lists})

    @property
    def median(self) -> float:
        return statistics.median(self.lengths)

    @property
    def ninth_decile(self) -> float:
        return statistics.quantiles(self.lengths, n=10)[8]


def examine(sources: Mapping[str, str]) -> Contracts:
    """Count in sources by their path, as `runtime/load.py`."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    rooms = _ROOMS if any(map(_ROOMS.match, sources)) else _FLAT_ROOMS
    outside = {path: tree for path, tree in trees.items() if not rooms.match(path)}
    functions = [place for path, tree in trees.items() for place in _functions(path, tree)]
    return Contracts(
        branches=_in_order(
            place
            for path, tree in outside.items()
            for place in branches(path, tree)
            if not (path == _RECORDS and place.what.startswith("table"))
        ),
        lookups=_in_order(p for path, tree in outside.items() for p in lookups(path, tree)),
        lists=_in_order(
            place
            for path, tree in trees.items()
            if path not in _DEFINITIONS
            for place in input_lists(path, tree)
        ),
        long_functions=_in_order(place for place, length in functions if length > LONGEST),
        lengths=tuple(length for _, length in functions),
    )


def _in_order(places: Iterator[Place]) -> tuple[Place, ...]:
    return tuple(sorted(places, key=lambda place: (place.file, place.line, place.what)))


def branches(path: str, tree: ast.AST) -> Iterator[Place]:
    """Where a source decides by a backend's name."""
    for node in ast.walk(tree):
        for kind in _branch_kinds(node):
            yield Place(path, _line(node), f"{kind}: {ast.unparse(node).splitlines()[0][:80]}")


def _branch_kinds(node: ast.AST) -> Iterator[str]:
    """What kinds of branch a node itself is, without those inside it."""
    if _compares(node):
        yield "comparison"
    for test in _tests(node):
        if _names(test) and not any(map(_compares, ast.walk(test))):
            yield "condition"
    if isinstance(node, ast.IfExp) and all(map(_is_backend, (node.body, node.orelse))):
        yield "choice"
    if isinstance(node, ast.match_case) and _names(node.pattern):
        yield "case"
    if isinstance(node, ast.Dict) and sum(map(_is_backend, node.keys)) > 1:
        yield "table"
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        if _is_backend(node.slice):
            yield "entry"


def _compares(node: ast.AST) -> bool:
    equal = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
    return (
        isinstance(node, ast.Compare)
        and any(isinstance(operator, equal) for operator in node.ops)
        and any(map(_names, (node.left, *node.comparators)))
    )


def _tests(node: ast.AST) -> list[ast.expr]:
    """The conditions of a statement, an expression or a comprehension."""
    if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
        return [node.test]
    return node.ifs if isinstance(node, ast.comprehension) else []


def _names(node: ast.AST) -> bool:
    """Whether a backend, or a collection of them, is named anywhere in a node."""
    return any(_is_backend(part) or _is_collection(part) for part in ast.walk(node))


def _is_backend(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value in BACKENDS


def _is_collection(node: ast.AST) -> bool:
    name = {ast.Name: "id", ast.Attribute: "attr"}.get(type(node), "")
    return getattr(node, name, None) in COLLECTIONS


def lookups(path: str, tree: ast.AST) -> Iterator[Place]:
    """Where a source takes a variable's entry of a collection of backends."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and _is_collection(node.value):
            if not _is_backend(node.slice):
                yield Place(path, node.lineno, ast.unparse(node))


def input_lists(path: str, tree: ast.AST) -> Iterator[Place]:
    """Where a source names several inputs together; what lies in a listed place is part of it."""
    for child in ast.iter_child_nodes(tree):
        named = {kind: INPUTS & names for kind, names in _named(child)}
        kinds = [kind for kind, names in named.items() if len(names) >= _ENOUGH]
        if kinds:
            names = set().union(*(named[kind] for kind in kinds))
            yield Place(path, _line(child), f"{', '.join(kinds)}: {', '.join(sorted(names))}")
        else:
            yield from input_lists(path, child)


def _named(node: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """The names that a node has together, with what holds them together."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield "signature", {argument.arg for argument in _arguments(node.args)}
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            yield "texts", {text for text in texts if isinstance(text, str)}
        case ast.Lambda():
            yield "signature", {argument.arg for argument in _arguments(node.args)}
        case ast.ClassDef():
            fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            yield "fields", {field.id for field in fields if isinstance(field, ast.Name)}
        case ast.Call():
            yield "keywords", {keyword.arg or "" for keyword in node.keywords}
        case ast.Dict():
            yield "literal", set().union(*map(_texts, filter(None, node.keys)))
        case ast.List() | ast.Tuple() | ast.Set():
            yield "literal", set().union(*map(_texts, node.elts))
        case ast.Constant():
            yield "literal", _texts(node)


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def _texts(node: ast.AST) -> set[str]:
    """The words of a text that is nothing but inputs, be it one or several to be split."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return set()
    words = set(re.findall(r"\w+", node.value))
    return words if words <= INPUTS else set()


def _functions(path: str, tree: ast.AST) -> Iterator[tuple[Place, int]]:
    """Every function, with its number of lines."""
    for node in ast.walk(tree):
        if isinstance(node, _Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Place(path, node.lineno, f"{node.name}, {length} lines"), length


def _line(node: ast.AST) -> int:
    """Its line, or that of the first part that has one: a case or a comprehension has none."""
    return next(int(part.lineno) for part in ast.walk(node) if hasattr(part, "lineno"))


def contracts_of(commit: str | None) -> Contracts:
    """Those of a commit, or of the working tree."""
    return examine(
        {
            f"{package}/{path}": text
            for package in PACKAGES
            for path, text in sources_of(package, commit).items()
        }
    )


def row(found: Contracts) -> list[str]:
    """The figures of one commit, in the order of the table's head."""
    figures = (
        len(found.branches),
        len(found.lookups),
        found.files_with_lists,
        len(found.lists),
        len(found.lengths),
        len(found.long_functions),
        f"{found.median:g}",
        f"{found.ninth_decile:g}",
    )
    return [str(figure) for figure in figures]


def main(arguments: list[str]) -> None:
    """Print the table, and with -v what is counted."""
    verbose = "-v" in arguments
    commits: list[str | None] = [name for name in arguments if name != "-v"]
    head = ("commit", "branches", "lookups", "files with inputs", "places", "functions",
            f"over {LONGEST} lines", "median", "ninth decile")  # fmt: skip
    print(" | ".join(head))
    for commit in [*commits, None]:
        found = contracts_of(commit)
        print(" | ".join((commit or "working tree", *row(found))))
        for name in ("branches", "lookups", "lists", "long_functions") if verbose else ():
            print(f"  {name.replace('_', ' ')}")
            for place in getattr(found, name):
                print(f"    {place}")


if __name__ == "__main__":
    main(sys.argv[1:])
