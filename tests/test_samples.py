"""Every sample runs as its docstring says."""

import os
import runpy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.documents import documents
from tests.forked import Forks
from tests.quick import slow_but

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "samples"
ON_A_GPU = "04_tensorrt_on_your_gpu.py"
LAST_WORDS = {
    "02_build_and_sample.py": "step 3",
    "05_drop_into_diffusers.py": "same latent",
    "06_two_experts.py": "6 steps by high_noise and 2 steps by low_noise",
    "07_your_own_solver.py": "same latent",
    "08_persistent_pipeline.py": "served 6 requests with 4 calls of the text encoder",
}
# test_readme and test_docs_run run these, as README and docs/ show them.
SHOWN = {
    "01_text_embeddings.py",
    "03_compare_recorded.py",
    "09_tiny_trained_wan.py",
    "10_random_lora.py",
}


def test_every_sample_is_run() -> None:
    names = {path.name for path in SAMPLES.glob("*.py")}
    assert names == LAST_WORDS.keys() | SHOWN | {ON_A_GPU}
    commands = [command for page in documents() for command in page.commands("bash")]
    shown = {command.split()[1] for command in commands if command.startswith("python ")}
    assert {f"samples/{name}" for name in SHOWN} == shown


@pytest.mark.parametrize("name", slow_but(list(LAST_WORDS), "02_build_and_sample.py"))
def test_the_sample_runs(name: str, forks: Forks, tmp_path: Path) -> None:
    ended = forks.run_program(["python", str(SAMPLES / name), "."], tmp_path, os.environ)
    assert ended.code == 0, ended.errors
    assert ended.output.splitlines()[-1].startswith(LAST_WORDS[name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_sample_for_a_gpu_says_what_is_missing(forks: Forks, tmp_path: Path) -> None:
    command = ["python", str(SAMPLES / ON_A_GPU), ".", "--backend", "tensorrt-rtx"]
    ended = forks.run_program(command, tmp_path, os.environ)
    assert (ended.code, ended.output) == (2, "")
    assert ended.errors == (
        "TensorRT for RTX needs an NVIDIA GPU and PyTorch for CUDA, which finds none: choose one "
        "of another --backend\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_sample_for_a_gpu_reports_the_engine_that_it_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder may hold engines of other shapes already; no GPU is needed for the choice."""
    sample = runpy.run_path(str(SAMPLES / ON_A_GPU))
    calls: list[dict[str, Any]] = []

    def give(result: Any) -> Callable[..., Any]:
        def called(bundle: Path, **options: Any) -> Any:
            calls.append(options)
            return result

        return called

    size = SimpleNamespace(size=30_000_000)
    record = SimpleNamespace(
        name="64x96x9/tensorrt-bf16-sm89", target={}, files={"denoiser": size}, build={}, proof={}
    )
    opened = SimpleNamespace(graph=None, device_memory={})
    row = {"arm": "graph", "median": 1.0, "min": 1.0, "max": 1.0, "percent_of_floor": 1.0}
    measured = {"machine": "", "peak": 0, "arms": [row], "failed": {}}
    sample["report"].__globals__.update(
        build=lambda **options: {"seconds": 1, "engines": []},
        load=give(SimpleNamespace(record=record, engines={"": opened})),
        compare=give({"steps": [], "passed": True}),
        bench=give(measured),
        TensorRtEngine=SimpleNamespace,
    )
    shape = {"resolution": "64x96", "frames": 9}
    assert sample["report"](tmp_path, "tensorrt", {**shape, "model": "tiny", "random_weights": 0})
    wanted = {**shape, "backend": "tensorrt", "dtype": "bf16"}
    measured_as = {**shape, "dtype": "bf16", "arms": ["tensorrt", "graph"]}
    assert calls == [wanted, wanted, measured_as]
    assert "* engine: 64x96x9/tensorrt-bf16-sm89" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_the_sample_for_a_gpu_says_what_to_install(forks: Forks, tmp_path: Path) -> None:
    command = ["python", str(SAMPLES / ON_A_GPU), ".", "--backend", "tensorrt"]
    ended = forks.run_program(command, tmp_path, os.environ)
    assert (ended.code, ended.output) == (2, "")
    wanted = "TensorRT is not installed: pip install 'tensorrt-cu13>=10.14'\n"
    assert ended.errors == wanted
