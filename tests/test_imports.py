"""Imports go one way, between packages and rooms; the runtime needs neither PyTorch nor time."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tables.rooms import (
    FLOORS,
    against_the_order,
    circles,
    file_arrows,
    room,
    room_arrows,
    sources_of,
)

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"runtime": {"exporter", "graphs"}, "graphs": {"exporter"}, "exporter": set()}
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name + " is blocked", name=name)
sys.meta_path.insert(0, Refuse())
"""
BLOCKED = {"torch", "onnx", "onnx_ir", "onnxscript", "diffusers", "transformers", "safetensors"}
BLOCKED |= {"av", "PIL", "ftfy", "tokenizers"}
STARTING = (
    r"(torch\.)?(subprocess|multiprocessing)\b|concurrent\.futures\.Process|pty\b"
    r"|os\.(fork|spawn|exec|system|popen|posix_spawn)|asyncio\.(create_)?subprocess"
)


def imported_packages(file: Path) -> set[str]:
    """The wanexport sub-packages that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("wanexport.")}


def starts_a_process(source: str) -> list[str]:
    """What in a source starts a process, or imports what does."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    return [name for name in names if re.match(STARTING, name)]


def test_every_process_is_started_in_one_room() -> None:
    room_of_processes = ROOT / "exporter" / "child"
    files = [file for package in FORBIDDEN for file in (ROOT / package).rglob("*.py")]
    found = {file: starts_a_process(file.read_text()) for file in files}
    assert {file.parent for file, names in found.items() if names} == {room_of_processes}


@pytest.mark.parametrize(
    ("source", "is_seen"),
    [
        ("import subprocess", True),
        ("from subprocess import Popen", True),
        ("import multiprocessing.pool", True),
        ("from concurrent.futures import ProcessPoolExecutor", True),
        ("from concurrent.futures import ThreadPoolExecutor", False),
        ("import os\nos.spawnv(0, 'a', [])", True),
        ("from os import fork", True),
        ("import os\nos.posix_spawn('a', [], {})", True),
        ("from torch import multiprocessing", True),
        ("import os\nos.path.exists('a')", False),
        ("'subprocess'", False),
    ],
)
def test_what_starts_a_process_is_seen(source: str, is_seen: bool) -> None:
    assert bool(starts_a_process(source)) is is_seen


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not imported_packages(file) & FORBIDDEN[package], file


def test_the_import_walk_sees_each_form(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from wanexport import graphs\nimport wanexport.exporter.cli.main\n"
    )
    assert imported_packages(file) == {"graphs", "exporter"}


@pytest.mark.parametrize("package", FLOORS)
def test_no_room_imports_from_a_floor_above(package: str) -> None:
    sources = sources_of(package, None)
    named = frozenset().union(*FLOORS[package])
    assert {room(path) for path in sources} == named
    arrows = room_arrows(file_arrows(package, sources))
    assert not against_the_order(package, arrows)
    assert not circles(arrows)


def test_an_arrow_upward_and_a_circle_are_seen() -> None:
    sources = {
        "errors.py": "from wanexport.runtime import load",
        "load.py": "def f():\n    from wanexport.runtime.engines.aoti import Regions",
        "engines/aoti.py": "import wanexport.runtime.load",
    }
    arrows = room_arrows(file_arrows("runtime", sources))
    assert arrows == {("errors", "load"), ("load", "engines"), ("engines", "load")}
    upward = [("engines", "load"), ("errors", "load")]
    assert against_the_order("runtime", arrows) == upward
    assert circles(arrows) == 1


def test_the_runtime_imports_in_under_300_ms() -> None:
    """Of processor time: what else runs on the machine does not count."""
    code = "import time; t = time.process_time(); import wanexport.runtime; "
    code += "print(time.process_time() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.3


def test_what_an_engine_does_not_need_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, wanexport.runtime as runtime\n"
        "def imported(*names): return [name for name in names if name in sys.modules]\n"
        f"assert not imported(*{BLOCKED!r}, 'asyncio'), sys.modules.keys()\n"
        "assert not imported('wanexport.runtime.serving'), 'serving'\n"
        "assert set(runtime.__all__) <= set(dir(runtime))\n"
        "assert not imported('wanexport.runtime.serving'), 'dir'\n"
        "found = {name: getattr(runtime, name) for name in runtime.__all__}\n"
        "assert all(one.__name__ == name for name, one in found.items()), found\n"
        "assert found['Pipeline'].__module__ == 'wanexport.runtime.serving.pipeline'\n"
        "assert runtime.__dict__['write_video'] is found['write_video']\n"
        f"assert not imported(*{BLOCKED!r}), sys.modules.keys()\n"
        "from wanexport.runtime import *\n"
        "assert Pipeline is found['Pipeline']\n"
        "assert not hasattr(runtime, 'Pipelines')\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_load_sample_and_run_work_without_torch(tiny_bundle: Path, tmp_path: Path) -> None:
    code = WITHOUT_TORCH.format(blocked=BLOCKED) + (
        "import numpy as np\n"
        "from wanexport.runtime import load, sample\n"
        f"denoiser = load({str(tiny_bundle)!r})\n"
        "noise = np.zeros(denoiser.inputs['latent'].shape, np.float32)\n"
        "text = np.ones((7, 4096), np.float32)\n"
        "steps = list(sample(denoiser, noise=noise, text=text, steps=2, guidance=1))\n"
        "assert np.isfinite(steps[-1].latent).all()\n"
        "from pathlib import Path\n"
        "from wanexport.runtime.bundle.tensorfile import save_arrays\n"
        f"save_arrays(Path({str(tmp_path / 't')!r}), {{'text': text, 'negative': -text}})\n"
        f"sys.argv = ['wanexport', 'run', {str(tiny_bundle)!r}, '--text', {str(tmp_path / 't')!r},"
        f" '--steps', '2', '-o', {str(tmp_path / 'latents.safetensors')!r}]\n"
        "from wanexport.exporter.cli.main import main\n"
        "main()\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert (tmp_path / "latents.safetensors").exists()


def test_build_without_torch_names_what_to_install() -> None:
    code = WITHOUT_TORCH.format(blocked=BLOCKED) + (
        "sys.argv = ['wanexport', 'build', '--resolution', '64x96', '--frames', '9']\n"
        "from wanexport.exporter.cli.main import main\n"
        "main()\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 2
    assert "from a clone of wanexport: pip install '.[build,cpu]'" in child.stderr
    assert child.stderr.count("\n") == 1
