"""`doctor` says what is missing or broken, and the command that gets it."""

import shlex
import sys
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest
from packaging.requirements import Requirement

from wanexport.exporter import doctor as module
from wanexport.exporter.doctor import doctor
from wanexport.runtime.engines.tensorrt_library import FLAVOURS

# Ones that are imported at once.
EXTRAS = ("numpy>=1.26", 'onnxruntime>=1.27; extra == "cpu"', 'packaging>=20; extra == "build"')


@pytest.fixture
def stated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requirements that wanexport's metadata states, for a test to change."""
    requirements = list(EXTRAS)
    monkeypatch.setattr(module, "requires", lambda name: requirements)
    return requirements


@pytest.mark.slow  # every library is imported
def test_this_environment_is_usable() -> None:
    record = doctor()
    assert record["usable"]
    tasks = {name: task for name, task in record["tasks"].items() if "TensorRT" not in name}
    assert tasks and all(task["usable"] and not task["command"] for task in tasks.values())
    stated = {library["requirement"] for library in record["libraries"]}
    assert {"numpy>=1.26", "onnxruntime>=1.27"} <= stated
    assert record["machine"]["memory_bytes"] >= record["machine"]["available_bytes"] > 0


def test_an_environment_for_aotinductor_engines_alone_is_usable(stated: list[str]) -> None:
    stated[1] = 'no-such-runtime>=1; extra == "cpu"'
    stated.append('packaging>=20; extra == "aoti"')
    record = doctor()
    tasks = record["tasks"]
    assert not tasks["run on a CPU"]["usable"] and tasks["run AOTInductor engines"]["usable"]
    assert record["usable"]


def test_plans_run_on_a_gpu_alone(stated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stated[1] = 'no-such-runtime>=1; extra == "cpu"'
    stated += [f'no-such-library; extra == "{extra}"' for extra in ("aoti", "gpu")]
    monkeypatch.setattr(module, "_tensorrt", lambda *_: {"usable": True, "command": ""})
    for gpus in ([], ["NVIDIA GeForce RTX 4090, 24564 MiB"]):
        monkeypatch.setattr(module, "_gpus", lambda gpus=gpus: gpus)
        assert doctor()["usable"] is bool(gpus)


def test_a_missing_library_and_the_command_that_gets_it(stated: list[str]) -> None:
    stated.append('no-such-library>=3; extra == "build"')
    record = doctor()
    assert record["usable"]  # a bundle can run, but not be built
    task = record["tasks"]["build and compare"]
    assert not task["usable"]
    assert shlex.split(task["command"]) == [
        sys.executable, "-m", "pip", "install", "no-such-library>=3",
    ]  # fmt: skip


def test_what_videos_from_prompts_take(stated: list[str]) -> None:
    stated += ['pillow>=10; extra == "pipeline"', 'av>=999; extra == "pipeline"']
    record = doctor()
    task = record["tasks"]["make videos from prompts"]
    assert record["usable"] and not task["usable"]  # the engine runs, from text embeddings
    assert task["command"].endswith("install --force-reinstall 'av>=999'")
    pillow = next(lib for lib in record["libraries"] if lib["requirement"] == "pillow>=10")
    assert pillow["extra"] == "pipeline" and not pillow["problem"]


def test_onnx_runtime_for_a_gpu_takes_the_place_of_the_other(
    stated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stated.append('onnxruntime-gpu>=1.27; extra == "gpu"')
    monkeypatch.setattr(module, "_gpus", lambda: ["NVIDIA H200"])
    libraries = {"onnxruntime": "1.31", "onnxruntime-gpu": None}
    monkeypatch.setattr(module, "_version", lambda name: libraries.get(name, "99"))
    monkeypatch.setattr(module, "_import_problem", lambda name: "")
    task = doctor()["tasks"]["run ONNX engines on a GPU"]
    assert not task["usable"]
    uninstall, install = task["command"].split(" && ")
    assert uninstall.endswith(" -m pip uninstall -y onnxruntime onnxruntime-gpu")
    assert install.endswith(" -m pip install 'onnxruntime-gpu>=1.27'")
    libraries["onnxruntime"] = None
    assert "uninstall" not in doctor()["tasks"]["run ONNX engines on a GPU"]["command"]


def test_a_version_that_does_not_serve(stated: list[str]) -> None:
    stated[1] = 'onnxruntime>=99; extra == "cpu"'
    record = doctor()
    assert not record["usable"]
    library = next(lib for lib in record["libraries"] if lib["requirement"] == "onnxruntime>=99")
    assert library["problem"].endswith("is not >=99")
    assert record["tasks"]["run on a CPU"]["command"].endswith("install 'onnxruntime>=99'")


def test_a_version_below_any_bound_of_ours_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = [Requirement(text) for text in requires("wanexport") or ()]
    assert {"onnxscript", "onnx-ir", "torch", "filelock"} <= {needed.name for needed in stated}
    for needed in stated:
        (oldest,) = [part.version for part in needed.specifier if part.operator == ">="]
        for found, problem in ((f"{oldest}.dev0", f"{oldest}.dev0 is not {needed.specifier}"),
                               (oldest, "")):  # fmt: skip
            monkeypatch.setattr(module, "_version", Mock(return_value=found))
            assert module._examine(needed, {needed.name: ""}).problem == problem


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_each_flavour_of_tensorrt_with_what_to_install(
    flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages of its name stand in for TensorRT: a good one, one that is too old, a broken one."""
    title, (name, *_), oldest, install, _ = FLAVOURS[flavour]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file = tmp_path / f"{name}.py"
    for source, problem in (
        (f"__version__ = {oldest!r}", ""),
        ("__version__ = '0.9'", f"{title} 0.9 is too old, {oldest} or newer is needed: {install}"),
        ("raise OSError('no libnvinfer.so')", f"cannot be loaded (no libnvinfer.so): {install}"),
    ):
        file.write_text(source)
        task = module._tensorrt(flavour, install)
        assert task["usable"] == (not problem) and problem in task["problem"]
        assert task["command"] == (install if problem else "")


def test_a_flavour_that_is_not_installed(stated: list[str]) -> None:
    if find_spec("tensorrt"):
        pytest.skip("TensorRT is installed")
    task = doctor()["tasks"]["TensorRT engines"]
    assert not task["usable"] and task["command"] == "pip install 'tensorrt-cu13>=10.14'"
    assert "TensorRT is not installed" in task["problem"]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            "raise ImportError('no libfoo.so')",
            "fails: ImportError: no libfoo.so",
        ),
        ("import os; os.abort()", "dies of signal 6"),
        ("import time; time.sleep(9)", "takes over 1 s"),
    ],
)
def test_a_library_that_cannot_be_imported(
    code: str, problem: str, stated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IMPORTS", {"onnxruntime": code})
    monkeypatch.setattr(module, "_TIMEOUT", 1 if "sleep" in code else 60)
    stated[2:] = []
    record = doctor()
    assert not record["usable"]
    assert problem in next(lib["problem"] for lib in record["libraries"] if lib["extra"] == "cpu")
    assert "--force-reinstall" in record["tasks"]["run on a CPU"]["command"]


def test_the_driver_names_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module._gpus() == ["NVIDIA H200, 143771 MiB"]
    tool.unlink()
    assert module._gpus() == []
