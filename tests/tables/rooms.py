"""The structure of `exporter` and `runtime` in figures: rooms, and the imports between them.

python -m tests.tables.rooms [COMMIT ...]

A room is a folder, or a file that lies in none. Prints for each commit, and for the working tree,
the files, the arrows between files and between rooms, the circles among rooms, and the arrows that
point against the order of `FLOORS`; and between two commits how many lines moved unchanged with
their file, and how many changed.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From the top down: a room imports from its own floor or from those below it.
FLOORS: dict[str, tuple[frozenset[str], ...]] = {
    "exporter": (
        frozenset({"cli"}),
        frozenset({"report"}),
        frozenset({"build", "run", "bench", "profile", "compare", "doctor", "inspection"}),
        frozenset({"sets"}),
        frozenset({"bundle", "key"}),
        frozenset({"backends"}),
        frozenset(
            {"reference", "lint", "rewrite", "child", "model_source", "module_function", "trace"}
        ),
    ),
    "runtime": (
        frozenset({"serving", "drop_in"}),
        frozenset({"load"}),
        frozenset({"denoiser", "sample", "sample_stream", "settings", "fitting"}),
        frozenset({"stream", "kept_frames"}),
        frozenset({"engines", "parts", "wan_keys", "lora", "recipes"}),
        frozenset({"bundle"}),
        frozenset({"family", "plain_wan", "causal_wan", "wan_vae", "vae_memory", "gpu_fit"}),
        frozenset(
            {
                "arrays",
                "host_copy",
                "kept_inputs",
                "solvers",
                "wan_config",
                "program",
                "vae_config",
            }
        ),
        frozenset({"geometry", "decode", "key_tables"}),
        frozenset({"machine"}),
        frozenset({"errors", "dtypes"}),
    ),
}
Arrows = frozenset[tuple[str, str]]


def imported_modules(source: str) -> set[str]:
    """The modules of wanexport, with what follows the package's name, that a source imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("wanexport.") for name in names if name.startswith("wanexport.")}


def file_arrows(package: str, sources: Mapping[str, str]) -> Arrows:
    """Which file of a package imports which; `sources` has each by its path, as `load.py`."""
    modules = {f"{package}.{path[:-3].replace('/', '.')}": path for path in sources}
    arrows = set()
    for path, source in sources.items():
        for name in imported_modules(source):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and modules[name] != path:
                arrows.add((path, modules[name]))
    return frozenset(arrows)


def room(path: str) -> str:
    """The room of a file, given by its path in the package."""
    return path.partition("/")[0].removesuffix(".py")


def room_arrows(arrows: Arrows) -> Arrows:
    """The arrows between different rooms."""
    pairs = {(room(a), room(b)) for a, b in arrows}
    return frozenset((a, b) for a, b in pairs if a != b)


def circles(arrows: Arrows) -> int:
    """How many groups of rooms import one another, by way of others too."""
    reach = {a: {b for x, b in arrows if x == a} for a, _ in arrows}
    for _ in reach:
        reach = {a: ends.union(*(reach.get(b, set()) for b in ends)) for a, ends in reach.items()}
    groups = {
        frozenset(b for b in ends if a in reach.get(b, set()))
        for a, ends in reach.items()
        if a in ends
    }
    return len(groups)


def against_the_order(package: str, arrows: Arrows) -> list[tuple[str, str]]:
    """The arrows from a room to one on a higher floor, or to or from a room that has no floor."""
    floor = {name: i for i, names in enumerate(FLOORS[package]) for name in names}
    return sorted((a, b) for a, b in arrows if not floor.get(a, 99) <= floor.get(b, -1))


def sources_of(package: str, commit: str | None) -> dict[str, str]:
    """The package's sources by path, in a commit or in the working tree."""
    if commit is None:
        folder = ROOT / package
        files = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.py")}
    else:
        names = git("ls-tree", "-r", "--name-only", commit, f"{package}/").splitlines()
        files = {
            name.removeprefix(f"{package}/"): git("show", f"{commit}:{name}")
            for name in names
            if name.endswith(".py")
        }
    return {path: text for path, text in files.items() if not path.endswith("__init__.py")}


def git(*arguments: str) -> str:
    """What a git command prints in this repository."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def lines_moved(before: str, after: str) -> tuple[int, int]:
    """Lines that went to another file as they were, and lines added or removed, of two commits."""
    moved = changed = 0
    listing = git("diff", "-M30%", "--numstat", "-z", before, after, "--", "*.py").split("\0")
    items = iter(listing)
    for item in items:
        if not item:
            continue
        added, removed, name = item.split("\t")
        changed += int(added) + int(removed)
        if not name:  # renamed: the two names follow
            next(items)
            moved += git("show", f"{after}:{next(items)}").count("\n") - int(added)
    return moved, changed


def table(commits: Iterable[str | None]) -> list[tuple[str, ...]]:
    """A row for each commit (None: the working tree) and package."""
    rows = []
    for commit in commits:
        for package in FLOORS:
            sources = sources_of(package, commit)
            files = file_arrows(package, sources)
            rooms = room_arrows(files)
            figures = (
                len(sources),
                len({room(path) for path in sources}),
                len(files),
                len(rooms),
                circles(rooms),
                len(against_the_order(package, rooms)),
            )
            rows.append((commit or "working tree", package, *map(str, figures)))
    return rows


def main(commits: list[str]) -> None:
    """Print the table, and between the first and the last commit the lines moved and changed."""
    head = ("commit", "package", "files", "rooms", "arrows between files", "between rooms",
            "circles", "against the order")  # fmt: skip
    for row in (head, *table([*commits, None])):
        print(" | ".join(row))
    if len(commits) > 1:
        moved, changed = lines_moved(commits[0], commits[-1])
        print(f"lines moved unchanged {moved}, lines added or removed {changed}")


if __name__ == "__main__":
    main(sys.argv[1:])
