"""A bundle that carries its parts serves prompts by itself: no checkpoint, and few packages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exporter.run.test_run import PROMPT, SAMPLING, run, saved_pictures, whole_family
from tests.runtime.drop_in.test_diffusers_pipeline import Family
from tests.runtime.parts.vae_bundle import EagerRegions, stub_compiler
from wanexport.exporter.backends.onnx import backend as onnx_backend
from wanexport.exporter.build import build
from wanexport.exporter.inspection import inspect
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.parts import vae_engine as engine_module

REFUSE = """
import sys
class Refuse:
    blocked = {blocked!r}
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in self.blocked):
            raise ModuleNotFoundError(name + " is blocked", name=name)
sys.meta_path.insert(0, Refuse())
"""
BLOCKED = sorted(
    {"diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "PIL", "gguf"}
    | {"onnx", "onnx_ir", "onnxscript", "triton", "flash_attn", "cutlass", "tensorrt", "matplotlib"}
    | {"torch._inductor", "torch._dynamo", "torch.onnx", "jinja2", "rich_click"}
)
COMMAND = "from wanexport.exporter.cli.main import main; sys.argv = {argv!r}; main()"


def carrying(preset: str, folder: Path) -> Family:
    """A bundle built with --parts, whose VAE packages are text; its checkpoint is gone."""
    family = whole_family(preset, folder)
    geometry = family.geometry
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(onnx_backend, "prove_lowering", lambda *args, **options: {"verify": "none"})
        stub_compiler(patches)
        record = build(
            folder / "model", resolution=f"{geometry.height}x{geometry.width}", frames=9,
            dtype="fp32", backends=["onnx"], device="cpu", output=family.bundle, parts=True,
        )  # fmt: skip
    assert "text_encoder-bf16" in record["weights"]
    (folder / "model").rename(folder / "gone")
    return family


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return carrying("t2v-1.3b", tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return carrying("i2v-14b", tmp_path_factory.mktemp("i2v"))


@pytest.mark.parametrize(
    ("preset", "pictures"), [("t2v", 0), pytest.param("i2v", 1, marks=pytest.mark.slow)]
)
def test_a_built_bundle_serves_without_its_checkpoint(
    preset: str,
    pictures: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(engine_module, "VaeRegions", EagerRegions)
    family: Family = request.getfixturevalue(preset)
    bundle, gone = family.bundle, family.bundle.parent / "gone"
    images = saved_pictures(family, tmp_path, pictures)
    given = [word for pair in zip(("--image",), images) for word in pair]
    arguments = (bundle, "--prompt", PROMPT, *SAMPLING, *given)
    record = run(*arguments, "-o", tmp_path / "own.mp4")
    own = record["components"]
    assert own["text_encoder"] == "weights/text_encoder-bf16/text_encoder.safetensors"
    assert own["vae"].endswith("/vae-aoti-fp32-x86_64") and "origin" not in own
    assert ("image_encoder" in own) == bool(pictures)
    assert record["placement"] == {}  # on a CPU
    run(*arguments, "-o", tmp_path / "own.safetensors")
    run(*arguments, "-m", gone, "-o", tmp_path / "other.safetensors")
    found, other = (load_arrays(tmp_path / f"{n}.safetensors")["latent"] for n in ("own", "other"))
    np.testing.assert_array_equal(found, other)
    assert not inspect(bundle, verify=True)["problems"]


def in_a_child(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_serving_takes_no_package_that_builds(t2v: Family, tmp_path: Path) -> None:
    """From a prompt to a latent."""
    argv = ["wanexport", "run", str(t2v.bundle), "--prompt", PROMPT, "--steps", "1", "--json"]
    argv += ["-o", str(tmp_path / "x.safetensors")]
    child = in_a_child(REFUSE.format(blocked=BLOCKED) + COMMAND.format(argv=argv))
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout)["shape"] == [1, 16, 3, *(n // 8 for n in (32, 48))]


@pytest.mark.slow
def test_a_vae_without_an_engine_needs_diffusers_and_says_so(t2v: Family, tmp_path: Path) -> None:
    """In one line, before the sampling."""
    gone = t2v.bundle.parent / "gone"
    argv = ["wanexport", "run", str(t2v.bundle), "--prompt", PROMPT, "--steps", "1"]
    argv += ["--model", str(gone), "-o", str(tmp_path / "x.mp4")]
    code = REFUSE.format(blocked=[b for b in BLOCKED if b != "PIL"])
    code += (
        "from wanexport.runtime.parts import vae_choice, open as o; "
        "o.choose_vae_engine = lambda *_: None\n"
    )
    child = in_a_child(code + COMMAND.format(argv=argv))
    assert child.returncode == 2
    (line,) = [line for line in child.stderr.splitlines() if line.startswith("error")]
    assert "the VAE needs" in line and "diffusers" in line and "sampling" not in child.stderr


FRAMES = """
import hashlib, json
from wanexport.runtime.serving.pipeline import Pipeline
with Pipeline({bundle!r}, backend="aoti", open_parts=("text_encoder", "vae")) as pipeline:
    made = [pipeline.generate({prompt!r}, steps=1, seed=3) for _ in range(2)]
print(json.dumps([
    [*one.video.shape, hashlib.md5(one.video.tobytes()).hexdigest()] for one in made
]))
"""


@pytest.mark.slow
def test_compiled_packages_serve_without_a_compiler(tmp_path: Path) -> None:
    """From a prompt to frames: AOTInductor's denoiser and VAE, in two processes the same."""
    family = whole_family("t2v-1.3b", tmp_path)
    geometry = family.geometry
    build(
        tmp_path / "model", resolution=f"{geometry.height}x{geometry.width}", frames=9,
        dtype="fp32", backends=["aoti"], device="cpu", output=family.bundle, parts=True,
    )  # fmt: skip
    (tmp_path / "model").rename(tmp_path / "gone")
    assert [engine.backend for engine in read_manifest(family.bundle).engines][-2:] == ["aoti"] * 2
    code = REFUSE.format(blocked=[*BLOCKED, "onnxruntime", "av", "wanexport.exporter"])
    code += FRAMES.format(bundle=str(family.bundle), prompt=PROMPT)
    told: list[Any] = []
    for _ in range(2):
        child = in_a_child(code)
        assert child.returncode == 0, child.stderr
        told.append(json.loads(child.stdout))
    assert told[0] == told[1] and told[0][0] == told[0][1]
    assert told[0][0][:4] == [9, geometry.height, geometry.width, 3]
