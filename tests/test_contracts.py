"""The figures of `tests.tables.contracts`, of sources that are small enough to count by eye."""

import pytest

from tests.tables.contracts import Contracts, contracts_of, examine, row

OUTSIDE = "runtime/load.py"
# Every line that counts ends in a comment that says as what.
DECIDING = """
FLAVOURS = {"tensorrt": 1, "tensorrt-rtx": 2}  # table
TITLES = {"onnx": "ONNX", "cpu": "CPU"}
def open_engine(record, options, names):
    "An engine of onnx, aoti or tensorrt."
    if record.backend == "onnx":  # comparison
        return "onnx"
    if "aoti" != record.backend and options:  # comparison
        return None
    found = record.backend in ("aoti", *FLAVOURS)  # comparison
    while FLAVOURS.keys() & names:  # condition
        names.clear()
    assert names not in table.BACKENDS  # comparison
    default = "aoti" if found else "onnx"  # choice
    match record.backend:
        case "onnx" | "aoti":  # case
            return 1
        case "cpu":
            return 2
    options["tensorrt"] = default
    kept = [n for n in names if n.startswith("tensorrt")]  # condition
    if record.backend == names[0] or record.backend is None:
        return table.BACKENDS[record.backend](kept)  # lookup
    return table.BACKENDS["onnx"], FLAVOURS[default]  # entry, lookup
"""
NAMING = """
import dataclasses
NAMES = ("latent", "timestep", "text")  # literal
WORDS = "condition image text".split()  # literal
TWO = ("latent", "text", "velocity")
HELP = "the latent, the timestep and the text"
class Call:  # fields
    latent: int
    text: int
    image: int
def forward(self, latent, *, timestep, text):  # signature
    return call(latent=latent, timestep=timestep, text=text)
def run(engine, x):
    engine(latent=x, text=x, velocity=x)
    engine(latent=x, text=x, image=x)  # keywords
def check(inputs):  # texts
    "latent timestep text condition image"
    assert inputs["latent"] != inputs["text"]
    del inputs["condition"]
def few(inputs):
    return inputs["latent"], inputs["text"]
"""


def marked(source: str) -> list[tuple[int, str]]:
    """The numbers of the lines whose comment says that something is counted, and as what."""
    lines = enumerate(source.splitlines(), 1)
    return [
        (number, kind)
        for number, line in lines
        for kind in line.partition("  # ")[2].split(", ")
        if kind
    ]


def test_every_decision_by_a_backends_name_is_counted_and_nothing_else() -> None:
    found = examine({OUTSIDE: DECIDING})
    kinds = [(place.line, place.what.partition(":")[0]) for place in found.branches]
    kinds += [(place.line, "lookup") for place in found.lookups]
    assert sorted(kinds) == sorted(marked(DECIDING))


@pytest.mark.parametrize(
    ("path", "beside", "counts"),
    [
        ("runtime/engines/aoti.py", "exporter/backends/table.py", False),
        ("exporter/backends/onnx/lower.py", "runtime/engines/aoti.py", False),
        ("exporter/to_onnx.py", "exporter/backends/table.py", True),
        ("runtime/load.py", "exporter/backends/table.py", True),
        ("exporter/to_onnx.py", "exporter/build.py", False),
        ("exporter/onnx_backend.py", "exporter/build.py", False),
        ("runtime/onnx_cuda_engine.py", "exporter/build.py", False),
        ("runtime/choose.py", "exporter/build.py", False),
        ("runtime/manifest.py", "exporter/build.py", True),
    ],
)
def test_the_backends_rooms_may_decide(path: str, beside: str, counts: bool) -> None:
    assert bool(examine({path: DECIDING, beside: ""}).branches) is counts


def test_every_list_of_inputs_is_counted_and_nothing_else() -> None:
    found = examine({OUTSIDE: NAMING, "graphs/wan.py": ""})
    kinds = [(place.line, place.what.partition(":")[0]) for place in found.lists]
    assert kinds == marked(NAMING)
    assert found.files_with_lists == 1


def test_the_length_of_a_function_is_counted_from_def_to_its_last_line() -> None:
    lines = ["@cache", "def outer():", '    "What it does."', "    def inner():"]
    lines += ["        return 1", *["    x = 1"] * 36, "    return inner"]
    source = "\n".join(lines)
    found = examine({OUTSIDE: source})
    assert found.lengths == (41, 2)
    assert [(place.line, place.what) for place in found.long_functions] == [(2, "outer, 41 lines")]
    assert not examine({OUTSIDE: source.replace("    x = 1\n", "", 1)}).long_functions


def test_median_and_ninth_decile_are_those_of_nine_lengths() -> None:
    lines = [f"def f{n}():\n" + "    x = 1\n" * n for n in (5, 1, 9, 3, 7, 2, 8, 4, 6)]
    found = examine({OUTSIDE: "".join(lines)})
    assert (found.median, found.ninth_decile) == (6, 10)


@pytest.fixture(scope="module")
def found() -> Contracts:
    """The working tree's."""
    return contracts_of(None)


def test_the_working_tree_is_read_whole(found: Contracts) -> None:
    assert len(found.lengths) > 1000
    assert "exporter/reference/diffusers.py" in {place.file for place in found.lists}
    assert len(row(found)) == 8


def test_the_working_tree_keeps_its_contracts(found: Contracts) -> None:
    """No code but the backends' own decides by a backend's name; inputs come from Programs."""
    assert not found.branches, "\n".join(map(str, found.branches))
    assert found.files_with_lists <= 1, "\n".join(map(str, found.lists))
    assert len(found.long_functions) <= 6, "\n".join(map(str, found.long_functions))
    assert found.median <= 8 and found.ninth_decile <= 24
