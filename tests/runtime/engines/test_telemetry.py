"""No library of ours writes to the home folder or calls anybody unless the user wants it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
IMPORT = "from wanexport.runtime.engines.onnx import import_onnxruntime as f; f()"
BEFORE = "import wanexport.exporter.doctor as d, sys; d._problem([sys.executable, '-c', {code!r}])"


def run(code: str, home: Path, **environment: str) -> str:
    """What a process that has this home folder prints."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_"))}
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return child.stdout


@pytest.mark.parametrize("code", [IMPORT, BEFORE.format(code="import onnxruntime")])
def test_onnx_runtime_writes_nothing_below_the_home_folder(code: str, tmp_path: Path) -> None:
    run(code, tmp_path)
    assert list(tmp_path.rglob("*")) == []


def test_the_users_own_choice_is_kept(tmp_path: Path) -> None:
    code = IMPORT + "; import os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(code, tmp_path, ORT_DISABLE_TELEMETRY="yes") == "yes\n"


def test_onnx_runtime_is_imported_in_one_place() -> None:
    importing = {
        str(file.relative_to(ROOT))
        for package in ("runtime", "graphs", "exporter")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.Import) and "onnxruntime" in {a.name for a in node.names})
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onnxruntime"))
    }
    assert importing == {"runtime/engines/onnx.py"}
