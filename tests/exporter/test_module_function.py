"""A model that a user's function makes: what is taken, and one line for what is not."""

import sys
from pathlib import Path

import pytest
import torch

from wanexport.exporter.module_function import is_function, load_function
from wanexport.runtime.errors import BadRequest

SOURCE = """
import torch
from torch import nn

x = torch.ones(1, 2)
model = nn.Linear(2, 2)
def plain(): return model, (x,)
def with_names(): return model, [], {"input": x}
def program(): return torch.export.export(model, (x,))
def three(): return 3
def only_model(): return model
def only_names(): return model, {"input": x}
def other_pair(): return 1, (x,)
def bad_names(): return model, (x,), {1: x}
def raises(): raise ValueError("first\\nsecond")
def leaves(): raise SystemExit(7)
def asks(what): return model, (x,)
value = 4
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with modules of the user's."""
    (tmp_path / "mine_of_user.py").write_text(SOURCE)
    (tmp_path / "broken_of_user.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "wrong_of_user.py").write_text("def f(:\n")
    (tmp_path / "leaving_of_user.py").write_text("raise SystemExit('usage')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    for name in [name for name in sys.modules if name.endswith("_of_user")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_models_and_programs_are_taken(folder: Path) -> None:
    for name, args, kwargs in (("plain", 1, 0), ("with_names", 0, 1)):
        made = load_function(f"mine_of_user:{name}")
        assert isinstance(made, tuple)
        assert isinstance(made[0], torch.nn.Linear)
        assert (len(made[1]), len(made[2])) == (args, kwargs)
    assert isinstance(load_function("mine_of_user:program"), torch.export.ExportedProgram)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("mine_of_user", "names no function: expected MODULE:FUNCTION"),
        ("absent_of_user:f", "does not import: ModuleNotFoundError: No module named 'absent_of_us"),
        ("broken_of_user:f", "does not import: ModuleNotFoundError: No module named 'nothing_of"),
        ("wrong_of_user:f", "does not import: SyntaxError"),
        ("leaving_of_user:f", "does not import: SystemExit: usage"),
        ("mine_of_user:f", "has no function f: FUNCTION takes no arguments"),
        ("mine_of_user:value", "has no function value"),
        ("mine_of_user:three", "returned a int: FUNCTION"),
        ("mine_of_user:only_model", "returned a Linear: FUNCTION"),
        ("mine_of_user:only_names", r"returned \(Linear, dict\)"),
        ("mine_of_user:other_pair", r"returned \(int, tuple\)"),
        ("mine_of_user:bad_names", r"returned \(Linear, tuple, dict\)"),
        ("mine_of_user:raises", "raised ValueError: first$"),
        ("mine_of_user:leaves", "raised SystemExit: 7$"),
        ("mine_of_user:asks", "raised TypeError: asks"),
    ],
)
def test_what_is_no_such_function_is_one_line(target: str, reason: str, folder: Path) -> None:
    with pytest.raises(BadRequest, match=reason) as raised:
        load_function(target)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a:b", True), ("a.b.c:d", True), ("a", False), ("a:", False), ("a/b.py:c", False),
     ("C:\\x.onnx", False), ("a:b.onnx", False), ("a:b:c", False), ("1a:b", False)],
)  # fmt: skip
def test_the_form_is_told_from_a_path(text: str, expected: bool) -> None:
    assert is_function(text) is expected
