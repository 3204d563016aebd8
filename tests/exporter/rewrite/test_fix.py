"""`lint --fix`: what it writes, what it refuses, and that nothing is half written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from torch.export import ExportedProgram

from tests.exporter.lint.hostile_archives import trapped
from tests.exporter.rewrite.programs import exported
from tests.exporter.rewrite.test_onnx_writes import scattered
from tests.exporter.rewrite.test_strided_writes import FITTING
from wanexport.exporter.cli.main import cli
from wanexport.exporter.rewrite import rewrite as rules
from wanexport.exporter.rewrite.bits import differing
from wanexport.exporter.rewrite.fix_program import export_function, fix_program
from wanexport.exporter.rewrite.proof import Proof
from wanexport.exporter.rewrite.record import RULES, STRIDED_WRITES, Rewriting
from wanexport.runtime.errors import BadRequest, WanExportError

SOURCE = """
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 1::2] * 2
        out[..., 1::2] = x[..., 0::2]
        part = x.clone()
        part[..., 0::2] = 1
        return out + part.sum()
x = torch.randn(3, 8)
def model(): return Model(), (x,)
def program(): return torch.export.export(Model(), (x,))
def three(): return 3
class Asks(torch.nn.Module):
    def forward(self, x): return x + 1 if x.sum() > 0 else x
def unexported(): return Asks(), (x,)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module and an ONNX file."""
    (tmp_path / "model_to_fix.py").write_text(SOURCE)
    scattered(tmp_path / "a.onnx", [[0], [2]], [[1], [3]])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    sys.modules.pop("model_to_fix", None)
    return tmp_path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["lint", *map(str, arguments)])


def test_a_function_is_exported_and_linted() -> None:
    result = invoke("model_to_fix:model", "--json")
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert record["graphs"]["model_to_fix:model"]["counts"]["strided_write"] == 2
    assert "fix" not in record


@pytest.mark.parametrize("function", ["model", "program"])
def test_a_program_is_rewritten_and_saved(function: str, folder: Path) -> None:
    result = invoke(f"model_to_fix:{function}", "--fix", "-o", "clean.pt2", "--json")
    assert result.exit_code in (0, 1), result.exception
    fixed = json.loads(result.stdout)["fix"]
    assert fixed["counts"] == {"strided_writes": 1, "complex_products": 0, "equal_rows": 0}
    assert fixed["left"][0]["place"].startswith("model_to_fix.py:")
    assert fixed["compared"] == "bit for bit on 3 inputs"
    assert fixed["before"]["strided_write"] == 2
    import model_to_fix  # type: ignore[import-not-found]

    saved = torch.export.load("clean.pt2")
    assert torch.equal(saved.module()(model_to_fix.x), model_to_fix.Model()(model_to_fix.x))
    assert invoke("clean.pt2").exit_code == result.exit_code


def test_what_was_done_is_shown() -> None:
    result = invoke("model_to_fix:model", "--fix", "-o", "clean.pt2")
    shown = result.stdout
    assert "rewrote strided_writes 1, complex_products 0, equal_rows 0" in shown
    assert "clean.pt2" in shown
    result = invoke("a.onnx", "--fix", "-o", "b.onnx")
    assert result.exit_code == 0, result.exception
    assert "rewrote strided_writes 1; compared bit for bit in ONNX Runtime" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("model_to_fix:model", "--fix"), "--fix and -o FILE go together"),
        (("model_to_fix:model", "-o", "x.pt2"), "--fix and -o FILE go together"),
        (("a.onnx", "--overwrite"), "--overwrite goes with --fix"),
        (("a.onnx", "--parser", "tensorrt", "--fix", "-o", "b.onnx"), "--parser tensorrt is for"),
        (("model_to_fix:model", "--parser", "tensorrt"), "--parser tensorrt is for"),
        (("model_to_fix:model", "--fix", "-o", "x.onnx"), "goes to a .pt2 file"),
        (("a.onnx", "--fix", "-o", "x.pt2"), "goes to a .onnx file"),
        (("a.onnx", "--fix", "-o", "a.onnx", "--overwrite"), "is the model itself"),
        (("a.onnx", "--fix", "-o", "none/b.onnx"), "name a file in an existing folder"),
        (("model_to_fix:model", "--fix", "-o", "none/b.pt2"), "name a file in an existing folder"),
        (("gone.onnx", "--fix", "-o", "b.onnx"), "gone.onnx does not exist"),
        (("model_to_fix.py", "--fix", "-o", "b.onnx"), "is not rewritten: name an .onnx file"),
        ((".", "--fix", "-o", "b.onnx"), "is a folder"),
        (("gone_module:f", "--fix", "-o", "b.pt2"), "gone_module does not import"),
        (("model_to_fix:three", "--fix", "-o", "b.pt2"), "returned int"),
        (("model_to_fix:unexported", "--fix", "-o", "b.pt2"), "torch.export does not take the mod"),
        (("model_to_fix:unexported",), "torch.export does not take the mod"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: tuple[str, ...], reason: str, folder: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    result = invoke(*arguments)
    assert isinstance(result.exception, WanExportError), result.exception
    assert reason in str(result.exception)
    assert "\n" not in str(result.exception)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("target", "output", "there"),
    [
        ("model_to_fix:model", "b.pt2", "b.pt2"),
        ("a.onnx", "b.onnx", "b.onnx"),
        ("a.onnx", "b.onnx", "b.onnx.data"),
    ],
)
def test_an_output_is_replaced_only_with_overwrite(
    target: str, output: str, there: str, folder: Path
) -> None:
    (folder / there).write_text("mine")
    result = invoke(target, "--fix", "-o", output)
    assert f"{there} exists: name another -o, or add --overwrite" in str(result.exception)
    assert (folder / there).read_text() == "mine"
    assert invoke(target, "--fix", "-o", output, "--overwrite").exit_code in (0, 1)
    assert (folder / output).read_bytes() != b"mine"


def test_a_model_that_is_not_exported_leaves_no_more_on_the_terminal(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """PyTorch prints the graph of such a model."""
    (folder / "sized_to_fix.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, x, table):\n"
        "        a, b = torch.stack([torch.tensor(x.shape)]).tolist()[0]\n"
        "        return table[:a].view(a, 1, -1).expand(a, b, -1).reshape(a * b, -1)\n"
        "def model(): return Model(), (torch.ones(3, 4), torch.ones(9, 2))\n"
    )
    with pytest.raises(BadRequest, match="does not take the model") as raised:
        export_function("sized_to_fix:model")
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_a_pt2_is_never_loaded(folder: Path) -> None:
    trapped(folder / "p.pt2", folder / "canary")
    for path in ("p.pt2", "gone.pt2"):
        result = invoke(path, "--fix", "-o", "q.pt2")
        assert "name the function that exports the model, as MODULE:FUNCTION" in str(
            result.exception
        )
    assert not (folder / "canary").exists()
    assert not (folder / "q.pt2").exists()


def swapped(program: ExportedProgram) -> Rewriting:
    """A rule that is wrong: it exchanges the operands of the first subtraction or product."""
    node = next(n for n in program.graph.nodes if str(n.target) == "aten.mul.Tensor")
    node.args = (node.args[0], 3)
    return Rewriting({STRIDED_WRITES: 1})


def test_a_rule_that_changes_a_bit_is_named_and_nothing_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: dict[str, Any] = {rule: () for rule in RULES}
    monkeypatch.setattr(rules, "_PASSES", {**passes, STRIDED_WRITES: (swapped,)})
    program = exported(FITTING["empty_like"], torch.randn(2, 4, 6))
    with pytest.raises(WanExportError, match=r"strided_writes changes .*nothing is written"):
        fix_program(program, folder / "x.pt2")
    assert not (folder / "x.pt2").exists()


def test_a_program_without_example_inputs_is_refused(folder: Path) -> None:
    program = exported(FITTING["empty_like"], torch.randn(2, 4, 6))
    program._example_inputs = None
    with pytest.raises(BadRequest, match="no example inputs"):
        fix_program(program, folder / "x.pt2")


def test_a_run_leaves_the_program_and_its_inputs_as_they_were() -> None:
    def counting(module: Any, x: Tensor) -> Tensor:
        module.state.add_(1)
        x.mul_(2)
        return x + module.state

    x = torch.randn(2, 4, 6)
    program = exported(counting, x)
    given, state = program.example_inputs[0][0].clone(), dict(program.named_buffers())
    Proof(program).check(program, STRIDED_WRITES)
    assert torch.equal(program.example_inputs[0][0], given)
    assert not any(value.any() for value in state.values())


def test_a_tensor_of_the_model_that_a_run_changes_stays_as_it_was() -> None:
    def counting(module: Any, x: Tensor) -> Tensor:
        module.table.add_(1)
        return x + module.table

    program = exported(counting, torch.randn(2, 4, 6), table=torch.zeros(2, 4, 6))
    before = [value.clone() for value in program.constants.values() if isinstance(value, Tensor)]
    Proof(program).check(program, STRIDED_WRITES)
    after = [value for value in program.constants.values() if isinstance(value, Tensor)]
    assert before and all(map(torch.equal, before, after))


def test_inputs_in_fp8_are_compared_too() -> None:
    def widened(_: Any, x: Tensor) -> Tensor:
        return x.float() * 2

    program = exported(widened, torch.randn(2, 4, 6).to(torch.float8_e4m3fn))
    Proof(program).check(program, STRIDED_WRITES)


@pytest.mark.parametrize(
    ("a", "b", "differs"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0]), True),
        (torch.tensor([torch.nan]), torch.tensor([-torch.nan]), False),
        (torch.tensor([1.0]), torch.tensor([1.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0]).bfloat16(), True),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), True),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 3j]), True),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), False),
        ([torch.tensor(1), 3], [torch.tensor(1), 4], True),
        ([torch.tensor(1)], [torch.tensor(1), 4], True),
    ],
)
def test_bits_are_compared(a: Any, b: Any, differs: bool) -> None:
    assert bool(differing(a, b)) is differs
