"""`MODULE:FUNCTION` is a model of the user's, and what is none of that form is refused."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wanexport.exporter.module_function import is_function, load_function
from wanexport.runtime.errors import BadRequest

SOURCE = """
import math
def pair():
    return math.hypot, (3, 4)
def triple():
    return dict, [], {"a": 1}
def alone():
    return math.hypot
def four():
    return math.hypot, (), {}, None
def no_model():
    return 3, ()
def one_argument():
    return abs, -1
def no_kwargs():
    return abs, (-1,), [2]
def numbered():
    return abs, (-1,), {1: 2}
def raises():
    raise KeyError("first\\nsecond")
def leaves():
    raise SystemExit(3)
def takes(argument):
    return abs, (-1,)
constant = 5
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`planted_model.py` in the working directory, and two that do not import."""
    (tmp_path / "planted_model.py").write_text(SOURCE)
    (tmp_path / "planted_broken.py").write_text("import math\nx = (\n")
    (tmp_path / "planted_needy.py").write_text("import no_such_library_of_anyone\n")
    (tmp_path / "planted_leaver.py").write_text("raise SystemExit('usage: none')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("planted_")]:
        del sys.modules[name]


def test_a_pair_and_a_triple_are_a_call() -> None:
    model, args, kwargs = load_function("planted_model:pair")
    assert model(*args, **kwargs) == 5
    model, args, kwargs = load_function("planted_model:triple")
    assert (args, model(*args, **kwargs)) == ((), {"a": 1})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("planted_model", "'planted_model' names no function: expected MODULE:FUNCTION"),
        ("planted_model:", "names no function"),
        (":pair", "names no function"),
        ("planted_absent:pair", r"does not import \(ModuleNotFoundError: No module named"),
        ("planted_needy:pair", r"does not import \(.*no_such_library_of_anyone"),
        ("planted_broken:pair", r"does not import \(SyntaxError: '\(' was never closed"),
        ("planted_leaver:pair", r"does not import \(SystemExit: usage: none\)"),
        ("../planted_model:pair", "does not import"),
        ("planted_model:nobody", "module planted_model has no function nobody"),
        ("planted_model:constant", "planted_model:constant is no function but int"),
        ("planted_model:raises", "planted_model:raises raised KeyError: 'first"),
        ("planted_model:leaves", "planted_model:leaves raised SystemExit: 3"),
        ("planted_model:takes", "planted_model:takes raised TypeError: takes.. missing 1 required"),
        ("planted_model:alone", "returned builtin_function_or_method: expected .model, args. or"),
        ("planted_model:four", "returned tuple of 4: expected"),
        ("planted_model:no_model", "returned int as model: expected"),
        ("planted_model:one_argument", "returned int as args: expected .*args a tuple"),
        ("planted_model:no_kwargs", "returned list as kwargs: expected .*kwargs a dict"),
        ("planted_model:numbered", "returned dict as kwargs: expected .*kwargs a dict"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(target: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as refused:
        load_function(target)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a:b", True), ("a.b.c:d", True), ("a", False), ("a:", False), ("a/b.py:c", False),
     ("C:\\x.onnx", False), ("a:b.onnx", False), ("a:b:c", False), ("1a:b", False)],
)  # fmt: skip
def test_the_form_is_told_from_a_path(text: str, expected: bool) -> None:
    assert is_function(text) is expected
