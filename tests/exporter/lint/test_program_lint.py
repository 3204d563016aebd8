"""`lint` reads files as data: it finds what PyTorch's own loading would, and runs nothing."""

import json
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from tests.exporter.lint.hostile_archives import call, program, trapped, write
from tests.exporter.lint.test_lint import FAULTS, FOUR, WritesItsParameter, exported
from tests.quick import slow_but
from wanexport.exporter.lint.archive import lint_program_file
from wanexport.exporter.lint.onnx import lint
from wanexport.exporter.lint.onnx_expansion import check_expansion
from wanexport.exporter.lint.program import Finding, lint_program
from wanexport.runtime.errors import WanExportError

PROGRAMS: list[tuple[str, Callable[[], torch.export.ExportedProgram]]] = [
    *((kind, lambda f=f, a=a: exported(f, *a)) for kind, f, a in FAULTS),
    ("clean", lambda: exported(lambda _, x: (x * 2).add_(1), FOUR)),
    ("parameter", lambda: torch.export.export(WritesItsParameter(), (FOUR,))),
    (
        "sizes",
        lambda: torch.export.export(
            nn.Linear(4, 4), (torch.ones(3, 4),), dynamic_shapes=({0: torch.export.Dim("n")},)
        ),
    ),
]


@pytest.mark.parametrize("decomposed", slow_but([False, True], False))
@pytest.mark.parametrize(("name", "make"), PROGRAMS)
def test_a_saved_program_has_the_findings_of_the_one_that_is_loaded(
    name: str, make: Callable[[], torch.export.ExportedProgram], decomposed: bool, tmp_path: Path
) -> None:
    program = make().run_decompositions() if decomposed else make()
    torch.export.save(program, tmp_path / "p.pt2")
    loaded = lint_program(torch.export.load(tmp_path / "p.pt2"))
    assert sorted(map(told, lint_program_file(tmp_path / "p.pt2"))) == sorted(map(told, loaded))


def told(finding: Finding) -> tuple[str, str, str]:
    detail = finding.detail.replace("<built-in function getitem>", "getitem")
    return finding.kind, finding.node, detail


@pytest.fixture(scope="module")
def linted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that hears of everything it runs said of the hostile files."""
    folder = tmp_path_factory.mktemp("hostile")
    write(folder)

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))

    command = [sys.executable, "-m", "tests.exporter.lint.hostile_archives", str(folder)]
    child = subprocess.run(
        command, capture_output=True, text=True, timeout=120, preexec_fn=bound,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return {**result, "canary": (folder / "canary").exists()}


def test_the_trap_is_one(tmp_path: Path) -> None:
    """So that nothing run means something: PyTorch's own loading runs the command."""
    trapped(tmp_path / "p.pt2", tmp_path / "canary")
    with suppress(Exception):
        torch.export.load(tmp_path / "p.pt2")
    assert (tmp_path / "canary").exists()


def test_no_file_takes_long(linted: dict[str, Any]) -> None:
    assert linted["seconds"] < 5


def test_no_file_runs_anything(linted: dict[str, Any]) -> None:
    assert len(linted["said"]) >= 25
    assert linted["events"] == [] and not linted["canary"]
    assert not [path for path in linted["opened"] if path.endswith(("weights", ".py"))]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clean.pt2", "clean True"),
        ("trapped.pt2", "clean True"),
        ("import.pt2", "clean True"),
        ("loop.pt2", "clean True"),
        ("branches.pt2", "clean False"),
        ("symbols.pt2", "clean False"),
        ("outside.onnx", "clean True"),
        ("laughs.onnx", "its functions call one another to more nodes than a model has"),
        ("machine-code.pt2", "is a package of machine code"),
        ("bomb.pt2", "holds a larger graph than a model has"),
        ("many-entries.pt2", "holds more files than an exported program does"),
        ("lying-directory.pt2", "holds more files than an exported program does"),
        ("pipe.pt2", "is no regular file"),
        ("device.pt2", "is no regular file"),
        *(
            (f"{name}.pt2", "is no exported program")
            for name in (
                "number", "empty-object", "wrong-types", "no-json", "nested-500000-deep",
                "not-a-text", "pickle", "torch-save", "truncated", "empty",
            )
        ),
    ],
)  # fmt: skip
def test_each_file_is_told_as_what_it_is(linted: dict[str, Any], name: str, message: str) -> None:
    said = linted["said"][name]
    assert message in said
    assert "\n" not in said and len(said) < 500


def test_a_function_that_calls_itself_is_refused(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ours", 1)]
    node = helper.make_node("F", ["a"], ["b"], domain="ours")
    function = helper.make_function("ours", "F", ["a"], ["b"], [node], opsets)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    use = helper.make_node("F", ["x"], ["y"], domain="ours")
    model = helper.make_model(
        helper.make_graph([use], "g", [x], [y]), opset_imports=opsets, functions=[function]
    )
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(WanExportError, match="its function F calls itself"):
        lint(tmp_path / "g.onnx")


def test_a_program_of_unknown_operators_is_linted(tmp_path: Path) -> None:
    """Loading it would need the library that defines them."""
    library = torch.library.Library("wanexport_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    torch.library.register_fake("wanexport_test::twice", lambda x: x * 2, lib=library)

    def function(_: object, x: Tensor) -> Tensor:
        return torch.ops.wanexport_test.twice(x).double()

    torch.export.save(exported(function, FOUR), tmp_path / "p.pt2")
    library._destroy()
    assert [finding.kind for finding in lint_program_file(tmp_path / "p.pt2")] == ["fp64"]


def test_a_long_chain_in_place_is_walked_once(tmp_path: Path) -> None:
    def tensor(name: str) -> dict[str, Any]:
        return {"as_tensor": {"name": name}}

    nodes = [
        call("torch.ops.aten.add_.Tensor", tensor(f"t{i}"), tensor(f"t{i}"),
             outputs=[tensor(f"t{i + 1}")])
        for i in range(20_000)
    ]  # fmt: skip
    with zipfile.ZipFile(tmp_path / "p.pt2", "w") as archive:
        archive.writestr("p/models/model.json", json.dumps(program(nodes)))
    started = time.process_time()
    assert lint_program_file(tmp_path / "p.pt2")
    assert time.process_time() - started < 5


def test_a_function_of_many_calls_is_measured_once() -> None:
    functions = [
        helper.make_function("ours", f"f{i}", ["a"], ["b"],
                             [helper.make_node("Identity", ["a"], ["b"])], [])
        for i in range(4000)
    ]  # fmt: skip
    calls = [helper.make_node(f"f{i}", ["a"], ["b"], domain="ours") for i in range(4000)]
    functions.insert(0, helper.make_function("ours", "all", ["a"], ["b"], calls, []))
    graph = helper.make_graph([helper.make_node("all", ["x"], ["y"], domain="ours")], "g", [], [])
    model = helper.make_model(graph, functions=functions)
    started = time.process_time()
    check_expansion(model)
    assert time.process_time() - started < 0.5
